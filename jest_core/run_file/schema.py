"""The parts of a run file, and Run, which has them all and every size that follows from them.

A run file is complete, and unknown keys are errors. Paths that are neither absolute nor URLs are below `root`.
"""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from jest_core.choices import (
    CRITERIA,
    METHODS,
    Criterion,
    Draw,
    ForwardPrecision,
    Loss,
    Method,
    Precision,
    Schedule,
    Tracker,
)
from jest_core.run_file.data import Data, Evaluation, Ingest
from jest_core.run_file.parts import Circumstance, Part
from jest_core.run_file.paths import join


class Model(Part):
    """An open_clip model: by name with fresh weights, or with those of a pretrained tag.

    image_mean, image_std, interpolation, resize_mode: those of the tag where not given; 0.5, bicubic and shortest with
    fresh weights.
    """

    name: str  # `open_clip.list_models()`
    pretrained: str | None = None  # one of `open_clip.list_pretrained()`; open_clip downloads it where it runs
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    context_length: PositiveInt | None = None  # tokens of a caption, where not the model's own


class Scorer(Part):
    """A further score of every pair, computed beside its embeddings and stored as the cache's column of that name."""

    name: str = Field(pattern="^[a-z][a-z0-9_]*$")
    scorer: str  # fasttext, linear_head, or package.module:factory (jest_core/models/scorers.py)
    options: dict[str, Any] = Field(default={})  # keyword arguments of the factory; a path is one of the run file's


class Features(Part):
    """Embeddings that another tool computed: DataComp's metadata with its .npz, or clip-retrieval's folder."""

    format: Literal["datacomp", "clip-retrieval"]
    folder: str
    kind: Literal["b32", "l14"] = "l14"  # of DataComp's: by CLIP ViT-B/32 or ViT-L/14
    logit_scale: PositiveFloat = 100.0  # CLIP's at the end of its training
    uid_column: str = "uid"  # of clip-retrieval's metadata


class Reference(Part):
    """The model that pairs are measured against; it keeps its own logit_scale and logit_bias."""

    model: Model
    checkpoint: str | None = None  # a checkpoint file, or a run directory: its newest; not with model.pretrained
    scores: str  # directory that `jest reference-scores` writes
    online: bool = False  # embed in the learner, at every step, instead of reading scores
    score_image_size: PositiveInt | None = None  # pixels a side at which it looks; the model's own if not given
    score_patch_size: PositiveInt | None = None  # of a ViT; its own if not given
    features: Features | None = None  # what to make the scores of, instead of embedding the pictures
    scorers: list[Scorer] = Field(default=[])
    batch_size: Circumstance[PositiveInt] = 256
    precision: ForwardPrecision = "fp32"
    compile: Circumstance[bool] = False  # torch.compile of both towers
    n_actors: Circumstance[PositiveInt | None] = (
        None  # as many as there are GPUs for, or cores; none on a small machine without
    )
    gpus_per_actor: Circumstance[NonNegativeFloat] = 0
    logit_bias: float | None = None  # for sigmoid scores by a softmax-trained model, which has none


class Selection(Part):
    method: Method
    criterion: Criterion = "learnability"
    loss: Loss = "sigmoid"
    filter_ratio: float = Field(default=0.8, ge=0, lt=1)
    n_chunks: PositiveInt = 16
    draw: Draw = "sample"
    gain: PositiveFloat = 1.0  # 1.0 is the paper
    precision: Precision = "exact"  # fast: products of bfloat16
    score_image_size: PositiveInt | None = None  # pixels a side at which the learner scores; the model's if not given
    score_patch_size: PositiveInt | None = None  # of a ViT, as it scores; its own if not given
    score_precision: ForwardPrecision = "fp32"  # of the learner's forward pass as it scores
    agreement_every_steps: NonNegativeInt = 0  # compare with scoring at full resolution as often as that; 0 = never

    @property
    def selects(self) -> bool:
        """Whether sub-batches are selected from larger super-batches, which uniform batches are not."""
        return METHODS[self.method].selects

    @property
    def n_draws(self) -> int:
        """How many chunks of a sub-batch are drawn one after the other."""
        return METHODS[self.method].n_draws(self.n_chunks)


class Subset(Part):
    """What `jest select` writes: the pairs that fixed models would select of the whole catalogue."""

    directory: str
    learner: Reference | None = None  # the model in the learner's place, in the same keys; criterion easy needs none
    cpus_per_task: PositiveFloat = 2  # a task selects from one super-batch
    gpus_per_task: NonNegativeFloat = 0


class Augmentation(Part):
    """Random views of the training pass; scoring always sees the plain view."""

    shift_pixels: NonNegativeInt = 0
    colour: float = Field(default=0.0, ge=0, lt=1)


