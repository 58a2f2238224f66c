"""The run file: typed parts, every derived size. A run file is complete; unknown keys are errors; paths that are
neither absolute nor URLs lie under `root`."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from jest_core import consistency
from jest_core.choices import Criterion, Draw, ForwardPrecision, Loss, Precision, Schedule, Tracker
from jest_core.rules import BASIC_FILTER, Part, Rule, ScoreRule


class Data(Part):
    shards: str | list[str]  # .parquet, .tar, folders of either: paths, globs, braces; several sources joined by ::
    weights: list[PositiveFloat] | None = None  # how often an epoch each source comes; once each if not given
    columns: dict[str, str] = Field(
        default={}
    )  # jest's name of a column -> the shards', where the usual names do not find it
    catalogue: str  # directory that `jest catalogue` writes
    refines: str | None = None  # a finished catalogue of the same shards, whose drops stay
    rules: list[Rule]  # applied in this order; the first that drops a row is named in the audit
    n_streams: PositiveInt  # canonical streams of the order; not the number of learners
    window_rows: PositiveInt  # rows of a stream that are read and shuffled together
    max_bad_share: float = Field(default=0.01, ge=0, le=1)  # of a shard's rows that may not decode
    decode: Literal["eager", "late"] = "eager"  # late: all at selection.score_image_size, the selected at the model's
    replay: str | None = None  # run directory: train on what it selected, step by step, and score nothing
    mask_duplicates: Literal["none", "uid", "image"] = "none"  # of equal slots of a super-batch, only one is selectable

    @field_validator("rules", mode="before")
    @classmethod
    def _expand_basic_filter(cls, rules: Any) -> Any:
        if not isinstance(rules, list):
            return rules
        return [x for r in rules for x in (BASIC_FILTER if r == {"rule": "basic_filter"} else (r,))]

    @field_validator("rules")
    @classmethod
    def _duplicates_come_last(cls, rules: list[Rule]) -> list[Rule]:
        if any(rule.rule == "duplicate" for rule in rules[:-1]):
            raise ValueError("the rule `duplicate` must come last: it keeps one of the rows that all others keep")
        return rules

    @property
    def sources(self) -> list[str]:
        """The patterns of data.shards, one per source."""
        return sources(self.shards)


class Ingest(Part):
    """How lists of URLs become image shards. Whatever is not listed here is img2dataset's default."""

    urls: str | list[str]  # metadata of LAION, DataComp, COYO or the like: Parquet files, folders, globs, braces
    columns: dict[str, str] = Field(default={})  # as in data.columns
    rules: list[Rule] = Field(default=[])  # which rows are fetched at all
    shards: str  # directory of the shards
    output_format: Literal["webdataset", "parquet"] = "webdataset"
    rows_per_shard: PositiveInt = 10_000
    image_size: PositiveInt = 512
    resize_mode: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = "keep_ratio_largest"
    resize_only_if_bigger: bool = True
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: NonNegativeInt | None = None  # 95; of png its compression, 0 to 9, 6
    blur_boxes: str | None = None  # a column of boxes to blur, such as DataComp's face_bboxes
    verify_hash: bool = False  # refuse pictures whose sha256 is not that of the metadata
    opt_out: list[str] = Field(default=["noai", "noimageai", "noindex", "noimageindex"])  # X-Robots-Tag directives
    user_agent_token: str | None = None  # sent along, and what directives may be addressed to
    threads: PositiveInt = 128  # of each task
    n_tasks: PositiveInt | None = None  # at once; one for each two CPUs of a cluster, one a core here
    requests_per_host_per_second: PositiveFloat | None = None  # by all tasks together
    timeout_seconds: PositiveFloat = 10  # without an answer, or a further byte
    max_seconds: PositiveFloat = 60  # of one picture's bytes, once they begin to come
    max_bytes: PositiveInt = 50_000_000  # of one picture, as it is fetched
    retries: NonNegativeInt = 0  # at once; `jest ingest --retry-failed` tries again later
    private_addresses: bool = False  # whether a URL may lead into a private network, or to this machine

    @field_validator("shards")
    @classmethod
    def _without_a_slash_at_its_end(cls, directory: str) -> str:
        return directory.rstrip("/")

    @property
    def quality(self) -> int:
        """encode_quality, or what goes with the format."""
        return self.encode_quality if self.encode_quality is not None else 6 if self.encode_format == "png" else 95

    @field_validator("resize_mode", mode="before")
    @classmethod
    def _yaml_reads_no_as_false(cls, mode: Any) -> Any:
        return "no" if mode is False else mode

    @field_validator("rules")
    @classmethod
    def _of_one_row(cls, rules: list[Rule]) -> list[Rule]:
        for rule in rules:
            if rule.rule in ("status", "duplicate") or (isinstance(rule, ScoreRule) and rule.scores is not None):
                raise ValueError(f"the rule `{rule.rule}` is one of a catalogue (data.rules): no shard is there yet")
        return rules


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
    scorer: str  # fasttext, linear_head, or package.module:factory (jest_core/scorers.py)
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
    batch_size: PositiveInt = 256
    precision: ForwardPrecision = "fp32"
    compile: bool = False  # torch.compile of both towers
    n_actors: PositiveInt | None = None  # as many as there are GPUs for, or cores; none on a small machine without
    gpus_per_actor: NonNegativeFloat = 0
    logit_bias: float | None = None  # for sigmoid scores by a softmax-trained model, which has none


