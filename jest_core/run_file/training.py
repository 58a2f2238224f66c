"""The part `training`: the learner's optimisation, its processes, checkpoints and limits."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from jest_core.choices import Loss, Schedule, Tracker
from jest_core.run_file.parts import Circumstance, Part, Unit


class Augmentation(Part):
    """Random views of pictures in the training pass; scoring always sees the plain view."""

    shift_pixels: Annotated[NonNegativeInt, Unit("pixels")] = 0
    """Largest random shift of a picture along each side, in pixels at the model's image size. 0: no shift."""

    colour: float = Field(default=0.0, ge=0, lt=1)
    """Largest relative random change of colour channels and brightness. 0: none."""


class LowResolution(Part):
    """FlexiJEST: a random share of each sub-batch is trained at another resolution than the model's own."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Share of each sub-batch that is trained at this resolution, drawn anew in every step."""

    image_size: Annotated[PositiveInt | None, Unit("pixels")] = None
    """Side of these pictures, in pixels. If not given, the model's image size; then `patch_size` is needed."""

    patch_size: Annotated[PositiveInt | None, Unit("pixels")] = None
    """Side of a ViT's patches on these pictures, in pixels. If not given, the model's patch size; then `image_size` is
    needed."""


class LearnerRange(Part):
    """A number of learners that follows the cluster: fewer while nodes are missing, and more from a checkpoint on, once
    there is room for them. Of the numbers from `min` to `max` those count that divide the batches."""

    min: PositiveInt = Field(examples=[1])
    """Smallest number of learners; a run without room for so many waits."""

    max: PositiveInt = Field(examples=[8])
    """Number of learners that the run asks for. It divides the batches."""

    wait_minutes: Annotated[NonNegativeFloat, Unit("minutes")] = 5
    """How long a run that starts, or whose learners were lost, waits for room for all of them before it goes on with
    fewer."""


