"""The cost of a step by part, in FLOPs (one multiply-add is two), from the run file alone.

A forward pass is counted by PyTorch's FLOP counter on a model of the same configuration without weights; a backward
pass costs two forward passes. There are two conventions for the scoring pass: Table 1 of Evans et al. 2024
(arXiv:2406.17711) counts it as reused for the selected examples (233 % of a uniform step at f = 0.8), Figure 1 does not
(267 %). jest computes it twice, as in Figure 1, and reports both.
"""

from dataclasses import dataclass, replace

from jest_core.choices import LOSSES, Loss
from jest_core.models import outlines
from jest_core.run_file import Model, Run

_ADAMW = 14  # operations per parameter: two moments, their corrections, weight decay and the update


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the forward pass of one pair, by tower."""

    image: float
    text: float

    @property
    def total(self) -> float:
        return self.image + self.text


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step, all learners together."""

    score: float  # the learner's forward pass over the super-batch
    reference: float  # the reference's forward pass, where its embeddings are not cached
    select: float  # matrix products of the conditional scores
    train: float  # forward and backward pass over the sub-batch, and what is computed twice to save memory
    loss: float  # matrix products of the logits and their gradients
    optimizer: float  # counted once, though every learner computes it
    reusable: float  # the part of `score` that the selected examples need again in `train`
    agreement: float = 0.0  # scoring and selecting again at full resolution, per step on average

    @property
    def total(self) -> float:
        """As executed: the scoring pass is not reused."""
        return self.score + self.reference + self.select + self.train + self.loss + self.optimizer + self.agreement

    @property
    def total_with_reuse(self) -> float:
        """As in Table 1 of the paper (233 %): the scoring pass of the selected examples is counted once."""
        return self.total - self.reusable


def training_flops(
    *,
    forward: float,
    sub_batch_size: int,
    super_batch_size: int,
    n_chunks: int,
    widths: tuple[int, ...] = (),
    reference_forward: float = 0.0,
    score_forward: float | None = None,
    low_forward: float = 0.0,
    n_low_resolution: int = 0,
    n_reusable: int | None = None,
    n_recomputed: int = 0,
    loss: Loss = "sigmoid",
    loss_width: int = 0,
    n_parameters: int = 0,
) -> StepFlops:
    """The cost of one step. In a uniform step super_batch_size equals sub_batch_size, and nothing is scored.

    forward, score_forward, low_forward, reference_forward: FLOPs of the forward pass of one pair: through the learner
    at full resolution, as it scores (at full resolution if not given), and at the low resolution at which
    n_low_resolution examples of the sub-batch are trained; through the reference, 0 where its embeddings are cached.
    n_reusable: how many examples of the sub-batch are trained as they were scored; if not given all, or none where
    score_forward is given. n_recomputed: how often the training forward pass is computed again in the backward pass.
    widths: of the scored embeddings (learner, reference); loss_width: of the learner's embeddings.

    The matrix products of selection are 2 directions x 2 B n D per model and chunk, except for the last chunk, where
    only the b selected examples are multiplied, for the score of the set. The products of the loss are the logits
    (twice for the softmax) and the gradients of both sides, 2 b b D each.
    """
    b = sub_batch_size
    train = (3.0 + n_recomputed) * (forward * (b - n_low_resolution) + low_forward * n_low_resolution)
    loss_products = LOSSES[loss].n_products * 2.0 * b * b * loss_width
    update = float(_ADAMW * n_parameters)
    if super_batch_size == b:
        return StepFlops(0.0, 0.0, 0.0, train, loss_products, update, 0.0)
    chunk = b // n_chunks
    select = 4.0 * (super_batch_size * (b - chunk) + b * chunk) * sum(widths)
    scored = forward if score_forward is None else score_forward
    if n_reusable is None:
        n_reusable = b if score_forward is None else 0
    return StepFlops(
        scored * super_batch_size,
        reference_forward * super_batch_size,
        select,
        train,
        loss_products,
        update,
        scored * n_reusable,
    )


def step_flops(run: Run) -> StepFlops:
    """The cost of a step of this run."""
    selection, training, reference = run.selection, run.training, run.reference
    low = training.low_resolution
    reference_forward = 0.0
    if run.uses_reference and not run.reads_scores and reference is not None:
        sizes = reference.score_image_size, reference.score_patch_size
        reference_forward = forward_flops(reference.model, *sizes).total
    as_trained = (None, None)
    as_scored = selection.score_image_size, selection.score_patch_size
    as_low = (low.image_size, low.patch_size) if low else as_trained
    n_low, full = run.n_low_resolution, forward_flops(run.model).total
    models = [
        *([run.model] if run.uses_learner else []),
        *([reference.model] if run.uses_reference and reference is not None else []),
    ]
    step = training_flops(
        forward=full,
        sub_batch_size=run.sub_batch_size,
        super_batch_size=run.super_batch_size,
        n_chunks=selection.n_draws,
        widths=tuple(outlines.width(model.name) for model in models),
        reference_forward=reference_forward,
        score_forward=forward_flops(run.model, *as_scored).total if run.uses_learner else 0.0,
        low_forward=forward_flops(run.model, *as_low).total if low else 0.0,
        n_low_resolution=n_low,
        n_reusable=n_low * (as_scored == as_low) + (run.sub_batch_size - n_low) * (as_scored == as_trained),
        n_recomputed=(training.micro_batch_size is not None) + training.activation_checkpointing,
        loss=training.loss,
        loss_width=outlines.width(run.model.name),
        n_parameters=n_parameters(run.model),
    )
    if not selection.selects or not selection.agreement_every_steps:
        return step
    scored_again = full * run.super_batch_size + step.select
    return replace(step, agreement=scored_again / selection.agreement_every_steps)


def forward_flops(model: Model, image_size: int | None = None, patch_size: int | None = None) -> ForwardFlops:
    """FLOPs of the forward pass of one pair through both towers, at the model's resolution if no other is given."""
    return ForwardFlops(*outlines.forward_flops(model.name, model.context_length, image_size, patch_size))


def n_parameters(model: Model) -> int:
    """Number of parameters of both towers, with logit_scale and logit_bias."""
    return int(outlines.n_parameters(model.name, model.context_length))
