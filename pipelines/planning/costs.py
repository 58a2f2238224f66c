"""Hours, machines and money of each stage of a run, with what limits it and what was assumed."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from botocore.exceptions import BotoCoreError

from jest_core import flops, run_file
from jest_core.run_file import Run

from ..base import checkpoints, in_parallel, shard_paths
from ..base.stage_table import STAGES
from ..data.layouts import open_shard
from . import calibrate, sizes
from .assumptions import Assumptions
from .calibrate import Machine
from .machines import Machines
from .sizes import Pairs

_READ_TASKS = 2  # of each learner, at most
_MOST_FOOTERS = 64  # files of metadata whose rows are counted; the others are taken to have as many


@dataclass(frozen=True)
class Cost:
    """One stage. hours, money: None where something that they need is not known, which `note` names."""

    stage: str
    work: str
    hours: float | None = None
    machines: str = ""
    money: float | None = None
    note: str = ""  # what limits the stage, or what is missing
    unpriced: str = ""  # what the money is without


@dataclass(frozen=True)
class Costs:
    """Of the stages that are not done, of keeping what they make, and of the requests to the storage."""

    lines: list[Cost]
    used: set[str] = field(default_factory=set)  # names of the assumptions behind them

    @property
    def hours(self) -> float:
        return sum(line.hours or 0.0 for line in self.lines)

    @property
    def money(self) -> float:
        return sum(line.money or 0.0 for line in self.lines)

    @property
    def unpriced(self) -> list[str]:
        """Parts of stages whose money is not in the sum."""
        return sorted({line.unpriced for line in self.lines if line.unpriced})

    @property
    def without(self) -> list[str]:
        """Stages whose money is not in the sum."""
        return [line.stage for line in self.lines if line.money is None and line.note != "done"]


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


def costs(basis: Basis) -> Costs:
    used: set[str] = set()
    lines = [
        *_ingest(basis, used),
        *_of_stage(basis, "catalogue", Cost("catalogue", _rows(basis, used), note="not measured")),
        *_reference(basis, used),
        *_reference_scores(basis, used),
        *_train(basis, used),
        *_evaluate(basis),
        _storage(basis, used),
        _requests(basis, used),
    ]
    return Costs(lines, used)


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


def _of_stage(basis: Basis, name: str, cost: Cost) -> Iterator[Cost]:
    """The cost of a stage of this run, none of one that is done."""
    try:
        done = STAGES[name].is_done(basis.run)
    except (OSError, BotoCoreError, ValueError):
        done = False
    yield Cost(cost.stage, cost.work, 0.0, note="done") if done else cost


def _ingest(basis: Basis, used: set[str]) -> Iterator[Cost]:
    if basis.run.ingest is None:
        return
    if (urls := basis.urls) is None:
        yield Cost("ingest", "", note="the metadata is not there yet: --assume urls=N")
        return
    used.add("urls_per_cpu_second")
    cpu_hours = urls / basis.assumed.urls_per_cpu_second / 3600
    limit = f"{cpu_hours:,.1f} CPU-hours" if basis.cpus else f"{cpu_hours:,.1f} CPU-hours: --assume cpus=N"
    yield from _of_stage(basis, "ingest", _on_cpus(basis, Cost("ingest", f"{urls:,} URLs", note=limit), cpu_hours))


def _on_cpus(basis: Basis, cost: Cost, cpu_hours: float) -> Cost:
    """A stage that only CPUs work on."""
    price = basis.assumed.cpu_hour
    return Cost(
        cost.stage,
        cost.work,
        cpu_hours / basis.cpus if basis.cpus else None,
        f"{basis.cpus:,.0f} CPUs" if basis.cpus else "",
        None if price is None else cpu_hours * price,
        cost.note,
    )


def _rows(basis: Basis, used: set[str]) -> str:
    n = n_pairs(basis, used)
    return "" if n is None else f"{n:,.0f} pairs"


def _reference(basis: Basis, used: set[str]) -> Iterator[Cost]:
    """The reference's own training, where a run file says how."""
    reference = basis.run.reference
    if not basis.run.uses_reference or reference is None or reference.features is not None:
        return
    if basis.reference_run is not None:
        other = Basis(basis.reference_run, None, basis.assumed, basis.machine, basis.manifest)
        name = f"train {basis.reference_run.run_dir}"
        yield from (replace(cost, stage=name) for cost in _train(other, used))
    elif reference.model.pretrained or _is_there(basis.run.path(reference.checkpoint or "")):
        yield Cost("reference", "trained", 0.0, money=0.0, note="done")
    else:
        yield Cost("reference", f"{reference.checkpoint}", note="--reference-run FILE adds its training, if any")


def _is_there(checkpoint: str) -> bool:
    try:
        checkpoints.file_of(checkpoint)
    except (ValueError, OSError, BotoCoreError):
        return False
    return True


