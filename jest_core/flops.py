"""The cost of a step by part, in FLOPs (one multiply-add is two), from the run file alone.

A forward pass is counted by torch's own FLOP counter on a model of the same configuration without weights; a backward
pass costs two forwards (paper section 7). Two conventions are in use for the scoring forward: Table 1 of the paper
counts it as reused for the selected examples (233 % of a uniform step at f = 0.8), Figure 1 does not (267 %). jest runs
the latter and reports both.
"""

from dataclasses import dataclass, replace

from jest_core.choices import Loss
from jest_core.models import outlines
from jest_core.run_file import Model, Run

_ADAMW = 14  # operations a parameter: two moments, their corrections, decay and the update itself


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one pair's forward pass through each tower."""

    image: float
    text: float

    @property
    def total(self) -> float:
        return self.image + self.text


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step, all learners together."""

    score: float  # the learner's forward over the super-batch
    reference: float  # the reference's, where it is not cached
    select: float  # matrix products of the conditional scores
    train: float  # forward and backward over the sub-batch, and what of it is computed twice to save memory
    loss: float  # matrix products of its logits and their gradients
    optimizer: float  # once, though every learner computes it
    reusable: float  # of `score`: what the selected need again in `train`
    agreement: float = 0.0  # scoring and selecting once more at full resolution, spread over the steps between

    @property
    def total(self) -> float:
        """As executed: the scoring forward is not reused."""
        return self.score + self.reference + self.select + self.train + self.loss + self.optimizer + self.agreement

    @property
    def total_with_reuse(self) -> float:
        """As in the 233 % of the paper's Table 1: the selected examples' scoring forward is counted once."""
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
    """The cost of one step. For a uniform step super_batch_size equals sub_batch_size, and nothing is scored.

    forward, score_forward, low_forward, reference_forward: FLOPs of one pair through the learner at full resolution, as
    it scores (at full resolution unless given), and at the low resolution of n_low_resolution examples of the
    sub-batch; and through the reference, 0 where its scores are cached. n_reusable: how many of the sub-batch are
    trained as they were scored; all, or none where score_forward is given. n_recomputed: how often the training
    forward is computed again in the backward pass. widths: of the embeddings that are scored (learner, reference);
    loss_width: of the learner's.

    The matrix products of selection are 2 directions x 2 B n D a model and chunk, for all chunks but the last; against
    that only the b selected are multiplied, for the score of the set. Those of the loss are the logits (twice for the
    softmax) and the gradients of both sides, 2 b b D each.
    """
    b = sub_batch_size
    train = (3.0 + n_recomputed) * (forward * (b - n_low_resolution) + low_forward * n_low_resolution)
    loss_products = (4.0 if loss == "softmax" else 3.0) * 2 * b * b * loss_width
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
    scores = selection.method != "uniform"
    reference_forward = 0.0
    if scores and run.uses_reference and not run.reads_scores and reference is not None:
        sizes = reference.score_image_size, reference.score_patch_size
        reference_forward = forward_flops(reference.model, *sizes).total
    own = (None, None)
    as_scored = selection.score_image_size, selection.score_patch_size
    as_low = (low.image_size, low.patch_size) if low else own
    n_low, full = run.n_low_resolution, forward_flops(run.model).total
    models = [
        *([run.model] if run.uses_learner else []),
        *([reference.model] if run.uses_reference and reference is not None else []),
    ]
    step = training_flops(
        forward=full,
        sub_batch_size=run.sub_batch_size,
        super_batch_size=run.super_batch_size,
        n_chunks=1 if selection.method == "independent" else selection.n_chunks,
        widths=tuple(outlines.width(model.name) for model in models) if scores else (),
        reference_forward=reference_forward,
        score_forward=forward_flops(run.model, *as_scored).total if run.uses_learner else 0.0,
        low_forward=forward_flops(run.model, *as_low).total if low else 0.0,
        n_low_resolution=n_low,
        n_reusable=n_low * (as_scored == as_low) + (run.sub_batch_size - n_low) * (as_scored == own),
        n_recomputed=(training.micro_batch_size is not None) + training.activation_checkpointing,
        loss=training.loss,
        loss_width=outlines.width(run.model.name),
        n_parameters=n_parameters(run.model),
    )
    if not scores or not selection.agreement_every_steps:
        return step
    once_more = full * run.super_batch_size + step.select
    return replace(step, agreement=once_more / selection.agreement_every_steps)


def forward_flops(model: Model, image_size: int | None = None, patch_size: int | None = None) -> ForwardFlops:
    """FLOPs of one pair's forward through both towers, at the model's own resolution unless another is given."""
    return ForwardFlops(*outlines.forward_flops(model.name, model.context_length, image_size, patch_size))


def n_parameters(model: Model) -> int:
    """Of both towers, logit_scale and logit_bias."""
    return int(outlines.n_parameters(model.name, model.context_length))
