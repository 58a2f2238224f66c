"""The parts of a run file that say where examples come from: to train on, to fetch, and to evaluate on."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from jest_core.run_file.parts import Circumstance, Part
from jest_core.run_file.paths import sources
from jest_core.run_file.rules import BASIC_FILTER, Rule, ScoreRule


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
    max_bad_share: Circumstance[float] = Field(default=0.01, ge=0, le=1)  # of a shard's rows that may not decode
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
