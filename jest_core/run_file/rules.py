"""The rules of a catalogue, as a run file names them; pipelines/data/rules.py applies them to shards."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from jest_core.run_file.parts import Part


class StatusRule(Part):
    """Keep rows that img2dataset fetched: status == success."""

    rule: Literal["status"]


class UnsafeRule(Part):
    """Keep rows whose unsafe probability (punsafe, or an alias of it) is below a bound; unknown values are dropped."""

    rule: Literal["unsafe"]
    below: float = Field(default=0.5, gt=0, le=1)


class NsfwRule(Part):
    """Keep rows whose NSFW label (LAION: UNLIKELY, UNSURE, NSFW) is one of these; unlabelled rows are dropped."""

    rule: Literal["nsfw"]
    keep: list[str] = Field(default=["UNLIKELY"])


class WatermarkRule(Part):
    """Keep rows whose watermark probability (pwatermark, or an alias) is below a bound; unknown values are dropped."""

    rule: Literal["watermark"]
    below: float = Field(default=0.8, gt=0, le=1)


class DenyRule(Part):
    """Drop rows that a list names: text (one a line), Parquet (its first column), or DataComp's .npy of uids.

    The list is held as 64-bit hashes, 8 bytes an entry, once on each node.
    """

    rule: Literal["deny"]
    file: str
    by: Literal["uid", "url", "hash"] = "uid"


class SizeRule(Part):
    """Keep pictures by their original width and height; unknown sizes are dropped."""

    rule: Literal["size"]
    min_side: NonNegativeInt = 0  # pixels
    max_aspect: PositiveFloat | None = None  # longer side over shorter side


class CaptionRule(Part):
    """Keep rows whose caption has at least so many words (split on white space) and characters."""

    rule: Literal["caption"]
    min_words: NonNegativeInt = 1
    min_characters: NonNegativeInt = 1


class LanguageRule(Part):
    """Keep rows in one of these languages: as a column names them, or as fastText's model tells from the caption."""

    rule: Literal["language"]
    keep: list[str] = Field(default=["en"])
    detect: bool = False  # by fastText's lid.176 (pip install jest[language]) instead of a column
    model_file: str | None = None  # a local lid.176.bin; else the compressed model that comes with the package


class SimilarityRule(Part):
    """Keep rows whose image-text similarity, in a column of the shards, is at least so much."""

    rule: Literal["similarity"]
    at_least: float
    column: str = "similarity"


class ScoreRule(Part):
    """Keep rows whose score is at least so much, or the best share of them; what has no score is dropped.

    A column of a score cache, which was made for the catalogue that is refined (data.refines): cosine,
    matched_pair_loss, or what a scorer wrote. Without `scores`, a numeric column of the shards.
    """

    rule: Literal["score"]
    column: str = "cosine"
    at_least: float | None = None
    keep_share: float | None = Field(default=None, gt=0, le=1)  # of the scored rows, ties kept; needs `scores`
    scores: str | None = None  # directory that `jest reference-scores` wrote

    @model_validator(mode="after")
    def _one_threshold(self) -> "ScoreRule":
        if (self.at_least is None) == (self.keep_share is None):
            raise ValueError("the rule `score` takes one of at_least and keep_share")
        if self.keep_share is not None and self.scores is None:
            raise ValueError("keep_share counts among the scored rows of a score cache: name it in `scores`")
        return self


class SubsetRule(Part):
    """Keep the uids of a DataComp subset (.npy of dtype u8,u8), or those that another catalogue keeps (of DataComp's
    metadata, say). A uid that stands there m times comes m times an epoch. 16 bytes an entry, once on each node."""

    rule: Literal["subset"]
    file: str


class DuplicateRule(Part):
    """Of the rows that all other rules keep and that agree in these columns, keep the first, over all shards."""

    rule: Literal["duplicate"]
    by: list[str] = Field(default=["uid"], min_length=1)


Rule = Annotated[
    StatusRule
    | UnsafeRule
    | NsfwRule
    | WatermarkRule
    | DenyRule
    | SizeRule
    | CaptionRule
    | LanguageRule
    | SimilarityRule
    | ScoreRule
    | SubsetRule
    | DuplicateRule,
    Field(discriminator="rule"),
]

# What {rule: basic_filter} stands for: DataComp's baseline of that name
BASIC_FILTER = (
    {"rule": "language", "keep": ["en"], "detect": True},
    {"rule": "caption", "min_words": 3, "min_characters": 6},
    {"rule": "size", "min_side": 200, "max_aspect": 3.0},
)
