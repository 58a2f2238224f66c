"""Stages of one run, one after the other; and runs that build on each other, each finished after what it needs.

A run needs its catalogue (and the one that it refines, and the scores that its rules read), the checkpoint that it
starts from, its reference's, and the score cache. Which run of the chain makes each is read off their paths; what is
there is not made again.
"""

from collections.abc import Callable, Iterable
from typing import Any

from jest_core.config import Run
from jest_core.rules import ScoreRule
from pipelines import catalogue, evaluation, ingest, learner, reference_scores, report, storage, subset

STAGES: dict[str, Callable[[Run], Any]] = {
    "ingest": ingest.run_stage,
    "catalogue": catalogue.run_stage,
    "reference-scores": reference_scores.run_stage,
    "select": subset.run_stage,
    "train": learner.run_stage,
    "evaluate": evaluation.run_stage,
    "report": lambda run: report.run_stage([run.path(run.run_dir)], f"{run.path(run.run_dir)}/report.html"),
}


def run_stages(run: Run, stages: list[str]) -> None:
    """Each does what is missing of it, so that the same stages again go on where they stopped."""
    refuse_stages(stages)
    for stage in stages:
        STAGES[stage](run)


def refuse_stages(stages: list[str]) -> None:
    """Raises ValueError where there are none, or one that is not known."""
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown or not stages:
        told = f"{', '.join(unknown)}: no stage" if unknown else "no stage named"
        raise ValueError(f"{told}; there are {' '.join(STAGES)}")


class Chain:
    """Runs below one root, of which some make what others use. in_process: as of the train stage."""

    def __init__(self, runs: Iterable[Run], *, in_process: bool = False) -> None:
        self.runs, self.in_process = list(runs), in_process
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
        learner.run_stage(run, run.run_dir.rsplit("/", 1)[-1], in_process=self.in_process)
        if run.evaluation is not None:
            evaluation.run_stage(run)
        self.finished.add(directory)
        return directory

    def _catalogue(self, run: Run) -> None:
        if storage.is_finished(run.path(run.data.catalogue)):
            return
        if run.data.refines is not None and (wide := self._over(run.data.refines)) is not None:
            self._catalogue(wide)
        for rule in run.data.rules:
            if isinstance(rule, ScoreRule) and (scored := self._scoring(rule.scores)) is not None:
                self._scores(scored)
        catalogue.run_stage(run)

    def _made_by(self, checkpoint: str | None) -> None:
        """Finish the run that ends with this checkpoint, where it is one of the chain's."""
        made = next((other for other in self.runs if other.run_dir == checkpoint), None)
        if made is not None:
            self.finish(made)

    def _scores(self, run: Run) -> None:
        """The score cache, of the catalogue that the run's refines where it does: it serves those who refine it."""
        assert run.reference is not None
        if storage.is_finished(run.path(run.reference.scores)):
            return
        self._made_by(run.reference.checkpoint)
        if (wide := self._over(run.data.refines)) is not None:
            run = run.model_copy(update={"data": wide.data})
        self._catalogue(run)
        reference_scores.run_stage(run)

    def _over(self, catalogue_dir: str | None) -> Run | None:
        """A run over this catalogue."""
        return next((run for run in self.runs if run.data.catalogue == catalogue_dir), None)

    def _scoring(self, scores: str | None) -> Run | None:
        """A run that reads this score cache."""
        return next((r for r in self.runs if r.reads_scores and r.reference and r.reference.scores == scores), None)
