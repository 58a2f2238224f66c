"""A run's directory: whether a run file may begin there, go on there, or make the run that is there longer."""

from functools import partial
from typing import Any

from jest_core import run_file
from jest_core.run_file import Run

from ..base import checkpoints, manifests

_BUDGET = {"training.examples_trained", "training.cooldown_steps"}


def claim(run: Run, stage: str = "train") -> dict[str, Any] | None:
    """Begin there, or go on: the manifest where the run is finished, else None.

    Raises ValueError, naming what differs and the way on, where the directory belongs to another run.
    """
    return manifests.begin(run.path(run.run_dir), stage, run_file.identity(run), dict[str, Any], **_changes(run, stage))


def refuse_other(run: Run, stage: str = "train") -> dict[str, Any] | None:
    """Raise as `claim` would, and write nothing; the manifest that is there, None of a new directory."""
    return manifests.refuse_other(
        run.path(run.run_dir), stage, run_file.identity(run), dict[str, Any], **_changes(run, stage)
    )


def _changes(run: Run, stage: str) -> dict[str, Any]:
    return {"today": partial(run_file.in_todays_fields, run=run), "extends": partial(_extends, run, stage)}


def _extends(run: Run, stage: str, old: run_file.Identity, differing: list[str]) -> bool:
    """Whether only the budget differs, and all steps so far are those of the new one too.

    They are where the learning rate does not depend on the budget: up to the cool-down of the schedules rsqrt and
    constant. A loop of one's own (stage `sub-batches`) has a schedule of its own. Raises ValueError, with the way on,
    where that is over.
    """
    if not set(differing) <= _BUDGET:
        return False
    training, directory = run.training, run.path(run.run_dir)
    reached = (checkpoints.steps(directory) or [0])[-1]
    old_steps = old["training.examples_trained"] // run.sub_batch_size
    new = run_file.identity(run)
    changes = "; ".join(f"{key}: there {old[key]:,}, here {new[key]:,}" for key in differing)
    if reached > run.n_steps:
        raise ValueError(f"{directory} has a checkpoint after step {reached:,}, which is past the budget ({changes})")
    if stage != "train":
        return True
    same_until = 0
    if training.schedule != "cosine":
        same_until = min(
            _full_rate(old_steps, old["training.cooldown_steps"]), _full_rate(run.n_steps, training.cooldown_steps)
        )
    if reached <= same_until:
        return True
    raise ValueError(
        f"{directory} has a checkpoint after step {reached:,}, and with another budget ({changes}) the learning rates "
        f"of training.schedule {training.schedule} are the same up to step {same_until:,} only: choose another "
        "directory, and start it from a checkpoint of this one by training.initial_checkpoint"
    )


def _full_rate(n_steps: int, cooldown_steps: int) -> int:
    """How many of the first steps no cool-down makes slower: at its first the factor is still 1."""
    return n_steps - max(0, cooldown_steps - 1)
