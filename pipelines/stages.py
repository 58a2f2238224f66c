"""Stages of one run, one after the other; and runs that build on each other, each finished after what it needs.

A run needs its catalogue (and the one that it refines, and the scores that its rules read), the checkpoint that it
starts from, its reference's, and the score cache. Which run of the chain makes each is read off their paths; what is
there is not made again.
"""

import importlib
from collections.abc import Iterable
from typing import Any

from jest_core.run_file import Run
from jest_core.run_file.rules import ScoreRule

from .base import manifests
from .training import train

STAGES = {  # in their order; the module of each, and what that imports once it is needed
    "ingest": ("data.ingest",),
    "catalogue": ("data.catalogue",),
    "reference-scores": ("scores.reference_scores",),
    "select": ("offline.select",),
    "train": ("training.train", "training.loop"),
    "evaluate": ("evaluation.evaluate",),
    "report": ("reports.report",),
}


def run_stages(run: Run, stages: list[str]) -> None:
    """Each does what is missing of it, so that the same stages again go on where they stopped."""
    refuse_stages(stages)
    # before the first: by the last, in hours, the code may be another, or the job's copy of it gone
    for module in (module for stage in stages for module in STAGES[stage]):
        importlib.import_module(f".{module}", __package__)
    for stage in stages:
        run_stage(stage, run)


def run_stage(stage: str, run: Run) -> Any:
    """One of STAGES, whose module is imported when its turn has come."""
    module: Any = importlib.import_module(f".{STAGES[stage][0]}", __package__)
    directory = run.path(run.run_dir)
    return module.run_stage([directory], f"{directory}/report.html") if stage == "report" else module.run_stage(run)


def refuse_stages(stages: list[str]) -> None:
    """Raises ValueError where there are none, or one that is not known."""
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        told = f"{', '.join(unknown)}: no stage" if unknown else "no stage named"
        raise ValueError(f"{told}; there are {' '.join(STAGES)}")


class Chain:
    """Runs below one root, of which some make what others use."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)
        self.finished: set[str] = set()  # run directories, by this process

    def finish(self, run: Run) -> str:
        """Train and evaluate the run, after what it builds on; returns its directory."""
        directory = run.path(run.run_dir)
        if directory in self.finished:
            return directory
        self._catalogue(run)
        self._made_by(run.training.initial_checkpoint)
        if run.uses_reference and run.reference is not None:
            self._made_by(run.reference.checkpoint)
        if run.reads_scores:
            self._scores(run)
        train.run_stage(run, run.run_dir.rsplit("/", 1)[-1])
        if run.evaluation is not None:
            run_stage("evaluate", run)
        self.finished.add(directory)
        return directory

    def _catalogue(self, run: Run) -> None:
        if manifests.is_finished(run.path(run.data.catalogue)):
            return
        if run.data.refines is not None and (wide := self._over(run.data.refines)) is not None:
            self._catalogue(wide)
        for rule in run.data.rules:
            if isinstance(rule, ScoreRule) and (scored := self._scoring(rule.scores)) is not None:
                self._scores(scored)
        run_stage("catalogue", run)

    def _made_by(self, checkpoint: str | None) -> None:
        """Finish the run that ends with this checkpoint, where it is one of the chain's."""
        made = next((other for other in self.runs if other.run_dir == checkpoint), None)
        if made is not None:
            self.finish(made)

    def _scores(self, run: Run) -> None:
        """The score cache, of the catalogue that the run's refines where it does: it serves those who refine it."""
        assert run.reference is not None
        if manifests.is_finished(run.path(run.reference.scores)):
            return
        self._made_by(run.reference.checkpoint)
        if (wide := self._over(run.data.refines)) is not None:
            run = run.model_copy(update={"data": wide.data})
        self._catalogue(run)
        run_stage("reference-scores", run)

    def _over(self, catalogue_dir: str | None) -> Run | None:
        """A run over this catalogue."""
        return next((run for run in self.runs if run.data.catalogue == catalogue_dir), None)

    def _scoring(self, scores: str | None) -> Run | None:
        """A run that reads this score cache."""
        return next((r for r in self.runs if r.reads_scores and r.reference and r.reference.scores == scores), None)
