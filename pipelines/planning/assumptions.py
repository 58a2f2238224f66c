"""What a plan assumes where nothing is measured, each with its source; prices, which only the user knows."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError


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
    cpus: PositiveInt | None = Field(default=None, title="CPUs that fetch and read, beside the learners' machines")
    urls: PositiveInt | None = Field(default=None, title="rows of the metadata")
    flops_per_second: PositiveFloat | None = Field(default=None, title="what a learner sustains")
    urls_per_cpu_second: PositiveFloat = Field(default=60.0, title="URLs that a CPU asks for each second")
    share_fetched: PositiveFloat = Field(default=0.68, le=1, title="share of URLs that still have a picture")
    read_cpu_ms: PositiveFloat = Field(default=3.8, title="CPU milliseconds to read and decode an example")
    requests_per_group: PositiveFloat = Field(default=6.0, title="requests for each row group that is read")


SOURCES = {
    "urls_per_cpu_second": "reported for img2dataset: 60 to 64 on each core (rom1504/img2dataset, issue 400)",
    "share_fetched": "reported there for LAION-400M in 2024: 0.67 to 0.68; about 1 % less each month (issue 277)",
    "read_cpu_ms": "measured: JPEGs of 512 pixels (benchmarks.md, python -m tests.benchmarks.bench_data)",
    "requests_per_group": "a guess: pictures 1, index and scores 5",
    "months": "a guess",
}


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
        known = ", ".join(Assumptions.model_fields)
        raise ValueError(f"--assume {name}: {first['msg'].lower()}; the keys are {known}") from None


def source(assumptions: Assumptions, name: str) -> str:
    """Where a value comes from."""
    return "given" if name in assumptions.model_fields_set else SOURCES.get(name, "not given")