class LowResolution(Part):
    """FlexiJEST: a random share of each sub-batch is trained at another resolution than the model's own."""

    share: float = Field(default=0.5, gt=0, le=1)
    image_size: PositiveInt | None = None  # pixels a side; the model's own if not given
    patch_size: PositiveInt | None = None  # of a ViT; its own if not given


class Training(Part):
    sub_batch_size: PositiveInt  # b, all learners together
    initial_checkpoint: str | None = None  # file or run directory with the weights that the learner starts with
    examples_trained: PositiveInt  # the budget; examples seen are 1 / (1 - filter_ratio) times as many
    n_learners: Circumstance[PositiveInt] = 1
    gpus_per_learner: Circumstance[NonNegativeFloat] = 0
    shard_weights: Circumstance[bool] = False  # learners hold a share each of weights, gradients and moments (FSDP2)
    loss: Loss = "sigmoid"  # softmax: of a model without logit_bias
    learning_rate: PositiveFloat
    schedule: Schedule = "cosine"
    warmup_steps: NonNegativeInt
    cooldown_steps: NonNegativeInt = 0  # the last so many go linearly to zero; of rsqrt and constant
    timescale_steps: PositiveInt = 10_000  # of rsqrt: steps after the warm-up until 1 / sqrt(2) of the peak
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat
    gradient_clip: PositiveFloat | None = 1.0  # of their norm, over all learners
    augmentation: Augmentation = Augmentation()
    low_resolution: LowResolution | None = None
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward pass; weights, loss and update are float32
    compile: Circumstance[bool] = False  # torch.compile of both towers, for scoring and training
    micro_batch_size: Circumstance[PositiveInt | None] = (
        None  # a learner's examples that hold activations at once; all if not given
    )
    activation_checkpointing: Circumstance[bool] = False  # hold the activations of one layer at a time
    score_batch_size: Circumstance[PositiveInt] = 256  # micro-batch of the scoring pass
    loss_tile: Circumstance[PositiveInt] = 1024  # rows of logits held at once
    checkpoint_every_steps: Circumstance[PositiveInt]
    checkpoint_every_minutes: Circumstance[PositiveFloat | None] = None  # as well
    keep_last_checkpoints: Circumstance[PositiveInt | None] = None  # all if not given
    keep_checkpoint_every_steps: Circumstance[PositiveInt | None] = (
        None  # of those that would go, keep the steps that this divides
    )
    hang_minutes: Circumstance[PositiveFloat] = (
        60  # without a step of learners in processes of their own, after which the run ends
    )
    max_loss: Circumstance[PositiveFloat | None] = None  # nats; above it, as at NaN, the run stops
    report_to: Circumstance[list[Tracker]] = Field(default=[])  # beside metrics.jsonl and Ray's own Prometheus endpoint
    n_refused_logged: NonNegativeInt = 16  # refused examples sampled into the log at each step
    max_failures: Circumstance[int] = Field(default=3, ge=-1)  # learner restarts by Ray Train; -1 = no limit


class Run(Part):
    """One run: what `jest STAGE RUN.yaml` reads, and what it saves, resolved, as run.yaml in run_dir."""

    root: Circumstance[str] = "."
    run_dir: Circumstance[str]
    seed: NonNegativeInt
    ingest: Circumstance[Ingest | None] = None
    data: Data
    model: Model
    reference: Reference | None = None
    selection: Selection
    training: Training
    evaluation: Circumstance[Evaluation | None] = None
    subset: Circumstance[Subset | None] = None

    @property
    def sub_batch_size(self) -> int:
        """b, all learners together."""
        return self.training.sub_batch_size

    @property
    def super_batch_size(self) -> int:
        """B, all learners together; a uniform run's super-batch is its sub-batch."""
        if not self.selection.selects:
            return self.sub_batch_size
        return round(self.sub_batch_size / (1 - self.selection.filter_ratio))

    @property
    def n_low_resolution(self) -> int:
        """How many of a sub-batch's examples are trained at training.low_resolution."""
        low = self.training.low_resolution
        return 0 if low is None else round(low.share * self.sub_batch_size)

    @property
    def n_steps(self) -> int:
        return self.training.examples_trained // self.sub_batch_size

    @property
    def uses_reference(self) -> bool:
        return self.selection.selects and CRITERIA[self.selection.criterion].uses_reference

    @property
    def uses_learner(self) -> bool:
        """Whether the learner scores super-batches."""
        return self.selection.selects and CRITERIA[self.selection.criterion].uses_learner

    @property
    def reads_scores(self) -> bool:
        """Whether the reference's embeddings come from its score cache: it may embed in the learner, or not at all."""
        return self.uses_reference and self.reference is not None and not self.reference.online

    def path(self, value: str) -> str:
        """A path of the run file as an absolute path or a URL."""
        return join(self.root, value)
