"""Hours, machines and money of each stage of a run, with what limits it and what was assumed."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from botocore.exceptions import BotoCoreError

from ..base import checkpoints, storage
from ..base.stage_table import STAGES
from . import flow, sizes
from .basis import Basis, n_pairs
from .flow import Flow


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


def _of_stage(basis: Basis, name: str, cost: Cost) -> Iterator[Cost]:
    """The cost of a stage of this run, none of one that is done."""
    yield Cost(cost.stage, cost.work, 0.0, note="done") if _is_done(basis, name) else cost


def _is_done(basis: Basis, stage: str) -> bool:
    try:
        return STAGES[stage].is_done(basis.run)
    except (OSError, BotoCoreError, ValueError):
        return False


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
        other_run = basis.reference_run
        if other_run.data.sources == basis.run.data.sources:  # the same pictures, as this run's ingest makes them
            other_run = other_run.model_copy(update={"ingest": basis.run.ingest})
        other = Basis(other_run, None, basis.assumed, basis.machine, basis.manifest)
        name = f"train {basis.reference_run.run_dir}"
        yield from (replace(cost, stage=name) for cost in _train(other, used))
    elif reference.model.pretrained or _is_there(basis.run.path(reference.checkpoint or "")):
        yield Cost("reference", "trained", 0.0, money=0.0, note="done")
    else:
        yield Cost("reference", f"{reference.checkpoint}", note="--reference-run FILE adds its training, if any")


def _is_there(checkpoint: str) -> bool:
    try:
        storage.exists(checkpoint)  # once; `file_of` asks again and again where the storage does not answer
        checkpoints.file_of(checkpoint)
    except (ValueError, OSError, BotoCoreError):
        return False
    return True


def _reference_scores(basis: Basis, used: set[str]) -> Iterator[Cost]:
    run = basis.run
    if not run.reads_scores or run.reference is None or run.reference.features is not None:
        return
    if (found := flow.of_scoring(basis, used)) is None:
        yield Cost("reference-scores", "", note="no catalogue, and no metadata: --assume urls=N")
        return
    price = basis.assumed.learner_hour if run.reference.gpus_per_actor > 0 else basis.assumed.cpu_hour
    yield from _of_stage(basis, "reference-scores", _of_flow(basis, "reference-scores", "pairs", found, price))


def _train(basis: Basis, used: set[str]) -> Iterator[Cost]:
    cost = _of_flow(basis, "train", "examples seen", flow.of_training(basis, used), basis.assumed.learner_hour)
    yield from _of_stage(basis, "train", cost)


def _of_flow(basis: Basis, stage: str, what: str, found: Flow, price: float | None) -> Cost:
    """price: of an hour of a worker."""
    cpus = found.readers.cpus
    there = f"{found.workers:,} {found.called}" + ("" if cpus is None else f", {cpus:,.0f} CPUs reading")
    cost = Cost(stage, f"{found.examples:,.0f} {what}", machines=there, note=found.words())
    if found.seconds is None:
        return cost
    hours = found.seconds / 3600
    if price is None:
        return replace(cost, hours=hours)
    money, unpriced, note = hours * found.workers * price, "", cost.note
    if basis.cpus and basis.assumed.cpu_hour is None:
        unpriced = "the CPUs that read"
        note += f"; money without {unpriced}: --assume cpu_hour=P, 0 if the machines' price has them"
    elif basis.cpus:
        money += hours * basis.cpus * (basis.assumed.cpu_hour or 0.0)
    return replace(cost, hours=hours, money=money, note=note, unpriced=unpriced)


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
    """GETs of training and scoring, as far as they are not done; the few writes are not counted."""
    if "://" not in basis.run.path(basis.run.run_dir):
        return Cost("requests", "none: local files", 0.0, money=0.0)
    flows = flow.flows(basis, used)
    n = sum(found.examples * found.example.requests for stage, found in flows.items() if not _is_done(basis, stage))
    price = basis.assumed.thousand_requests
    note = "no price given: --assume thousand_requests=P" if price is None else "reading only"
    return Cost("requests", f"{n:,.0f}", 0.0, money=None if price is None else n / 1000 * price, note=note)
