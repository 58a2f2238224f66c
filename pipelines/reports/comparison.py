"""Finished runs -> the table that compares them: scores, examples, FLOPs and time, with seeds put together."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import cast

import pyarrow as pa
from rich.table import Table

from jest_core import flops, run_file
from jest_core.run_file import Run

from ..base import manifests, storage
from ..evaluation import results
from ..evaluation.results import Line
from ..scores import score_cache
from ..training import metrics_line, selection_log
from ..training.metrics_line import MetricsLine
from ..training.run_directory import TrainManifest

NOTE = (
    "Scores in %. FLOPs as executed, and with the scoring forward of the selected examples counted as reused (the "
    "convention of the paper's Table 1); the reference's training and scoring are counted only in the row that says so."
)


@dataclass(frozen=True)
class Finished:
    """What is read of one finished run."""

    directory: str
    run: Run
    manifest: TrainManifest
    results: list[Line]

    @property
    def name(self) -> str:
        return self.directory.rstrip("/").rsplit("/", 1)[-1]

    @property
    def method(self) -> str:
        """Its name without the seed."""
        return re.sub(r"-seed\d+$", "", self.name)

    def curve(self, key: str, metric: str) -> list[tuple[Line, float]]:
        """A score over the run's checkpoints."""
        return [(line, line["metrics"][metric]) for line in self.results if line["key"] == key]

    @property
    def teraflops(self) -> float:
        """As executed, the whole run."""
        return float(self.manifest["steps"] * self.manifest["flops_step"] / 1e12)

    def flops_of(self, part: str) -> float:
        """FLOPs of one part of a step, as executed; 0 of a part that has none, such as `wait`."""
        return cast(Mapping[str, float], self.manifest).get(f"flops_{part}", 0.0)

    @cached_property
    def last(self) -> dict[tuple[str, str], float]:
        """Main metric of each task, in 0..1, at the end of the run; by the task and the definition of its set."""
        end = self.manifest["steps"]
        lines = [line for line in self.results if line["step"] == end]
        return {(line["key"], line.get("protocol", "")): line["metrics"]["main_metric"] for line in lines}

    @cached_property
    def metrics(self) -> list[MetricsLine]:
        return metrics_line.read(self.directory)

    def seconds_at(self, step: int) -> float:
        """Seconds of the first so many steps; NaN where metrics.jsonl has lost them."""
        return float(self.metrics[step - 1].get("jest/seconds", math.nan)) if step else 0.0

    @cached_property
    def picks(self) -> pa.Table:
        """The selection log of some steps, evenly over the run: a long run has billions of rows."""
        return selection_log.sample(self.directory)


def read_run(directory: str) -> Finished:
    """A finished run. Raises FileNotFoundError where it is not."""
    manifest = manifests.finished(directory, "train", TrainManifest, "train it first")
    run = run_file.load(
        storage.read_bytes(f"{directory}/run.yaml").decode(), source=f"{directory}/run.yaml", saved=True
    )
    return Finished(directory, run, manifest, results.read(directory))


def scores(runs: Iterable[Finished]) -> list[tuple[str, str, str]]:
    """(key, metric, label) of the scores worth a row, in the order in which the runs have them."""
    out = []
    for key in dict.fromkeys(line["key"] for run in runs for line in run.results):
        if key.endswith("/retrieval"):
            out.append((key, "text_retrieval_recall@10", f"{key} R@10, image to text"))
        elif key.endswith("/emoji_name"):
            out += [(key, "acc1", f"{key} @1"), (key, "acc5", f"{key} @5")]
        else:
            out.append((key, "acc1", f"{key} @1"))
    return out


