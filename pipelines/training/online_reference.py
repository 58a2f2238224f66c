"""The reference of a run with reference.online: its weights, which have to be the same after every resume."""

from __future__ import annotations

from dataclasses import dataclass

from jest_core.models import towers
from jest_core.models.towers import Towers
from jest_core.run_file import Run

from ..base import checkpoints
from ..scores.embedder import load_reference


@dataclass(frozen=True)
class Online:
    """The reference that scores in the learner, and the record of its weights for the run's checkpoints."""

    towers: Towers
    record: checkpoints.OnlineReference

    @property
    def short_hash(self) -> int:
        """48 bits of the hash of the weights, to compare between learners."""
        return int(self.record["weights"][:12], 16)


def load(run: Run) -> Online | None:
    """The reference on the host; None where the run reads a score cache, or needs no reference.

    reference.checkpoint may be a run directory: the file that is its newest now is the one that is recorded.
    """
    if not run.uses_reference or run.reads_scores:
        return None
    assert run.reference is not None
    spec, path = run.reference, None
    if spec.checkpoint is not None:
        path = checkpoints.file_of(run.path(spec.checkpoint))
        spec = spec.model_copy(update={"checkpoint": path})
    pair = load_reference(run, spec)
    return Online(pair, {"checkpoint": path, "weights": towers.weights_hash(pair.model)})


def refuse_other(run: Run, state: checkpoints.State, online: Online | None) -> None:
    """Raises ValueError where the steps so far were scored with other weights than those that were loaded now.

    Checkpoints of versions that recorded no reference go on.
    """
    before = state.get("reference")
    if before is None or online is None or before["weights"] == online.record["weights"]:
        return
    assert run.reference is not None
    raise ValueError(
        f"{run.path(run.run_dir)}: the steps up to {state['step']:,} were scored with the reference weights of "
        f"{before['checkpoint']} (SHA-256 {before['weights'][:12]}), and reference.checkpoint "
        f"{run.reference.checkpoint} is now {online.record['checkpoint']} with other weights (SHA-256 "
        f"{online.record['weights'][:12]}): restore the earlier file, and move the later checkpoints out of its "
        "directory; or start another run_dir from this run's weights, with training.initial_checkpoint"
    )
