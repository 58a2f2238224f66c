"""The stages of a run, one row each: what it needs, what it makes, when it is done, and what it refuses.

`jest STAGE`, `jest stages`, `jest submit`, `jest plan` and deploy/docs/stages.md are made from this table. It imports
nothing that takes time, as `jest --help` reads it.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jest_core.run_file import Run


class RunStage(Protocol):
    """`run_stage` of a stage's module: does what is missing of the stage, so that it is safe to call again.

    Single stages have options, as keyword arguments. The result is for callers in Python.
    """

    def __call__(self, run: Run, **options: object) -> object: ...


def _is_finished(directory: str) -> bool:
    from . import manifests

    return manifests.is_finished(directory)


@dataclass(frozen=True)
class Stage:
    """One stage: what `jest NAME RUN.yaml` does."""

    name: str
    help: str  # one line for the command line
    needs: str  # in words, for the documents
    makes: str
    done_when: str
    modules: tuple[str, ...]  # of pipelines: the one that has `run_stage`, then what it imports while it works
    path: Callable[[Run], str | None]  # of what it makes, as the run file has it; None: not a stage of this run file
    refusal: Callable[[Run], str]  # why it has nothing to do for this run file, with the remedy; "" if it has
    after: Callable[[Run], tuple[str, ...]] = lambda run: ()  # stages that make what it cannot start without
    finished: Callable[[Run, str], bool] = lambda run, directory: _is_finished(directory)  # all of it is there
    usable: Callable[[str], bool] = _is_finished  # whether the stages that need it can start

    def directory(self, run: Run) -> str | None:
        """What it makes as an absolute path or a URL; None where it is not a stage of this run file."""
        path = self.path(run)
        return None if path is None else run.path(path)

    def is_done(self, run: Run) -> bool:
        """Whether all that it makes is there."""
        directory = self.directory(run)
        return directory is not None and self.finished(run, directory)

    def can_be_used(self, run: Run) -> bool:
        """Whether enough of what it makes is there for the stages that need it."""
        directory = self.directory(run)
        return directory is not None and self.usable(directory)

    def refuse(self, run: Run) -> None:
        """Raises ValueError where the stage has nothing to do for this run file."""
        if reason := self.refusal(run):
            raise ValueError(reason)

    def load(self) -> RunStage:
        """Import all that the stage needs."""
        loaded = [importlib.import_module(f"..{module}", __package__) for module in self.modules]
        function: RunStage = loaded[0].run_stage
        return function


def _select(run: Run) -> str:
    if run.subset is None:
        return "the run file has no `subset` part: `jest select` has nowhere to write"
    if run.selection.method == "uniform":
        return "selection.method is uniform, which selects nothing: set it to joint or independent for `jest select`"
    return ""


def _has_checkpoint(run_dir: str) -> bool:
    from . import checkpoints

    return bool(checkpoints.steps(run_dir))


def _is_trained(run: Run, run_dir: str) -> bool:
    """Whether the run is finished with the budget of the run file, which may be larger than that of the directory."""
    from . import manifests

    if not _is_finished(run_dir):
        return False
    begun = manifests.read(run_dir)["config"]
    return bool(begun.get("training.examples_trained") == run.training.examples_trained)


def _is_evaluated(run: Run, run_dir: str) -> bool:
    """Whether the run is finished, and each of its checkpoints has results for each task of the run file."""
    from . import checkpoints, storage

    results = f"{run_dir}/eval_results.jsonl"
    if not _is_trained(run, run_dir) or not storage.exists(results):
        return False
    there = {(line["step"], line["key"]) for line in storage.read_lines(results) if isinstance(line, dict)}
    keys = [f"{one.name}/{task}" for one in (run.evaluation.sets if run.evaluation else []) for task in one.tasks]
    return there.issuperset((step, key) for step in checkpoints.steps(run_dir) for key in keys)


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "ingest",
            help="Fetch the images that lists of URLs name into shards, with img2dataset.",
            needs="`ingest.urls`: Parquet files with URLs, as LAION, DataComp and COYO publish them",
            makes="shards in `ingest.shards`",
            done_when="every list was fetched (`manifest.json`)",
            modules=("data.ingest",),
            path=lambda run: run.ingest.shards if run.ingest else None,
            refusal=lambda run: "" if run.ingest else "the run file has no `ingest` part: there is nothing to fetch",
        ),
        Stage(
            "catalogue",
            help="Record which rows of the shards are kept, and which rule dropped each of the others.",
            needs="`data.shards`; of `data.refines` its finished catalogue",
            makes="the catalogue in `data.catalogue`",
            done_when="every shard is in it (`manifest.json`)",
            modules=("data.catalogue",),
            path=lambda run: run.data.catalogue,
            refusal=lambda run: "",
        ),
        Stage(
            "reference-scores",
            help="Embed every kept pair once with the reference, and cache the embeddings beside the shards.",
            needs="the catalogue; the weights of `reference`",
            makes="the score cache in `reference.scores`",
            done_when="every kept row is embedded (`manifest.json`)",
            modules=("scores.reference_scores",),
            path=lambda run: run.reference.scores if run.reference else None,
            refusal=lambda run: (
                "" if run.reference else "the run file has no `reference` part: there is nothing to score with"
            ),
            after=lambda run: ("catalogue",),
        ),
        Stage(
            "select",
            help="Select from the whole catalogue offline, by fixed learner and reference: a static subset.",
            needs="the catalogue; the score cache; the weights of `subset.learner`",
            makes="a list of examples in `subset.directory`",
            done_when="every super-batch is selected from (`manifest.json`)",
            modules=("offline.select",),
            path=lambda run: run.subset.directory if run.subset else None,
            refusal=_select,
            after=lambda run: ("catalogue", *(["reference-scores"] if run.uses_reference else [])),
        ),
        Stage(
            "train",
            help="Train the run's model, from its newest checkpoint on; a reference is trained with method `uniform`.",
            needs="the catalogue; the score cache, unless selection uses no reference or `reference.online`",
            makes="checkpoints, selection log and metrics in `run_dir`",
            done_when="`training.examples_trained` are trained (`manifest.json`)",
            modules=("training.train", "training.loop"),
            path=lambda run: run.run_dir,
            refusal=lambda run: "",
            after=lambda run: ("catalogue", *(["reference-scores"] if run.reads_scores else [])),
            finished=_is_trained,
            usable=_has_checkpoint,
        ),
        Stage(
            "evaluate",
            help="Zero-shot, few-shot and retrieval scores of every checkpoint of the run.",
            needs="at least one checkpoint in `run_dir`; `evaluation.sets`",
            makes="`eval_results.jsonl` in `run_dir`",
            done_when="the run is finished and each of its checkpoints has all scores",
            modules=("evaluation.evaluate",),
            path=lambda run: run.run_dir if run.evaluation else None,
            refusal=lambda run: (
                "" if run.evaluation else "the run file has no `evaluation` part: there is nothing to evaluate on"
            ),
            after=lambda run: ("train",),
            finished=_is_evaluated,
        ),
        Stage(
            "report",
            help="Compare runs on one page: curves, what was selected, and what it cost.",
            needs="a finished run; any number of them",
            makes="`report.html` and `report.md`; by `jest stages`, in `run_dir`",
            done_when="never: it is written anew each time",
            modules=("reports.report",),
            path=lambda run: run.run_dir,
            refusal=lambda run: "",
            after=lambda run: ("train",),
            finished=lambda run, run_dir: False,
        ),
    )
}


def with_table(text: str) -> str:
    """The text of deploy/docs/stages.md with the table of today, below the comment that says how it is made."""
    lines = ["| stage | needs | makes | is done when |", "| --- | --- | --- | --- |"]
    lines += [f"| `{s.name}`: {s.help} | {s.needs} | {s.makes} | {s.done_when} |" for s in STAGES.values()]
    before, comment, after = re.split(r"(<!-- .*? -->)", text, maxsplit=1)
    rest = re.sub(r"(?m)^\|.*\n", "", after).strip()
    return f"{before}{comment}\n\n" + "\n".join(lines) + f"\n\n{rest}\n"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(with_table(document.read_text()))