class Selection(Part):
    method: Literal["uniform", "independent", "joint"]
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
    n_learners: PositiveInt = 1
    gpus_per_learner: NonNegativeFloat = 0
    shard_weights: bool = False  # learners hold a share each of weights, gradients and moments (FSDP2)
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
    compile: bool = False  # torch.compile of both towers, for scoring and training
    micro_batch_size: PositiveInt | None = None  # a learner's examples that hold activations at once; all if not given
    activation_checkpointing: bool = False  # hold the activations of one layer at a time
    score_batch_size: PositiveInt = 256  # micro-batch of the scoring pass
    loss_tile: PositiveInt = 1024  # rows of logits held at once
    checkpoint_every_steps: PositiveInt
    checkpoint_every_minutes: PositiveFloat | None = None  # as well
    keep_last_checkpoints: PositiveInt | None = None  # all if not given
    keep_checkpoint_every_steps: PositiveInt | None = None  # of those that would go, keep the steps that this divides
    hang_minutes: PositiveFloat = 60  # without a step of learners in processes of their own, after which the run ends
    max_loss: PositiveFloat | None = None  # nats; above it, as at NaN, the run stops
    report_to: list[Tracker] = Field(default=[])  # beside metrics.jsonl and Ray's own Prometheus endpoint
    n_refused_logged: NonNegativeInt = 16  # refused examples sampled into the log at each step
    max_failures: int = Field(default=3, ge=-1)  # learner restarts by Ray Train; -1 = no limit


class Pictures(Part):
    """Pictures to evaluate on, with captions or labels.

    format: shards, as they are trained on; folder, a directory for each class, as ImageNet comes; webdataset, a
    directory as CLIP_benchmark lays it out (SPLIT/0.tar, classnames.txt); karpathy, COCO's or Flickr's JSON.
    """

    format: Literal["shards", "folder", "webdataset", "karpathy"] = "shards"
    shards: str | list[str]  # of the other formats their directory, or the JSON file
    split: str = "test"  # of webdataset and karpathy
    images: str | None = None  # of karpathy: the directory that its file names start from
    columns: dict[str, str] = Field(default={})  # of shards, as in data.columns


class FewShot(Part):
    """A linear classifier on frozen features, fitted to a few labelled pictures of each class."""

    pool: Pictures  # where those come from
    classes: str | None = None  # a task of the classes file; those of the set and the pool if not given
    n_shots: PositiveInt = 10
    n_seeds: PositiveInt = 3
    l2: PositiveFloat = 1024.0


class EvaluationSet(Pictures):
    """view: model, as it is trained on; crop, the middle 0.875; squash, the whole picture as a square."""

    name: str
    tasks: list[str] = Field(
        min_length=1
    )  # retrieval, few_shot, zero_shot (classes that come with the set), tasks of the classes file
    few_shot: FewShot | None = None
    view: Literal["model", "crop", "squash"] = "model"


class Evaluation(Part):
    classes: str | None = None  # JSON: task -> {label: column, classes: [{id, names}], templates}
    sets: list[EvaluationSet] = Field(min_length=1)
    batch_size: PositiveInt = 512
    every_steps: NonNegativeInt = 0  # in the training loop as often as that; 0 = `jest evaluate` does it
    canonical_prompts: bool = False  # lower case, no punctuation
    gpus: NonNegativeFloat = 0  # of each of the tasks that `jest evaluate` runs on a cluster


