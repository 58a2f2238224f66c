"""A first look at evaluation sets, before hours of training: are their pictures, classes and tasks there?"""

from itertools import islice

from jest_core.run_file import EvaluationSet, Pictures, Run

from ..base import progress, storage
from . import sets

_LOOKED_AT = 100  # examples of a set, among which some has a picture, and some captions where they are needed


def refuse_missing(run: Run) -> None:
    """Raises FileNotFoundError or ValueError, naming the set, where one that the run file names cannot be evaluated
    on. Of each set one picture is read, the first that is there."""
    for spec in run.evaluation.sets if run.evaluation else []:
        look(run, spec)


def before_training(run: Run, label: str) -> None:
    """Refuse missing sets, as above, where the training loop evaluates; warn where `jest evaluate` will need them."""
    try:
        refuse_missing(run)
    except Exception as error:  # whatever it is, a run is not to end for a warning
        if run.evaluation is not None and run.evaluation.every_steps:
            raise
        progress.warn(label, f"`jest evaluate` could not evaluate this run: {error}")


def look(run: Run, spec: EvaluationSet) -> None:
    """As `refuse_missing`, at one set."""
    try:
        _look(run, spec)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"evaluation.sets: {spec.name} is not there ({error}): put it there, correct the set, or evaluate on "
            "nothing with --set evaluation=null"
        ) from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"evaluation.sets: {spec.name}: {error}") from error


@storage.retried
def _look(run: Run, spec: EvaluationSet) -> None:
    _refuse_empty(run, spec, "it")
    for task in spec.tasks:
        if task == "zero_shot":
            sets.classes(run, spec)
        elif task == "few_shot":
            if spec.few_shot is None:
                raise ValueError("its task few_shot has no few_shot.pool: give the pool, or remove the task")
            _refuse_empty(run, spec.few_shot.pool, "its few_shot.pool")
            _refuse_unknown(run, spec.few_shot.classes)
        elif task == "retrieval":
            if not any(example.captions for example in islice(sets.examples(run, spec), _LOOKED_AT)):
                raise ValueError(
                    f"its task retrieval needs captions, and its first {_LOOKED_AT} pictures have none: correct its "
                    "shards or columns, or remove the task"
                )
        else:
            _refuse_unknown(run, task)


def _refuse_empty(run: Run, source: Pictures, what: str) -> None:
    if not any(example.read() for example in islice(sets.examples(run, source), _LOOKED_AT)):
        raise ValueError(f"{what} has no pictures: correct its shards, format or split")


def _refuse_unknown(run: Run, task: str | None) -> None:
    """Raises ValueError where the file evaluation.classes lacks a task."""
    if task is None:
        return
    there = sets.class_tasks(run)
    if task not in there:
        raise ValueError(
            f"task {task!r} is not in evaluation.classes, which has {', '.join(there) or 'no tasks'}: correct the "
            "task, or add it there"
        )
