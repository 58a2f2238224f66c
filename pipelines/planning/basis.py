"""What the plan of a run follows from: the run file, its catalogue or metadata, the machines, and what is assumed."""

from dataclasses import dataclass
from functools import cached_property

from botocore.exceptions import BotoCoreError

from jest_core import run_file
from jest_core.run_file import Run

from ..base import in_parallel, shard_paths
from ..data.layouts import open_shard
from .assumptions import Assumptions
from .calibrate import Machine
from .machines import Machines
from .sizes import Pairs

_MOST_FOOTERS = 64  # files of metadata whose rows are counted; the others are taken to have as many


@dataclass(frozen=True)
class Basis:
    """What the costs of a run follow from."""

    run: Run
    pairs: Pairs | None
    assumed: Assumptions
    machine: Machine | None = None
    manifest: Machines | None = None
    reference_run: Run | None = None

    @property
    def cpus(self) -> float | None:
        """CPUs that fetch and read; None where only the learners' machines are there, or their number is not known."""
        return self.assumed.cpus or (self.manifest.reading_cpus if self.manifest else None) or None

    @cached_property
    def urls(self) -> int | None:
        """Rows of the metadata, as given or as its files say."""
        return self.assumed.urls or n_urls(self.run)

    def rate(self, *parts: str) -> float | None:
        """FLOPs a second of one learner in the first of these parts that was measured, else as given."""
        measured = self.machine.flops_per_second if self.machine else {}
        return next((measured[part] for part in parts if part in measured), self.assumed.flops_per_second)


def n_urls(run: Run) -> int | None:
    """Rows of the metadata, by the footers of its files; None where there is none, or it cannot be read from here."""
    if run.ingest is None:
        return None
    columns = run.ingest.columns
    try:
        patterns = run_file.sources(run.ingest.urls)
        paths = [path for pattern in patterns for path in shard_paths.expand([pattern], run.path(""))]
        looked_at = paths[:_MOST_FOOTERS]
        n_rows = sum(in_parallel.read_each(lambda path: sum(open_shard(path, columns).row_group_sizes), looked_at))
        return round(n_rows * len(paths) / len(looked_at))
    except (ValueError, OSError, BotoCoreError):
        return None


def n_pairs(basis: Basis, used: set[str]) -> float | None:
    """Pairs of an epoch: by the catalogue, or those URLs that may still have a picture."""
    if basis.pairs is not None:
        return float(basis.pairs.n_slots)
    if basis.urls is None or basis.run.ingest is None:
        return None
    used.add("share_fetched")
    return basis.urls * basis.assumed.share_fetched