# What may change between a run and its resume: where and how it runs, not what it computes
_CIRCUMSTANCES = {
    "n_learners",
    "gpus_per_learner",
    "shard_weights",
    "max_failures",
    "max_loss",
    "hang_minutes",
    "report_to",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "keep_last_checkpoints",
    "keep_checkpoint_every_steps",
    "score_batch_size",
    "loss_tile",
    "micro_batch_size",
    "activation_checkpointing",
    "compile",
}


class Run(Part):
    """One run: what `jest STAGE RUN.yaml` reads, and what it saves, resolved, as run.yaml in run_dir."""

    root: str = "."
    run_dir: str
    seed: NonNegativeInt
    ingest: Ingest | None = None
    data: Data
    model: Model
    reference: Reference | None = None
    selection: Selection
    training: Training
    evaluation: Evaluation | None = None
    subset: Subset | None = None

    @property
    def sub_batch_size(self) -> int:
        """b, all learners together."""
        return self.training.sub_batch_size

    @property
    def super_batch_size(self) -> int:
        """B, all learners together; a uniform run's super-batch is its sub-batch."""
        if self.selection.method == "uniform":
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
        return self.selection.method != "uniform" and self.selection.criterion != "hard"

    @property
    def uses_learner(self) -> bool:
        """Whether the learner scores super-batches."""
        return self.selection.method != "uniform" and self.selection.criterion != "easy"

    @property
    def reads_scores(self) -> bool:
        """Whether the reference's embeddings come from its score cache: it may embed in the learner, or not at all."""
        return self.uses_reference and self.reference is not None and not self.reference.online

    def path(self, value: str) -> str:
        """A path of the run file as an absolute path or a URL."""
        return join(self.root, value)

    def identity(self) -> dict[str, Any]:
        """The values that make a run this run, flat, so that a difference can be named: not where and how it runs."""
        flat = {}
        for part, values in self.model_dump(mode="json", exclude={"ingest", "evaluation", "root", "run_dir"}).items():
            for key, value in values.items() if isinstance(values, dict) else [("", values)]:
                if not (part == "training" and key in _CIRCUMSTANCES):
                    flat[f"{part}.{key}".rstrip(".")] = value
        return flat


def sources(shards: str | list[str]) -> list[str]:
    """Patterns of shards, one by one: several are joined by `::`, as in open_clip."""
    return [p for s in ([shards] if isinstance(shards, str) else shards) for p in s.split("::")]


def join(root: str, value: str) -> str:
    """`value` where it is absolute or a URL, else below root; a local result is absolute."""
    if "://" in value or value.startswith("/"):
        return value
    if "://" in root:
        return root.rstrip("/") + "/" + value
    return str(Path(root).absolute() / value)


def load(text: str, overrides: Sequence[str | Mapping[str, Any]] | None = None, source: str = "run file") -> Run:
    """Parse a run file's YAML text. Raises ValueError naming field, value, remedy.

    overrides: each `a.b=c`, c as YAML, or a mapping nested as a run file is; the later win.
    """
    values = parse(text, source)
    for override in overrides or []:
        if isinstance(override, str):
            _override(values, override)
        else:
            values = merged(values, deepcopy(override))
    try:
        run = Run.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{source}:\n" + "\n".join(_explain(e) for e in error.errors())) from None
    run = run.model_copy(update={"root": join("", run.root)})  # workers have other working directories
    if problems := consistency.problems(run):
        raise ValueError(f"{source}:\n" + "\n".join(f"  {line}" for line in problems))
    return run


def parse(text: str, source: str) -> dict[str, Any]:
    """YAML text as keys and values. Raises ValueError where it is something else."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} is not a mapping of keys to values")
    return values


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """values with changes, part by part; a list or a value is replaced whole."""
    out = dict(values)
    for key, change in changes.items():
        old = out.get(key)
        out[key] = merged(old, change) if isinstance(old, Mapping) and isinstance(change, Mapping) else change
    return out


def dump(run: Run) -> str:
    """The resolved run file: every value, the defaults too."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override!r} has no '='; write --set selection.n_chunks=8")
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise ValueError(f"--set {override!r}: {parent!r} is not a part of the run file")
    place[last] = yaml.safe_load(value)


def _explain(error: Any) -> str:
    field = ".".join(str(x) for x in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"  {field} is not a key of a run file; remove it, or correct its spelling"
    if error["type"] == "missing":
        return f"  {field} is missing; a run file is complete"
    return f"  {field} = {error['input']!r}: {error['msg']}"
