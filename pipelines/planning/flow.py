"""Pictures a second on their way from shards to learners: what each part of a cluster delivers, and what limits.

Tasks on CPUs anywhere read and decode windows, which go through Ray's object stores to the learners. They work ahead
while the learners compute, so that the slowest of all parts decides.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jest_core import flops

from ..stream.read_ahead import STORE_SHARE
from . import calibrate, reading
from .assumptions import Assumptions
from .basis import Basis, n_pairs
from .machines import Machines
from .reading import Example

READING = "reading"  # the limit by CPUs


@dataclass(frozen=True)
class Readers:
    """The machines of a stage.

    cpus: that read; None where nobody says. takers: machines with workers. receiving: threads with which Ray receives
    objects on all of them. others: machines that read and have no worker. crossing: share of the windows that are read
    on another machine than the one that takes them. store_bytes: of all object stores; 0 where not known.
    """

    cpus: float | None = None
    takers: int = 0
    receiving: int = 0
    others: int = 0
    crossing: float = 0.0
    store_bytes: float = 0.0


@dataclass(frozen=True)
class Flow:
    """A stage that reads and computes at the same time, in pictures a second.

    examples: of the whole stage. workers, called: those that take them. computing: seconds in which the workers compute
    on all; None where that is not known. limits: what each part of the cluster delivers, of those that are known.
    """

    example: Example
    readers: Readers
    examples: float
    workers: int
    called: str
    computing: float | None
    limits: Mapping[str, float]

    @property
    def taken(self) -> float | None:
        """Pictures a second that the workers compute on."""
        return self.examples / self.computing if self.computing else None

    @property
    def limit(self) -> str:
        """What is slowest: `computing` or a part."""
        rates = {"computing": self.taken or math.inf, **self.limits}
        return min(rates, key=lambda part: rates[part])

    @property
    def reading(self) -> float | None:
        """Seconds in which all are read, by the slowest part; None where the CPUs are not known."""
        return None if self.readers.cpus is None else self.examples / min(self.limits.values())

    @property
    def seconds(self) -> float | None:
        """Of the whole stage: the slower of both, as they overlap; None where computing is not known."""
        return None if self.computing is None else max(self.computing, self.examples / min(self._known()))

    def _known(self) -> list[float]:
        return [*self.limits.values(), math.inf]

    @property
    def cpus_needed(self) -> float:
        """CPUs that read as fast as the workers compute; 0 where that is not known."""
        return (self.taken or 0.0) * _read_ms(self.example, self.readers) / 1e3

    @property
    def needs(self) -> dict[str, float]:
        """What the stage takes a second, in words with units, as fast as its workers compute; empty where that is not
        known. Of machines, those that compute."""
        if self.taken is None:
            return {}
        each, there, called = self.example, self.readers, self.called[:-1]
        found = {
            "pictures a second": self.taken,
            "CPUs that read": self.cpus_needed,
            "CPUs that read, for each worker": self.cpus_needed / self.workers,
            f"CPUs of each {called}, to decode the selected again": self.taken * each.again_ms / 1e3 / self.workers,
            "GB/s from storage": self.taken * each.storage_bytes / 1e9,
            "requests a second": self.taken * each.requests,
        }
        if there.takers:
            received = self.taken * there.crossing / there.takers
            found["GB/s into each machine"] = received * each.store_bytes / 1e9
            found["CPUs of each machine, with which Ray receives"] = received * each.receive_ms / 1e3
        return {name: value for name, value in found.items() if value}

    def words(self) -> str:
        """What limits the stage, with the figures that say so, and the CPUs that would do."""
        if self.taken is None:
            reading = "" if self.reading is None else f"reading {self.reading / 3600:,.2f} h; "
            return f"{reading}computing not known: --machine FILE or --flops-per-second N"
        computing = f"computing {(self.computing or 0.0) / 3600:,.2f} h"
        takes = f"{self.workers:,} {self.called} take {rounded(self.taken)} pictures a second"
        enough = f"{self.cpus_needed:,.0f} CPUs would do, {self.cpus_needed / self.workers:.1f} for each"
        if self.reading is None:
            return f"{computing}, and reading not known: {takes}; {enough} (--cluster FILE or --assume cpus=N)"
        hours = f"{computing}, reading {self.reading / 3600:,.2f} h"
        cpus = f"{self.readers.cpus:,.0f} CPUs deliver {rounded(self.limits[READING])}"
        if not self.readers.takers:
            enough += "; without what goes between machines: --cluster FILE"
        if self.limit in ("computing", READING):
            return f"limited by {self.limit}: {hours}; {takes} and {cpus}; {enough}"
        through = f"{rounded(self.limits[self.limit])} pictures a second"
        return f"limited by {self.limit}, {through}: {hours}; {takes}, {cpus}; {enough}"


def flows(basis: Basis, used: set[str]) -> dict[str, Flow]:
    """The stages of the run that read and compute at the same time."""
    found = {"reference-scores": of_scoring(basis, used), "train": of_training(basis, used)}
    return {stage: flow for stage, flow in found.items() if flow is not None}


def of_scoring(basis: Basis, used: set[str]) -> Flow | None:
    run, n = basis.run, n_pairs(basis, used)
    if not run.reads_scores or run.reference is None or run.reference.features is not None or n is None:
        return None
    actors, sizes_ = run.reference.n_actors or run.training.max_learners, run.reference
    resolution = sizes_.score_image_size, sizes_.score_patch_size
    work = n * flops.forward_flops(run.reference.model, *resolution).total
    example = reading.of_scoring(run, basis.pairs, basis.assumed, basis.machine)
    each = {"GPU": run.reference.gpus_per_actor, "CPU": 1.0}
    computing = _computing(basis, used, ("reference", "score"), work, actors)
    used |= reading.assumed_by(example, basis.assumed)
    found = readers_of(actors, each, basis.assumed, basis.manifest)
    limits = limits_of(example, found, actors, basis.assumed)
    return Flow(example, found, n, actors, "actors", computing, limits)


def of_training(basis: Basis, used: set[str]) -> Flow:
    run, n = basis.run, basis.run.training.max_learners
    example = reading.of_training(run, basis.pairs, basis.assumed, basis.machine)
    each = {"GPU": run.training.gpus_per_learner, "CPU": 1.0}
    there = readers_of(n, each, basis.assumed, basis.manifest, run.data.read_cpus)
    if basis.machine is not None:
        took = calibrate.predict(run, basis.machine)
        computing: float | None = took.total - (took.wait_seconds if there.cpus is not None else 0.0)
    else:
        computing = _computing(basis, used, (), run.n_steps * flops.step_flops(run).total, n)
    used |= reading.assumed_by(example, basis.assumed)
    limits = limits_of(example, there, n, basis.assumed)
    return Flow(example, there, run.n_steps * run.super_batch_size, n, "learners", computing, limits)


def _computing(basis: Basis, used: set[str], parts: tuple[str, ...], work: float, workers: int) -> float | None:
    """Seconds of so many FLOPs."""
    rate = basis.rate(*parts)
    if rate and rate == basis.assumed.flops_per_second:
        used.add("flops_per_second")
    return work / rate / workers if rate else None


def readers_of(
    workers: int,
    each: Mapping[str, float],
    assumed: Assumptions,
    manifest: Machines | None,
    read_cpus: int | None = None,
) -> Readers:
    """The machines that read for so many workers, on CPUs that these leave. each: what a worker asks for. read_cpus: of
    the run file, of which each worker has one at least."""
    most = max(read_cpus, workers) if read_cpus else math.inf
    if manifest is None or manifest.unknown:
        return Readers() if assumed.cpus is None else Readers(min(assumed.cpus, most))
    placed = manifest.placed(workers, **each)
    there = sum(machines.n * machines.cpus_left for machines in placed)
    cpus = there if assumed.cpus is None else assumed.cpus
    takers = [machines for machines in placed if machines.workers]
    n = sum(machines.n for machines in takers)
    own = sum(machines.n * machines.cpus_left for machines in takers) / max(1, n)  # of each
    return Readers(
        min(cpus, most),
        n,
        sum(machines.n * (assumed.receive_threads or machines.group.receiving_threads) for machines in takers),
        sum(machines.n for machines in placed if not machines.workers and machines.cpus_left),
        max(0.0, 1 - own / cpus) if cpus else 1.0,
        sum(machines.n * machines.group.store_bytes for machines in placed),
    )


def _read_ms(example: Example, found: Readers) -> float:
    """CPU milliseconds of an example on machines that read: sending it is Ray's work there, which counts no CPUs."""
    return example.read_ms + found.crossing * example.send_ms


