"""The cost of a step by part, in FLOPs (one multiply-add is two), from the models themselves.

A forward pass is counted by torch's own FLOP counter on one example; a backward pass costs two forwards (paper section
7). Two conventions are in use for the scoring forward: Table 1 of the paper counts it as reused for the selected
examples (233 % of a uniform step at f = 0.8), Figure 1 does not (267 %). jest runs the latter and reports both.
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from jest_core.towers import Towers


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step, all learners together."""

    score: float  # the learner's forward over the super-batch
    reference: float  # the reference's, where it is not cached
    select: float  # matrix products of the conditional scores
    train: float  # forward and backward over the sub-batch

    @property
    def total(self) -> float:
        """As executed: the scoring forward is not reused."""
        return self.score + self.reference + self.select + self.train

    def total_with_reuse(self, sub_batch_size: int, forward: float) -> float:
        """As in the paper's Table 1: the selected examples' scoring forward is counted once."""
        return self.total - (sub_batch_size * forward if self.score else 0.0)


def forward_flops(towers: Towers, image_size: int | None = None) -> float:
    """FLOPs of one pair's forward through both towers, at the model's own resolution unless another is given."""
    size = image_size or towers.view.image_size
    pixels, tokens = torch.zeros(1, 3, size, size), towers.tokens(["a"])
    model = towers.model
    was_training = model.training
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels, tokens)
    model.train(was_training)
    return float(counter.get_total_flops())


def training_flops(
    *,
    forward: float,
    sub_batch_size: int,
    super_batch_size: int,
    n_chunks: int,
    widths: tuple[int, ...] = (),
    reference_forward: float = 0.0,
    score_forward: float | None = None,
) -> StepFlops:
    """The cost of one step. For a uniform step super_batch_size equals sub_batch_size, and nothing is scored.

    widths: embedding widths of the models that score (learner, reference). reference_forward: FLOPs of one pair by the
    reference, 0 where its scores are cached; score_forward: by the learner as it scores, where that is at another
    resolution. The matrix products of selection are 2 directions x 2 B n D a model and
    chunk, for all chunks but the last; against that only the b selected are multiplied, for the score of the set.
    """
    train = 3.0 * forward * sub_batch_size
    if super_batch_size == sub_batch_size:
        return StepFlops(0.0, 0.0, 0.0, train)
    chunk = sub_batch_size // n_chunks
    select = 4.0 * (super_batch_size * (sub_batch_size - chunk) + sub_batch_size * chunk) * sum(widths)
    scored = forward if score_forward is None else score_forward
    return StepFlops(scored * super_batch_size, reference_forward * super_batch_size, select, train)
