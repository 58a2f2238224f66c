"""Stages of one run, one after the other; and runs that build on each other, each finished after what it needs.

A run needs its catalogue (and the one that it refines, and the scores that its rules read), the checkpoint that it
starts from, its reference's, and the score cache. Which run of the chain makes each is read off their paths; what is
there is not made again.
"""

from collections.abc import Iterable, Sequence

from jest_core.run_file import Run
from jest_core.run_file.rules import ScoreRule

from .base import cluster, manifests
from .base.stage_table import STAGES, Stage
from .evaluation import first_look
from .training import train


@cluster.watched()
def run_stages(run: Run, names: Sequence[str]) -> None:
    """Run stages one after the other. Each does what is missing of it, so that the same call again goes on where the
    last one stopped.

    Raises, before the first starts, ValueError where one of them has nothing to do for this run file, and
    FileNotFoundError where one would have nothing to start from, or `evaluate` no pictures.
    """
    stages = named(names)
    refuse(run, stages)
    for position, stage in enumerate(stages):
        _refuse_without_input(run, stage, names[:position])
        if stage.name == "evaluate" and not stage.is_done(run):
            first_look.refuse_missing(run)
    # all modules before the first stage: hours later the files of the code may have changed, or the job's copy be gone
    functions = [stage.load() for stage in stages]
    for function in functions:
        function(run)


@cluster.watched()
def run_stage(name: str, run: Run, **options: object) -> object:
    """One stage, with options of its own; its modules are imported now. Raises as `run_stages` does."""
    stage = STAGES[name]
    stage.refuse(run)
    if not options.get("watch"):  # which waits for the checkpoints of a run that trains
        _refuse_without_input(run, stage)
    return stage.load()(run, **options)


def named(names: Sequence[str]) -> list[Stage]:
    """The stages of these names. Raises ValueError for a name that is no stage's, or for none at all."""
    if unknown := [name for name in names if name not in STAGES]:
        raise ValueError(f"{', '.join(unknown)}: no such stage; the stages are {' '.join(STAGES)}")
    if not names:
        raise ValueError(f"name at least one stage of {' '.join(STAGES)}")
    return [STAGES[name] for name in names]


def refuse(run: Run, stages: Sequence[Stage]) -> None:
    """Raises ValueError where one of the stages has nothing to do for this run file."""
    for stage in stages:
        stage.refuse(run)


def _refuse_without_input(run: Run, stage: Stage, before: Sequence[str] = ()) -> None:
    """before: stages that will have run."""
    for needed in stage.after(run):
        if needed not in before and not STAGES[needed].can_be_used(run):
            directory = STAGES[needed].directory(run)
            raise FileNotFoundError(
                f"`jest {stage.name}` needs {directory}, which is not there or not finished: run `jest {needed}` first"
            )


class Chain:
    """Runs below one root, of which some make what others use."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)
        self.finished: set[str] = set()  # run directories, by this process

    @cluster.watched()
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
        train.run_stage(run, label=run.run_dir.rsplit("/", 1)[-1])
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
