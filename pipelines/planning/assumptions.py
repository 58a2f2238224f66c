"""What a plan assumes where nothing is measured, each with its source; prices, which only the user knows."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from . import unit_costs


class Assumptions(BaseModel):
    """Given by `jest plan --assume KEY=VALUE`. A price is in any currency, and None where nobody gave it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learner_hour: NonNegativeFloat | None = Field(
        default=None, title="price of an hour of one learner's share of a machine"
    )
    cpu_hour: NonNegativeFloat | None = Field(default=None, title="price of an hour of one CPU that fetches and reads")
    gb_month: NonNegativeFloat | None = Field(default=None, title="price of a GB (1e9 bytes) stored for a month")
    thousand_requests: NonNegativeFloat | None = Field(
        default=None, title="price of 1,000 requests to the object storage"
    )
    months: PositiveFloat = Field(default=1.0, title="for which the data is kept")
    cpus: PositiveInt | None = Field(default=None, title="CPUs that fetch and read")
    urls: PositiveInt | None = Field(default=None, title="rows of the metadata")
    flops_per_second: PositiveFloat | None = Field(default=None, title="what a learner sustains")
    urls_per_cpu_second: PositiveFloat = Field(default=60.0, title="URLs that a CPU asks for each second")
    share_fetched: PositiveFloat = Field(default=0.68, le=1, title="share of URLs that still have a picture")
    read_cpu_ms: PositiveFloat | None = Field(
        default=None, title="CPU milliseconds to read, decode and tokenise an example, in place of the parts"
    )
    picture_size: PositiveInt | None = Field(default=None, title="shorter side of the shards' pictures, in pixels")
    picture_aspect: PositiveFloat = Field(default=1.33, ge=1, title="longer over shorter side of the shards' pictures")
    tokens_ms: NonNegativeFloat = Field(default=unit_costs.TOKENS_MS, title="CPU milliseconds of a caption's tokens")
    shard_ms: NonNegativeFloat = Field(
        default=unit_costs.READ_MS, title="CPU milliseconds of an example beside decoding, tokens and scores"
    )
    store_ms: NonNegativeFloat = Field(
        default=unit_costs.STORE_MS, title="CPU milliseconds to put a MB into Ray's object store"
    )
    send_ms: NonNegativeFloat = Field(
        default=unit_costs.SEND_MS, title="CPU milliseconds of Ray to send a MB to another machine"
    )
    receive_ms: NonNegativeFloat = Field(
        default=unit_costs.RECEIVE_MS, title="CPU milliseconds of Ray to receive a MB from another machine"
    )
    receive_threads: PositiveInt | None = Field(
        default=None, title="threads with which Ray receives objects on each machine that computes"
    )
    copy_ms: NonNegativeFloat = Field(
        default=unit_costs.COPY_MS, title="milliseconds of a learner's one thread that copies a MB of examples"
    )
    learner_gbits: PositiveFloat | None = Field(default=None, title="Gbit/s that each machine with learners receives")
    data_gbits: PositiveFloat | None = Field(default=None, title="Gbit/s that each other machine that reads sends")
    storage_gbits: PositiveFloat | None = Field(default=None, title="Gbit/s that the storage delivers")
    requests_per_group: PositiveFloat = Field(default=6.0, title="requests for each row group that is read")


SOURCES = {
    "urls_per_cpu_second": "reported for img2dataset: 60 to 64 on each core (rom1504/img2dataset, issue 400)",
    "share_fetched": "reported there for LAION-400M in 2024: 0.67 to 0.68; about 1 % less each month (issue 277)",
    "receive_threads": "Ray's: a quarter of a node's CPUs, 2 to 8, unless RAY_object_manager_rpc_threads_num is set",
    "picture_size": "by ingest.image_size, else 512: a guess",
    "picture_aspect": "a guess: 4 to 3",
    **dict.fromkeys(
        ("tokens_ms", "shard_ms", "store_ms", "send_ms", "receive_ms", "copy_ms"),
        "measured: python -m tests.benchmarks.bench_read_costs (reading.md)",
    ),
    "requests_per_group": "a guess: pictures 1, index and scores 5",
    "months": "a guess",
}

BETWEEN = {"learner_gbits", "data_gbits", "receive_threads"}  # of machines, which only --cluster names


def read(words: Sequence[str]) -> Assumptions:
    """KEY=VALUE, ... Raises ValueError for an unknown key, or a value that cannot be."""
    pairs = [word.partition("=") for word in words]
    if bad := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(f"--assume {bad[0]!r} has no '=': write --assume cpu_hour=0.05")
    try:
        return Assumptions.model_validate({name.strip(): value for name, _, value in pairs})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        wrong = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].lower()
        raise ValueError(f"--assume {name}: {wrong}; the keys are {', '.join(Assumptions.model_fields)}") from None


def source(assumptions: Assumptions, name: str) -> str:
    """Where a value comes from."""
    return "given" if name in assumptions.model_fields_set else SOURCES.get(name, "not given")