class Training(Part):
    """How the learner is trained: batch size, budget, AdamW, precision, learners, checkpoints, and what ends a run."""

    sub_batch_size: Annotated[PositiveInt, Unit("examples")] = Field(examples=[1024])
    """Batch size b: number of examples that a step trains on, all learners together. The super-batch has b / (1 -
    selection.filter_ratio) examples."""

    initial_checkpoint: str | None = Field(default=None, examples=["runs/uniform", "weights/open_clip_model.pt"])
    """Checkpoint with the weights that the learner starts with: a file, a run directory, of which the newest
    checkpoint is read, or a folder as open_clip and Hugging Face have them. If not given, the learner starts with
    fresh weights, or those of model.pretrained."""

    examples_trained: Annotated[PositiveInt, Unit("examples")] = Field(examples=[1_024_000])
    """Training budget: number of examples trained on, repeats included. It is a multiple of sub_batch_size, and their
    quotient is the number of steps. Examples seen are 1 / (1 - selection.filter_ratio) times as many."""

    n_learners: Circumstance[PositiveInt | LearnerRange] = Field(default=1, examples=[8, {"min": 2, "max": 8}])
    """Number of learners: processes of Ray Train that train together, each on its share of the batch. A range, where
    nodes come and go."""

    gpus_per_learner: Circumstance[Annotated[NonNegativeFloat, Unit("GPUs")]] = 0
    """GPUs of each learner: 1, or 0 to train on CPUs."""

    shard_weights: Circumstance[bool] = False
    """Whether learners share weights, gradients and AdamW's moments among them (FSDP2), instead of each having all
    weights (DistributedDataParallel). For towers that do not fit on one GPU. Not together with `compile`."""

    loss: Loss = "sigmoid"
    """Contrastive loss that is trained: SigLIP's sigmoid loss, or CLIP's softmax loss (no logit_bias)."""

    learning_rate: PositiveFloat = Field(examples=[1.0e-3])
    """Peak learning rate of AdamW, after the warm-up."""

    schedule: Schedule = "cosine"
    """Learning-rate schedule after the warm-up. cosine: half a cosine to zero. rsqrt: inverse square root of the steps.
    constant: the peak. A run of rsqrt or constant can be made longer."""

    warmup_steps: Annotated[NonNegativeInt, Unit("steps")] = Field(examples=[100])
    """Number of steps in which the learning rate rises linearly to its peak."""

    cooldown_steps: Annotated[NonNegativeInt, Unit("steps")] = 0
    """Number of last steps in which the learning rate goes linearly to zero. Of the schedules rsqrt and constant."""

    timescale_steps: Annotated[PositiveInt, Unit("steps")] = 10_000
    """Time scale of the schedule rsqrt: steps after the warm-up until the learning rate is 1 / sqrt(2) of its peak."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's beta1: decay of the first moment, the mean of gradients."""

    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's beta2: decay of the second moment, the mean of squared gradients."""

    eps: PositiveFloat = 1e-8
    """AdamW's epsilon: added to the root of the second moment."""

    weight_decay: NonNegativeFloat = Field(examples=[1.0e-4])
    """AdamW's weight decay, of weight matrices only: not of biases, gains, logit_scale and logit_bias."""

    gradient_clip: PositiveFloat | None = 1.0
    """Largest norm of the gradients, over all learners; larger ones are scaled down. null: no gradient clipping."""

    augmentation: Augmentation = Augmentation()
    """Random shifts and colours of pictures in the training pass. If not given, none."""

    low_resolution: LowResolution | None = None
    """FlexiJEST: the share of each sub-batch that is trained at another resolution. If not given, all is trained at the
    model's own."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the training pass: fp32, or autocast to bf16. Weights, loss and update are float32 in both."""

    compile: Circumstance[bool] = False
    """Whether both towers are compiled with torch.compile, for scoring and training."""

    micro_batch_size: Circumstance[Annotated[PositiveInt | None, Unit("examples")]] = None
    """Number of a learner's examples whose activations are in memory at a time. Gradients stay those of the whole
    sub-batch, for a third more training FLOPs. If not given, all of the learner's examples."""

    activation_checkpointing: Circumstance[bool] = False
    """Whether activations are recomputed in the backward pass, layer by layer, instead of kept in memory."""

    score_batch_size: Circumstance[Annotated[PositiveInt, Unit("examples")]] = 256
    """Number of a learner's examples that are scored in one forward pass."""

    loss_tile: Circumstance[Annotated[PositiveInt, Unit("rows")]] = 1024
    """Number of rows of the logit matrix that are in memory at a time, in the loss."""

    checkpoint_every_steps: Circumstance[Annotated[PositiveInt, Unit("steps")]] = Field(examples=[100])
    """How often a checkpoint is written, in steps. The last step always writes one."""

    checkpoint_every_minutes: Circumstance[Annotated[PositiveFloat | None, Unit("minutes")]] = None
    """How often a checkpoint is written, in minutes, besides those of `checkpoint_every_steps`. If not given, by steps
    only."""

    keep_last_checkpoints: Circumstance[PositiveInt | None] = None
    """Number of newest checkpoints that are kept; older ones are removed. If not given, all are kept."""

    keep_checkpoint_every_steps: Circumstance[Annotated[PositiveInt | None, Unit("steps")]] = None
    """Of the older checkpoints, those are kept whose step is a multiple of this. It needs `keep_last_checkpoints`, and
    is a multiple of `checkpoint_every_steps`. If not given, all older ones are removed."""

    hang_minutes: Circumstance[Annotated[PositiveFloat, Unit("minutes")]] = 60
    """Minutes without a step after which a run whose learners are processes of their own counts as hung and ends."""

    max_loss: Circumstance[Annotated[PositiveFloat | None, Unit("nats")]] = None
    """Largest training loss, in nats: a step above it ends the run, as NaN always does. If not given, no limit."""

    report_to: Circumstance[list[Tracker]] = Field(default=[], examples=[["tensorboard", "wandb"]])
    """Experiment trackers that get the metrics, beside metrics.jsonl and Ray's Prometheus endpoint."""

    n_refused_logged: Annotated[NonNegativeInt, Unit("examples")] = 16
    """Number of examples that were not selected, sampled into the selection log at each step."""

    max_failures: Circumstance[int] = Field(default=3, ge=-1)
    """How often learners that fail are started again, before the run ends. Learners whose node is taken away, with
    notice, do not count. -1: without limit."""

    @property
    def max_learners(self) -> int:
        """The number of learners, or the largest one of a range."""
        return self.n_learners.max if isinstance(self.n_learners, LearnerRange) else self.n_learners