@dataclass(frozen=True)
class Comparison:
    """A column for each method, a row for each score and cost; cells are the mean over seeds, with their range."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]


def compare(runs: list[Finished]) -> Comparison:
    methods: dict[str, list[Finished]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    by_directory = {run.directory: run for run in runs}

    def row(label: str, value: Callable[[Finished], float | None], form: str) -> tuple[str, list[str]]:
        return label, [cell([v for run in group if (v := value(run)) is not None], form) for group in methods.values()]

    def score(key: str, metric: str) -> Callable[[Finished], float | None]:
        return lambda run: 100 * run.curve(key, metric)[-1][1] if run.curve(key, metric) else None

    rows = [row(label, score(key, metric), "{:.1f}") for key, metric, label in scores(runs)]
    rows += [
        row("examples trained", lambda run: run.manifest["examples_trained"], "{:,.0f}"),
        row("examples seen", lambda run: run.manifest["examples_seen"], "{:,.0f}"),
        row("TFLOPs", lambda run: run.teraflops, "{:.2f}"),
        row(
            "TFLOPs, scoring reused",
            lambda run: run.manifest["steps"] * run.manifest["flops_step_with_reuse"] / 1e12,
            "{:.2f}",
        ),
        row(
            "TFLOPs, with the reference's",
            lambda run: run.teraflops + _reference_teraflops(run, by_directory),
            "{:.2f}",
        ),
        row("wall-clock of the steps, s", lambda run: run.manifest["seconds"], "{:.0f}"),
    ]
    n_seeds = {name: len(group) for name, group in methods.items()}
    return Comparison([name + (f", {n} seeds" if n > 1 else "") for name, n in n_seeds.items()], rows)


def cell(values: list[float], form: str) -> str:
    """The mean over seeds, and their range where they differ; empty where there are none, or one is NaN."""
    if not values or any(value != value for value in values):
        return ""
    text = form.format(mean(values))
    spread = [form.format(min(values)), form.format(max(values))]
    return text if spread[0] == spread[1] else f"{text} ({spread[0]} to {spread[1]})"


def _reference_teraflops(run: Finished, runs: dict[str, Finished]) -> float:
    """The cost of the reference's training and of its one pass over the catalogue; NaN where it is none of the runs."""
    if run.run.reference is None or not run.run.uses_reference:
        return 0.0
    reference = runs.get(run.run.path(run.run.reference.checkpoint or ""))
    if reference is None:
        return float("nan")
    if not run.run.reads_scores:
        return reference.teraflops
    cache = score_cache.opened(run.run.path(run.run.reference.scores))
    spec = run.run.reference
    forward = flops.forward_flops(spec.model, spec.score_image_size, spec.score_patch_size).total
    return reference.teraflops + cache["counts"]["ok"] * forward / 1e12


def verdict(runs: list[Finished]) -> list[str]:
    """A sentence for each method that selects: what it gained over uniform batches, and at what cost.

    It is compared on the tasks that both have, with the uniform runs nearest in examples and in FLOPs (within 5 %).
    """
    methods: dict[str, list[Finished]] = {}
    for run in runs:
        if run.last:
            methods.setdefault(run.method, []).append(run)
    references = {run.run.path(run.run.reference.checkpoint or "") for run in runs if run.run.reference}
    uniform = [
        group
        for group in methods.values()
        if not group[0].run.selection.selects and group[0].directory not in references
    ]
    out = []
    for name, group in methods.items():
        if not group[0].run.selection.selects:
            continue
        sentence = (
            f"{name} reached a mean score of {100 * _mean_score(group, set(group[0].last)):.1f} % with "
            f"{group[0].manifest['examples_trained']:,} examples trained, {group[0].teraflops:.1f} TFLOPs and "
            f"{_seconds(group):.0f} s in steps."
        )
        for kind, cost in (("examples", _examples), ("FLOPs", lambda run: run.teraflops)):
            near = min(uniform, key=lambda other: abs(cost(other[0]) / cost(group[0]) - 1), default=None)
            if near is None or abs(cost(near[0]) / cost(group[0]) - 1) > 0.05:
                continue
            common = set.intersection(*(set(run.last) for run in [*group, *near]))
            if common:
                gain = 100 * (_mean_score(group, common) - _mean_score(near, common))
                sentence += (
                    f" Against {near[0].method}, at equal {kind}: {gain:+.1f} points, for "
                    f"{group[0].teraflops / near[0].teraflops:.2f} times the FLOPs, "
                    f"{_examples(group[0]) / _examples(near[0]):.2f} times the examples, "
                    f"{_seconds(group) / _seconds(near):.2f} times the time."
                )
        out.append(sentence)
    return out


def _examples(run: Finished) -> float:
    return float(run.manifest["examples_trained"])


def _seconds(group: list[Finished]) -> float:
    return mean(float(run.manifest["seconds"]) for run in group)


def _mean_score(group: list[Finished], tasks: set[tuple[str, str]]) -> float:
    return mean(run.last[task] for run in group for task in tasks if task in run.last)


def terminal(table: Comparison) -> Table:
    out = Table(caption=NOTE, caption_justify="left")
    out.add_column("")
    for column in table.columns:
        out.add_column(column.replace("-", " "), justify="right")
    for label, cells in table.rows:
        out.add_row(label, *cells)
    return out


def markdown(table: Comparison) -> str:
    lines = [
        ["", *table.columns],
        ["---", *["---:"] * len(table.columns)],
        *([label, *cells] for label, cells in table.rows),
    ]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
