"""Settings of a run that are allowed, and hardly meant: a line on each for its user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jest_core.run_file import Run

if TYPE_CHECKING:
    from jest_core.models.towers import Towers


def untrained_resolution(pair: Towers, run: Run) -> str | None:
    """A warning where the learner scores at a resolution that it is never trained at."""
    selection, low = run.selection, run.training.low_resolution
    scored = pair.resolution(selection.score_image_size, selection.score_patch_size)
    trained = [pair.resolution(low.image_size, low.patch_size)] if low else []
    if low is None or low.share < 1:
        trained.append(pair.resolution())
    if not run.uses_learner or scored in trained:
        return None
    patches = f" in patches of {scored.patch_size}" if scored.patch_size else ""
    return (
        f"scores at {scored.image_size} pixels{patches} and never trains at that, so that its scores are poor: set "
        "training.low_resolution to the same size"
    )


def unfinished_warmup(run: Run) -> str | None:
    """A warning where the run ends before its learning rate has reached its peak."""
    warmup = run.training.warmup_steps
    if warmup <= run.n_steps:
        return None
    return (
        f"training.warmup_steps {warmup} is more than the {run.n_steps} steps of the run, whose learning rate ends at "
        f"{run.n_steps / warmup:.2g} of training.learning_rate: lower the one, or train more examples"
    )


def repeated_reading(run: Run) -> str | None:
    """A warning where several learners read and decode the same windows."""
    from ..stream.source import streams_of

    n_learners, n_streams = run.training.max_learners, run.data.n_streams
    n_read = sum(len(streams_of(run, rank, n_learners)) for rank in range(n_learners))
    if n_read == n_streams:
        return None
    return (
        f"data.n_streams {n_streams} is no multiple of the {n_learners} learners, which read and decode "
        f"{n_read / n_streams:.3g} times as many pictures as they use: a multiple saves that, in a new run"
    )
