"""The part `selection`: how a sub-batch is chosen from a super-batch."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from jest_core.choices import METHODS, Criterion, Draw, ForwardPrecision, Loss, Method, Precision
from jest_core.run_file.parts import Part, Unit


class Selection(Part):
    """How the sub-batch that a step trains on is selected from its super-batch (Algorithm 1 of the paper)."""

    method: Method = Field(examples=["joint"])
    """Selection method. joint: JEST, chunk by chunk, each chunk conditioned on those before. independent: by the scores
    of single pairs. uniform: no selection, every example of the data is trained on."""

    criterion: Criterion = "learnability"
    """What a score is. learnability: learner loss minus reference loss. hard: learner loss. easy: minus reference
    loss."""

    loss: Loss = "sigmoid"
    """Contrastive loss by which learner and reference are scored: SigLIP's sigmoid loss or CLIP's softmax loss. It may
    be another than training.loss."""

    filter_ratio: float = Field(default=0.8, ge=0, lt=1)
    """Share of each super-batch that is filtered out: 1 - b / B. At 0.8 the super-batch is five times the sub-batch."""

    n_chunks: PositiveInt = 16
    """Number of chunks in which joint selection draws the sub-batch. training.sub_batch_size is a multiple of it."""

    draw: Draw = "sample"
    """How examples are drawn by their scores. sample: at random, with probability proportional to exp(gain * score).
    top_k: those with the highest scores, without randomness."""

    gain: PositiveFloat = 1.0
    """Multiplier of the scores in a draw, an inverse temperature. The paper has 1.0."""

    precision: Precision = "exact"
    """Precision of the selection's sums. exact: float32. fast: products of bfloat16, for GPUs."""

    score_image_size: Annotated[PositiveInt | None, Unit("pixels")] = None
    """Side of the pictures that the learner scores, in pixels (FlexiJEST). If not given, the model's image size."""

    score_patch_size: Annotated[PositiveInt | None, Unit("pixels")] = None
    """Side of the patches in which the learner, a ViT, scores pictures, in pixels (FlexiJEST). If not given, the
    model's patch size."""

    score_precision: ForwardPrecision = "fp32"
    """Precision of the learner's forward pass in scoring: fp32, or autocast to bf16 or fp16."""

    agreement_every_steps: Annotated[NonNegativeInt, Unit("steps")] = 0
    """How often scoring at low resolution is compared with scoring at full resolution, in steps. Metrics then have
    jest/score_spearman and jest/selection_overlap. 0: never."""

    @property
    def selects(self) -> bool:
        """Whether sub-batches are selected from larger super-batches, which uniform batches are not."""
        return METHODS[self.method].selects

    @property
    def n_draws(self) -> int:
        """How many chunks of a sub-batch are drawn one after the other."""
        return METHODS[self.method].n_draws(self.n_chunks)
