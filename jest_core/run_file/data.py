"""The part `data`: which shards a run trains on, which of their rows it keeps, and in which order they come."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from jest_core.choices import Decoder
from jest_core.run_file.parts import Circumstance, Part, Unit
from jest_core.run_file.paths import sources
from jest_core.run_file.rules import Rule, RuleOrBasicFilter, expanded


class Data(Part):
    """The shards that a run trains on, the rules by which `jest catalogue` keeps their rows, and the order of these."""

    shards: str | list[str] = Field(examples=["shards/*.tar", ["laion/{00000..00999}.tar", "coyo/*.parquet"]])
    """Image shards: .parquet, .tar, or folders of either, as paths, globs and brace ranges. Several sources are a list,
    or joined by `::`."""

    weights: list[PositiveFloat] | None = Field(default=None, examples=[[1.0, 0.1]])
    """How often an epoch each source of `shards` comes: 2 is twice, 0.1 a tenth of its rows, each in its turn. If not
    given, each comes once."""

    columns: dict[str, str] = Field(default={}, examples=[{"caption": "my_text"}])
    """Names of columns: jest's name of a column, then the shards'. Only those are needed that the usual names of
    img2dataset, DataComp, LAION and Hugging Face do not cover."""

    catalogue: str = Field(examples=["catalogue"])
    """Directory of the catalogue, which `jest catalogue` writes: the kept rows of all shards, and the audit."""

    refines: str | None = Field(default=None, examples=["catalogue-all"])
    """Finished catalogue of the same shards from whose kept rows this one starts. No picture is read again, and the
    score cache of that catalogue serves this one too. If not given, it starts from all rows."""

    rules: list[Rule] = Field(examples=[[{"rule": "status"}, {"rule": "caption", "min_words": 3}]])
    """Rules by which `jest catalogue` keeps or drops rows, applied in this order. The audit counts each row under the
    first rule that drops it."""

    n_streams: PositiveInt = Field(examples=[16])
    """Number of streams from which super-batches are interleaved; it decides the order of the examples, and does not
    depend on the number of learners. The super-batch size is a multiple of it."""

    window_rows: Annotated[PositiveInt, Unit("rows")] = Field(examples=[1000])
    """Shuffle buffer: number of rows of a stream that are read and shuffled together. Memory grows with it."""

    max_bad_share: Circumstance[float] = Field(default=0.01, ge=0, le=1)
    """Largest share of a shard's rows, of an evaluation set's pictures, or of the pictures of 100 steps of training
    (in a shorter run of its steps, at least of 1,000), that may fail to decode. Above it the command ends with an
    error."""

    max_empty_captions: Circumstance[float] = Field(default=0.5, ge=0, le=1)
    """Largest share of a shard's rows, and of all rows, that `jest catalogue` may keep without a caption. Above it the
    command ends with an error, as the captions may be in another column."""

    decode: Literal["eager", "late"] = "eager"
    """When pictures are decoded. eager: all at the model's image size. late: all at selection.score_image_size, and the
    selected ones again at the model's."""

    decoder: Decoder = "pillow"
    """What makes pixels of encoded pictures, for learner, reference and evaluation alike. pillow: as open_clip does.
    simplejpeg: JPEGs by simplejpeg and resizing by cykooz-resizer, in about half of the time with nearly the same
    pixels; pictures are shown upright (EXIF), transparent ones on white, and 16-bit grey is scaled rather than clipped.
    Score caches are made for one of them: take simplejpeg for a new run that reading limits."""

    read_cpus: Circumstance[PositiveInt | None] = None
    """CPUs of the cluster on which windows are read and decoded for all learners together, at least one for each:
    for a cluster that other jobs share. If not given, all."""

    local_cache: Circumstance[str | None] = Field(default=None, examples=["/mnt/nvme/jest"])
    """Directory on a local disk of each node where bytes of shards are kept for the next epoch and for other tasks of
    the node, in a folder jest-blocks of its own. If not given, nothing is kept."""

    local_cache_gb: Circumstance[Annotated[PositiveFloat, Unit("GB")]] = 100
    """Size that `local_cache` may have on each node; what was used least recently is removed first, and a tenth of the
    disk stays free."""

    replay: str | None = Field(default=None, examples=["runs/joint"])
    """Run directory of another run: train on the examples that it selected, step by step, and score nothing. `jest
    train --replay` sets it. If not given, the run selects by itself."""

    mask_duplicates: Literal["none", "uid", "image"] = "none"
    """Which examples of a super-batch count as duplicates, of which only one can be selected: those with the same uid,
    or with the same image. none: all can be selected."""

    @field_validator("rules", mode="before", json_schema_input_type=list[RuleOrBasicFilter])
    @classmethod
    def _expand_basic_filter(cls, rules: Any) -> Any:
        return [rule for _, rule in expanded(rules)] if isinstance(rules, list) else rules

    @field_validator("rules")
    @classmethod
    def _duplicates_come_last(cls, rules: list[Rule]) -> list[Rule]:
        if any(rule.rule == "duplicate" for rule in rules[:-1]):
            raise ValueError("the rule `duplicate` must come last: it keeps one of the rows that all others keep")
        return rules

    @field_validator("local_cache")
    @classmethod
    def _is_local(cls, directory: str | None) -> str | None:
        if directory is not None and not directory.startswith(("/", "~/")):
            raise ValueError(f"{directory} is no absolute path of a local disk: name one, as /mnt/nvme/jest")
        return directory

    @property
    def sources(self) -> list[str]:
        """The patterns of data.shards, one per source."""
        return sources(self.shards)
