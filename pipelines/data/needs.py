"""What a stage needs of the run file and of the stages before it, as far as it is told without PyTorch and Ray."""

from typing import Any

from jest_core.run_file import Run

from ..base import manifests
from .catalogue import Catalogue, open_catalogue


def reference_scores(run: Run) -> Catalogue:
    """The catalogue that is scored. Raises ValueError where there is nothing to score with."""
    if run.reference is None:
        raise ValueError("the run file has no `reference` part: nothing to score with")
    return open_catalogue(run.path(run.data.catalogue))


def evaluate(run: Run) -> None:
    """Raises ValueError where there is nothing to evaluate on."""
    if run.evaluation is None:
        raise ValueError("the run file has no `evaluation` part: nothing to evaluate on")


def report(directory: str) -> dict[str, Any]:
    """A finished run's manifest. Raises FileNotFoundError where the run is not finished."""
    return manifests.finished(directory, "train", dict[str, Any], "train it first")
