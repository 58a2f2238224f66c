"""A run's directory: whether a run file may begin there, go on there, or make the run that is there longer."""

from functools import partial
from typing import Any, TypedDict

from jest_core import run_file
from jest_core.run_file import Run

from ..base import checkpoints, manifests, owner

_BUDGET = {"training.examples_trained", "training.cooldown_steps"}


class TrainManifest(TypedDict):
    """manifest.json of the stage train; from `steps` on once it is complete. FLOPs are those of one step, by part."""

    stage: str
    complete: bool
    config: run_file.Identity
    steps: int
    examples_seen: int  # of the super-batches
    examples_trained: int  # of the sub-batches
    seconds: float  # of all steps
    flops_step: float  # as executed
    flops_step_with_reuse: float  # with the scoring forward of the selected examples counted as reused
    flops_score: float
    flops_reference: float
    flops_select: float
    flops_train: float
    flops_loss: float
    flops_optimizer: float
    flops_agreement: float
    fingerprint: str


def claim(run: Run, stage: str = "train") -> TrainManifest | None:
    """Begin a run in its directory, or go on; returns the manifest where the run is finished, else None.

    `base/manifests.py:refuse_other` compares the fields of `run_file.identity`, of which each that differs is a refusal
    unless `_extends` allows it.
    Raises ValueError, naming the values that differ and what to do, where the directory belongs to another run.
    """
    return manifests.begin(run.path(run.run_dir), stage, run_file.identity(run), TrainManifest, **_changes(run, stage))


def own(run: Run) -> TrainManifest | None:
    """Become the owner of the run's directory; returns the manifest instead where the run is finished.

    Raises as `refuse_other` does, and owner.Owned where another process trains there.
    """
    manifest = refuse_other(run)
    if manifest is None or not manifest["complete"]:
        owner.claim(run.path(run.run_dir))
        manifest = refuse_other(run)  # another owner may have finished it meanwhile
    return manifest if manifest is not None and manifest["complete"] else None


def refuse_other(run: Run, stage: str = "train") -> TrainManifest | None:
    """Raise as `claim` would, and write nothing; returns the directory's manifest, None of a new directory."""
    return manifests.refuse_other(
        run.path(run.run_dir), stage, run_file.identity(run), TrainManifest, **_changes(run, stage)
    )


def _changes(run: Run, stage: str) -> dict[str, Any]:
    return {"today": partial(run_file.in_todays_fields, run=run), "extends": partial(_extends, run, stage)}


def _extends(run: Run, stage: str, old: run_file.Identity, differing: list[str]) -> bool:
    """Whether only the budget differs, and all steps so far are those of the new one too.

    That is so while the learning rate does not depend on the budget: up to the cool-down of the schedules rsqrt and
    constant. The schedule of a user's loop (stage `sub-batches`) is not in the run file, and any budget will do. Raises
    ValueError, with what to do, where steps would differ.
    """
    if not set(differing) <= _BUDGET:
        return False
    training, directory = run.training, run.path(run.run_dir)
    reached = (checkpoints.steps(directory) or [0])[-1]
    old_steps = old["training.examples_trained"] // run.sub_batch_size
    new = run_file.identity(run)
    changes = "; ".join(f"{key}: there {old[key]:,}, here {new[key]:,}" for key in differing)
    if reached > run.n_steps:
        raise ValueError(
            f"{directory} has a checkpoint after step {reached:,}, which is past the budget ({changes}): give the "
            "earlier budget, or another run_dir"
        )
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
    """How many of the first steps have the full learning rate: that of the cool-down's first step is still full."""
    return n_steps - max(0, cooldown_steps - 1)
