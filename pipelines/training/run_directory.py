"""A run's directory: whether a run file may begin there, go on there, or make the run that is there longer."""

from functools import partial
from typing import Any

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import checkpoints, storage

_BUDGET = {"training.examples_trained", "training.cooldown_steps"}


def claim(run: Run, stage: str = "train") -> dict[str, Any] | None:
    """Begin there, or go on: the manifest where the run is finished, else None.

    Raises ValueError, naming what differs and the way on, where the directory belongs to another run.
    """
    return storage.begin(run.path(run.run_dir), stage, run_file.identity(run), **_changes(run))


def refuse_other(run: Run, stage: str = "train") -> None:
    """Raise as `claim` would, and write nothing."""
    storage.refuse_other(run.path(run.run_dir), stage, run_file.identity(run), **_changes(run))


def _changes(run: Run) -> dict[str, Any]:
    return {"today": partial(run_file.in_todays_fields, run=run), "extends": partial(_extends, run)}


def _extends(run: Run, old: run_file.Identity, differing: list[str]) -> bool:
    """Whether only the budget differs, and all steps so far are those of the new one too.

    They are where the learning rate does not depend on the budget: up to the cool-down of the schedules rsqrt and
    constant. Raises ValueError, with the way on, where that is over.
    """
    if not set(differing) <= _BUDGET:
        return False
    training, directory = run.training, run.path(run.run_dir)
    old_steps = old["training.examples_trained"] // run.sub_batch_size
    budgets = f"{directory} was begun with {old_steps:,} steps, and this run file has {run.n_steps:,}"
    if training.schedule == "cosine":
        raise ValueError(
            f"{budgets}: with training.schedule cosine every learning rate depends on that number; choose another "
            "directory, and start from this run's weights with training.initial_checkpoint"
        )
    reached = (checkpoints.steps(directory) or [0])[-1]
    same_until = min(old_steps - old["training.cooldown_steps"], run.n_steps - training.cooldown_steps)
    if reached > same_until:
        raise ValueError(
            f"{budgets}; it has a checkpoint after step {reached:,}, and their learning rates are the same up to step "
            f"{same_until:,} only, where the cool-down or the end of one of them is: remove the checkpoints after that "
            "step to go on from there, or choose another directory"
        )
    return True