def limits_of(example: Example, found: Readers, workers: int, assumed: Assumptions) -> dict[str, float]:
    """Pictures a second that each part delivers, of those that are known."""
    parts, read_ms, crossing = {}, _read_ms(example, found), found.crossing * example.store_bytes
    if found.cpus is not None:
        parts[READING] = found.cpus * 1e3 / read_ms
        windows = math.inf
        if found.store_bytes:  # windows that wait for the learners take the place of those that could be read
            windows = STORE_SHARE * found.store_bytes / example.window_bytes
        if windows < found.cpus:
            parts["Ray's object stores, which hold too few windows"] = windows * 1e3 / read_ms
    if example.copy_ms:
        parts["the learners' copies, by one thread of each"] = workers * 1e3 / example.copy_ms
    if found.receiving and crossing:
        parts["Ray's transfer to the learners' machines"] = (
            found.receiving * 1e3 / (found.crossing * example.receive_ms)
        )
    if assumed.learner_gbits and found.takers and crossing:
        parts["the network of the learners' machines"] = found.takers * _bytes(assumed.learner_gbits) / crossing
    if assumed.data_gbits and found.others and crossing:
        parts["the network of the data machines"] = found.others * _bytes(assumed.data_gbits) / crossing
    if assumed.storage_gbits:
        parts["the storage"] = _bytes(assumed.storage_gbits) / example.storage_bytes
    return parts


def rounded(value: float) -> str:
    """With two digits that count: 410,000."""
    digits = max(0, len(f"{value:.0f}") - 2)
    return f"{round(value / 10**digits) * 10**digits:,.0f}"


def _bytes(gbits: float) -> float:
    """A second."""
    return gbits * 1e9 / 8
