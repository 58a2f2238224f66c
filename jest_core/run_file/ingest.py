"""The part `ingest`: how lists of URLs become image shards."""

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from jest_core.run_file.parts import Part, Unit
from jest_core.run_file.rules import Rule, ScoreRule

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]


def network_of(entry: str) -> Network | None:
    """A network or address of ingest.private_addresses; None where it names a host."""
    try:
        return ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return None


class Ingest(Part):
    """How `jest ingest` downloads lists of URLs into image shards, with img2dataset.

    What is not among these keys is img2dataset's default.
    """

    urls: str | list[str] = Field(examples=["metadata/*.parquet"])
    """Metadata with URLs and captions, of LAION, DataComp, COYO or the like: Parquet files or folders of them, as
    paths, globs and brace ranges."""

    columns: dict[str, str] = Field(default={}, examples=[{"url": "image_link", "caption": "alt"}])
    """Names of the metadata's columns, as in data.columns: jest's name of a column, then the metadata's."""

    rules: list[Rule] = Field(default=[])
    """Rules by which rows are kept before anything is downloaded. Not `status`, `duplicate`, or `score` by a score
    cache, which need shards. If not given, all URLs are downloaded."""

    shards: str = Field(examples=["shards"])
    """Directory of the image shards, which `jest ingest` writes. data.shards names what is in it."""

    output_format: Literal["webdataset", "parquet"] = "webdataset"
    """Format of the shards: tar files (webdataset), or Parquet."""

    rows_per_shard: Annotated[PositiveInt, Unit("rows")] = 10_000
    """Number of URLs of a shard. It has fewer pictures, as some URLs fail."""

    image_size: Annotated[PositiveInt, Unit("pixels")] = 512
    """Side to which pictures are resized, in pixels; resize_mode says which side."""

    resize_mode: ResizeMode = "keep_ratio_largest"
    """How pictures are resized, in img2dataset's words. no: not at all. keep_ratio: the shorter side to image_size.
    keep_ratio_largest: the longer side. center_crop: the shorter side, and the centre cropped. border: the longer side,
    and the rest padded."""

    resize_only_if_bigger: bool = True
    """Whether pictures smaller than image_size stay as they are, instead of being enlarged."""

    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    """Format in which pictures are stored."""

    encode_quality: NonNegativeInt | None = None
    """Quality of jpg and webp, up to 100, or compression of png, 0 to 9. If not given, 95, and 6 of png."""

    blur_boxes: str | None = Field(default=None, examples=["face_bboxes"])
    """Column of the metadata with boxes that are blurred, such as DataComp's face_bboxes. If not given, nothing is
    blurred."""

    verify_hash: bool = False
    """Whether pictures are refused whose SHA-256 is not that of the metadata's column sha256."""

    opt_out: list[str] = Field(
        default=["noai", "noimageai", "noindex", "noimageindex"], examples=[["noai", "noimageai"]]
    )
    """Directives of the HTTP header X-Robots-Tag by which an owner opts out: such pictures are not downloaded."""

    user_agent_token: str | None = Field(default=None, examples=["my-lab"])
    """Token of the HTTP user agent, to which directives of `opt_out` may be addressed. If not given, only directives to
    all user agents count."""

    threads: PositiveInt = 128
    """Number of download threads of each task."""

    n_tasks: PositiveInt | None = None
    """Number of Ray tasks that download at the same time, each a shard and a CPU. If not given, one a core of this
    machine, or one for each CPU of a cluster, and as many again that wait, so that an autoscaler starts nodes. Set it
    to the most CPUs that your nodes without GPUs may have: for more it would start a node with GPUs."""

    requests_per_host_per_second: PositiveFloat | None = None
    """Largest rate of requests to one host, per second, of all tasks together. If not given, no limit."""

    timeout_seconds: Annotated[PositiveFloat, Unit("seconds")] = 10
    """Seconds without an answer, or without a further byte, after which a request fails."""

    max_seconds: Annotated[PositiveFloat, Unit("seconds")] = 60
    """Seconds that one picture may take, from the connection to the last byte, over all redirects. The look-up of a
    host's name cannot be cut short."""

    max_bytes: Annotated[PositiveInt, Unit("bytes")] = 50_000_000
    """Largest picture that is downloaded, in bytes."""

    max_pixels: Annotated[PositiveInt, Unit("pixels")] = 89_478_485
    """Largest picture that is decoded, width times height as its header says; and the largest that one is enlarged
    to."""

    retries: NonNegativeInt = 0
    """How often a failed request is repeated at once. `jest ingest --retry-failed` tries again later."""

    private_addresses: bool | list[str] = Field(default=False, examples=[["10.20.0.0/16", "images.intranet"]])
    """Whether a URL may lead into a private network, or to the machine itself; or the networks and hosts to which it
    may. Other such requests are refused, and in any case those to the metadata of a cloud's machines."""

    @field_validator("private_addresses")
    @classmethod
    def _networks_or_hosts(cls, value: bool | list[str]) -> bool | list[str]:
        for entry in [] if isinstance(value, bool) else value:
            if network_of(entry) is None and not re.fullmatch(r"[\w-]+(\.[\w-]+)*", entry):
                raise ValueError(
                    f"private_addresses has {entry!r}, which is no network, address or host: write 10.20.0.0/16, or "
                    "the host's name alone"
                )
        return value

    @field_validator("shards")
    @classmethod
    def _without_a_slash_at_its_end(cls, directory: str) -> str:
        return directory.rstrip("/")

    @property
    def quality(self) -> int:
        """encode_quality, or what goes with the format."""
        return self.encode_quality if self.encode_quality is not None else 6 if self.encode_format == "png" else 95

    @field_validator("resize_mode", mode="before", json_schema_input_type=ResizeMode | Literal[False])
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
