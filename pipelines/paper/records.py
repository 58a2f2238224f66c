"""What the reproduction's runs gave, as results.json keeps it, and the figures that experiments.yaml asks for."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any, TypedDict

from ..reports.study import AnatomyLine, Figure2

HEADLINE = "mean of four"  # the score that figures show: the mean of the first four
Scores = Mapping[str, Sequence[str]]  # label -> key and metric of eval_results.jsonl
TUNING_SEED = 100  # from here on: the seeds that settings were tuned on


class Checkpoint(TypedDict):
    """Scores after `step` updates, by "key metric" of eval_results.jsonl; accuracies and recalls in 0..1."""

    step: int
    scores: dict[str, float]


class Record(TypedDict):
    """A finished run. sub_batch_size and filter_ratio are what figures are plotted against."""

    identity: str  # hash of its run file
    checkpoints: list[Checkpoint]  # in the order of their steps
    steps: int
    examples_trained: int
    examples_seen: int
    teraflops: float  # of all steps, as executed
    teraflops_with_reuse: float  # with the scoring forward of the selected examples counted as reused
    seconds: float  # of all steps
    filter_ratio: float
    sub_batch_size: int


Study = Figure2 | list[AnatomyLine]


class Results(TypedDict):
    """results.json. runs: name -> seed, as text -> record. studies: by the name of their figure."""

    runs: dict[str, dict[str, Record]]
    studies: dict[str, Study]


class FigureSpec(TypedDict, total=False):
    """A figure of experiments.yaml. Runs are named as there; series and ahead by the label of a line."""

    title: str
    plot: str  # curves, or bars if not given
    seeds: list[int]
    runs: list[str]
    against: str  # key of the run file that the x axis has; a record has its last part
    series: dict[str, list[str]]  # label -> the runs of a line
    ahead: dict[str, list[str]]  # label -> two series, of which the second is subtracted from the first
    scores: dict[str, list[str]]  # other scores than the others show
    study: str  # figure2 or anatomy
    of: str  # the run that is studied
    sub_batch_sizes: list[int]  # of the study


class Experiments(TypedDict):
    """experiments.yaml. base is a run file, and each of runs what it changes: run_file.load checks them."""

    base: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    scores: dict[str, list[str]]
    figures: dict[str, FigureSpec]


def runs_of(spec: FigureSpec) -> list[str]:
    """Names of a figure's runs, each once."""
    return list(dict.fromkeys([*spec.get("runs", []), *(n for line in spec.get("series", {}).values() for n in line)]))


def by_seed(results: Results, name: str, seeds: Iterable[int] | None = None) -> list[Record]:
    """A run's records, a seed each; seeds: only these, else all but those that settings were tuned on."""
    records = results["runs"].get(name, {})
    wanted = [str(s) for s in seeds] if seeds is not None else [s for s in records if int(s) < TUNING_SEED]
    asked = ["0"] if name.startswith("reference") else wanted  # references have one seed
    return [records[seed] for seed in asked if seed in records]


def score_at(checkpoint: Checkpoint, score: str, scores: Scores) -> float | None:
    """A score in %, or the mean of the first four; None where the checkpoint lacks it."""
    if score == HEADLINE:
        four = [score_at(checkpoint, label, scores) for label in list(scores)[:4]]
        return mean(v for v in four if v is not None) if all(v is not None for v in four) else None
    value = checkpoint["scores"].get(" ".join(scores[score]))
    return None if value is None else 100 * value


def last_scores(results: Results, name: str, score: str, scores: Scores) -> list[float]:
    """A score of a run's last checkpoint, in %, for each seed."""
    found = (score_at(record["checkpoints"][-1], score, scores) for record in by_seed(results, name))
    return [value for value in found if value is not None]


def leads(spec: FigureSpec, results: Results, score: str, scores: Scores) -> dict[str, list[tuple[float, list[float]]]]:
    """By how much the first of two series is ahead of the second: at each x, in points, for each seed of both."""
    out = {}
    for label, (one, other) in spec.get("ahead", {}).items():
        points = []
        for pair in zip(spec["series"][one], spec["series"][other], strict=True):
            first, second = (results["runs"].get(name, {}) for name in pair)
            seeds = [str(seed) for seed in spec["seeds"] if str(seed) in first and str(seed) in second]
            ends = [
                [score_at(run[seed]["checkpoints"][-1], score, scores) for run in (first, second)] for seed in seeds
            ]
            differences = [a - b for a, b in ends if a is not None and b is not None]
            if differences:
                points.append((x_of(spec, first[seeds[0]]), differences))
        out[label] = points
    return out


def x_of(spec: FigureSpec, record: Record) -> float:
    """Where a run is on the figure's x axis."""
    return record["sub_batch_size"] if x_field(spec) == "sub_batch_size" else record["filter_ratio"]


def x_field(spec: FigureSpec) -> str:
    """The field of a record that the x axis has."""
    return spec["against"].rsplit(".", 1)[-1]


def x_title(spec: FigureSpec) -> str:
    return x_field(spec).replace("sub_batch", "sub-batch").replace("_", " ")
