"""Where the time of a run's steps goes: the share of each part, which part limits the run, and what would help."""

from collections.abc import Iterator, Sequence

from jest_core.run_file import Run

from ..base import cluster
from ..stream import read_costs
from ..stream.read_costs import ReadCosts
from ..stream.source import streams_of
from .hardware import Hardware
from .metrics_line import MetricsLine, part_seconds

# Parts of a step, as metrics.jsonl names their seconds (jest/wait_time ...), each with what makes it shorter anywhere
REMEDIES = {
    "wait": "the data comes too slowly: more CPUs, or faster storage",
    "score": "a larger selection.score_patch_size or a smaller score_image_size (FlexiJEST)",
    "reference": "a score cache: `jest reference-scores`, and reference.online false",
    "select": "fewer selection.n_chunks",
    "log": "a smaller training.n_refused_logged",
    "agreement": "a larger selection.agreement_every_steps",
    "exchange": "a faster network between the learners",
    "train": "training.low_resolution; no other part is slower",
    "checkpoint": "a larger training.checkpoint_every_steps, or faster storage",
}
# Settings that make a part shorter on some machines, with a value of theirs; in the order of their effect
BF16 = {
    "score": ("selection.score_precision", "bf16"),
    "train": ("training.precision", "bf16"),
    "select": ("selection.precision", "fast"),
}
COMPILED = ("score", "train")  # by training.compile
_COMPILES_SECONDS = 1800.0  # of steps, in which torch.compile, which takes minutes, has paid: a guess
_FASTER = 2.0  # as fast as the examples came, the CPUs could read them, where something else limits
_BUSY = 0.5  # share of the time of reading in which the CPU works, above which the CPUs limit it, and not the storage


def shares(lines: Sequence[MetricsLine]) -> dict[str, float]:
    """Each part's share of the time of these lines of metrics.jsonl, the greatest first; `other`: the rest."""
    seconds = {part: sum(part_seconds(line, part) for line in lines) for part in REMEDIES}
    total = sum(line.get("train/batch_time", 0.0) for line in lines) + seconds["checkpoint"]
    seconds["other"] = max(0.0, total - sum(seconds.values()))
    ordered = sorted(seconds.items(), key=lambda item: item[1], reverse=True)
    return {part: spent / total for part, spent in ordered} if total else {}


def note(lines: Sequence[MetricsLine]) -> str:
    """For a line of progress: what was seen and trained so far, and the parts that take a hundredth or more."""
    last = lines[-1]
    parts = [f"{part} {share:.0%}" for part, share in shares(lines).items() if share >= 0.01]
    return (
        f"loss {last['train/loss']:.3f}, {last['jest/samples_trained']:,} trained of {last['jest/samples_seen']:,} "
        f"seen; {', '.join(parts)}"
    )


def limit(lines: Sequence[MetricsLine], run: Run, hardware: Hardware | None) -> str:
    """The part that takes most of the time after the first step, which also starts the readers; and what shortens it on
    the machines of this run.

    hardware: of the first learner; None where it is not known. Where the data limits, windows of the run are read once
    more here, for seconds: the CPU or the storage is what they wait for.
    """
    warm = lines[1:] or lines
    found = [(part, share) for part, share in shares(warm).items() if part in REMEDIES]
    if not found:
        return "the lines of metrics.jsonl do not say how long its steps took"  # lost, and made again from the log
    part, share = found[0]
    said = f"limited by {part}, {share:.0%} of the time; "
    if part == "wait":
        timed = [line["train/batch_time"] for line in warm if "train/batch_time" in line]
        taken = None if cluster.is_local() else run.super_batch_size * len(timed) / sum(timed)
        return said + reading(run, _read_again(run), cluster.n_tasks()(), taken)
    seconds = sum(line.get("train/batch_time", 0.0) for line in lines)
    remedies = [*faster(part, run, hardware, seconds), REMEDIES[part]]
    return f"{said}what shortens it: {'; '.join(remedies)}"


def faster(part: str, run: Run, hardware: Hardware | None, seconds: float) -> Iterator[str]:
    """Settings that the run has not, and that make a part shorter on such a machine. seconds: of the run's steps."""
    if hardware is None:
        return
    if part in BF16 and hardware.bf16:
        name, value = BF16[part]
        room, _, key = name.partition(".")
        if getattr(getattr(run, room), key) in ("fp32", "exact"):
            yield f"{name} {value}"
    long = seconds >= _COMPILES_SECONDS
    if part in COMPILED and hardware.gpu and hardware.compiles and long and not run.training.compile:
        yield "training.compile"


def reading(run: Run, costs: ReadCosts | None, cpus: float, taken: float | None = None) -> str:
    """What makes reading faster. costs: of an example; None where it could not be read. cpus: of the cluster, of which
    data.read_cpus read. taken: examples a second that the learners got; None on one machine, whose CPUs they share."""
    if costs is None:
        return REMEDIES["wait"]
    few = run.data.read_cpus is not None and run.data.read_cpus < cpus
    more = [f"a larger data.read_cpus: {run.data.read_cpus} of {cpus:,.0f} CPUs read"] if few else []
    if costs.busy < _BUSY:
        return (
            f"the storage comes too slowly: an example takes {costs.clock_ms:.1f} ms to read, in which the CPU works "
            f"for {costs.busy:.0%}; what shortens it: {'; '.join([*more, 'faster storage, or storage nearer by'])}"
        )
    work, each = sum(costs.cpu_ms.values()), max(costs.cpu_ms, key=lambda name: costs.cpu_ms[name])
    n = run.training.max_learners
    times_read = sum(len(streams_of(run, rank, n)) for rank in range(n)) / run.data.n_streams
    read = 1e3 * min(cpus, run.data.read_cpus or cpus) / work / times_read
    if taken is not None and read > _FASTER * taken:
        return (
            f"neither CPUs nor storage are slow: an example takes {work:.1f} CPU ms to read, so the CPUs could read "
            f"{read:,.0f} a second, and {taken:,.0f} came; look at what is between the nodes: Ray's receiving threads, "
            "object stores and the network (deploy/docs/reading.md, `jest plan --cluster`)"
        )
    remedies = more or [f"more CPUs than the {cpus:,.0f} that read"]
    if each == "decoding":
        if run.data.decoder == "pillow":
            remedies.append("data.decoder simplejpeg")
        if run.data.decode == "eager" and run.selection.selects:
            remedies.append("data.decode late with a small selection.score_image_size")
    return (
        f"the data comes too slowly: an example takes {work:.1f} CPU ms to read, most of it for {each}; what shortens "
        f"it: {'; '.join(remedies)}"
    )


def _read_again(run: Run) -> ReadCosts | None:
    try:
        return read_costs.measure(run)
    except Exception:  # the run is done, whatever has become of its inputs since
        return None