def _reference_scores(basis: Basis, used: set[str]) -> Iterator[Cost]:
    run = basis.run
    if not run.reads_scores or run.reference is None or run.reference.features is not None:
        return
    n = n_pairs(basis, used)
    if n is None:
        yield Cost("reference-scores", "", note="no catalogue, and no metadata: --assume urls=N")
        return
    on_gpus = run.reference.gpus_per_actor > 0
    actors = run.reference.n_actors or run.training.max_learners
    sizes_ = run.reference.score_image_size, run.reference.score_patch_size
    work = n * flops.forward_flops(run.reference.model, *sizes_).total
    cost = _both(basis, used, ("reference", "score"), work, n, actors, basis.cpus or actors, "actors", on_gpus)
    yield from _of_stage(basis, "reference-scores", Cost("reference-scores", f"{n:,.0f} pairs", *cost))


def _train(basis: Basis, used: set[str]) -> Iterator[Cost]:
    run, learners = basis.run, basis.run.training.max_learners
    seen = run.n_steps * run.super_batch_size
    readers = min(basis.cpus or _READ_TASKS * learners, _READ_TASKS * learners)
    step = flops.step_flops(run)
    hours = None
    if basis.machine is not None:
        hours = calibrate.predict(run, basis.machine).total / 3600
    cost = _both(basis, used, (), run.n_steps * step.total, seen, learners, readers, "learners", True, hours)
    yield from _of_stage(basis, "train", Cost("train", f"{seen:,} examples seen", *cost))


def _both(
    basis: Basis,
    used: set[str],
    parts: tuple[str, ...],
    work: float,
    examples: float,
    workers: int,
    readers: float,
    called: str,
    priced: bool,
    compute_hours: float | None = None,
) -> tuple[float | None, str, float | None, str, str]:
    """hours, machines, money, note and what is unpriced of a stage that reads and computes at the same time, of which
    the slower limits it."""
    assumed = basis.assumed
    used.add("read_cpu_ms")
    reading = examples * assumed.read_cpu_ms / 1e3 / 3600 / readers
    rate = basis.rate(*parts)
    computing = compute_hours if compute_hours is not None else work / rate / workers / 3600 if rate else None
    if compute_hours is None and rate and rate == assumed.flops_per_second:
        used.add("flops_per_second")
    machines = f"{workers:,} {called}, {readers:,.0f} reading"
    if computing is None:
        note = f"reading {reading:,.2f} h; computing not known: --machine FILE or --flops-per-second N"
        return None, machines, None, note, ""
    hours, limit = max((computing, "computing"), (reading, "reading"))
    note = f"{limit} limits: computing {computing:,.2f} h, reading {reading:,.2f} h"
    price = assumed.learner_hour if priced else assumed.cpu_hour
    if price is None:
        return hours, machines, None, note, ""
    money, unpriced = hours * workers * price, ""
    if basis.cpus and assumed.cpu_hour is None:
        unpriced = "the CPUs that read"
        note += f"; money without {unpriced}: --assume cpu_hour=P, 0 if the machines' price has them"
    elif basis.cpus:
        money += hours * readers * (assumed.cpu_hour or 0.0)
    return hours, machines, money, note, unpriced


def _evaluate(basis: Basis) -> Iterator[Cost]:
    if basis.run.evaluation is not None:
        every = basis.run.training.checkpoint_every_steps
        n = -(-basis.run.n_steps // every)
        yield from _of_stage(basis, "evaluate", Cost("evaluate", f"up to {n:,} checkpoints", note="not measured"))


def _storage(basis: Basis, used: set[str]) -> Cost:
    run, n = basis.run, n_pairs(basis, used)
    kept = run.training.keep_last_checkpoints
    n_checkpoints = -(-run.n_steps // run.training.checkpoint_every_steps)
    written = sizes.written_bytes(run)
    n_bytes = written["selection log"] + sizes.checkpoint_bytes(run) * min(n_checkpoints, kept or n_checkpoints)
    if run.training.keep_checkpoint_every_steps and kept:
        n_bytes += sizes.checkpoint_bytes(run) * (run.n_steps // run.training.keep_checkpoint_every_steps)
    if n is not None:
        rows = basis.pairs.n_rows if basis.pairs else n
        n_bytes += rows * sizes.encoded_bytes(basis.pairs)
        n_bytes += sizes.cache_bytes(run, n) if run.reads_scores else 0.0
    used.add("months")
    gb, price, months = n_bytes / 1e9, basis.assumed.gb_month, basis.assumed.months
    missing = "" if n is not None else "without shards and scores, whose number is not known; "
    note = missing + ("no price given: --assume gb_month=P" if price is None else f"{months:g} month(s)")
    return Cost("storage", f"{gb:,.0f} GB", 0.0, money=None if price is None else gb * months * price, note=note)


def _requests(basis: Basis, used: set[str]) -> Cost:
    """GETs of training and scoring, by row group; the few writes are not counted."""
    run, pairs = basis.run, basis.pairs
    rows = pairs.n_rows / max(1, pairs.n_row_groups) if pairs else 1024.0
    seen = float(run.n_steps * run.super_batch_size)
    scored = (n_pairs(basis, used) or 0.0) if run.reads_scores else 0.0
    n = (seen + scored) / rows * basis.assumed.requests_per_group
    if "://" not in run.path(run.run_dir):
        return Cost("requests", "none: local files", 0.0, money=0.0)
    used.add("requests_per_group")
    price = basis.assumed.thousand_requests
    note = "no price given: --assume thousand_requests=P" if price is None else "reading only"
    return Cost("requests", f"{n:,.0f}", 0.0, money=None if price is None else n / 1000 * price, note=note)
