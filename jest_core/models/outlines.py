"""What a plan has to know of a model, by its name: widths, sizes, parameters, FLOPs, and what its image tower refuses.

Counting them needs PyTorch and open_clip, whose imports take seconds, and gives the same for the same releases of
these: each answer is kept in the user's cache folder (XDG_CACHE_HOME, or ~/.cache), and asked for there first.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jest_core.run_file import Model, Run

_DECISIVE = ("open_clip_torch", "timm", "torch")  # releases that may change an answer


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function of plain values, to a plain value: each answer is kept, in the process and on disk."""

    @lru_cache(maxsize=256)
    def asked(*arguments: Any) -> Any:
        question = json.dumps([function.__name__, *arguments, _releases()])
        path = _folder() / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"
        try:
            kept = json.loads(path.read_text())
            if kept["question"] == question:
                return kept["answer"]
        except (OSError, ValueError, KeyError):  # none there, or damaged: it is counted again
            pass
        answer = function(*arguments)
        _keep(path, {"question": question, "answer": answer})
        return answer

    return asked


@remembered
def width(name: str) -> int:
    """Of an open_clip model's embeddings."""
    from jest_core.models import configurations

    return configurations.width(name)


@remembered
def image_size(name: str) -> int:
    """Of the pictures that an open_clip model takes, in pixels a side."""
    from jest_core.models import configurations

    return configurations.image_size(name)


@remembered
def patch_size(name: str) -> int | None:
    """Of an image tower whose patches can change, its own in pixels a side; None of any other."""
    from jest_core.models import flexible, towers

    visual = towers.outline(name).visual
    return flexible.patch_size(visual) if flexible.is_flexible(visual) else None


@remembered
def n_parameters(name: str, context_length: int | None) -> int:
    """Of both towers, logit_scale and logit_bias."""
    from jest_core.models import towers

    return sum(p.numel() for p in towers.outline(name, context_length).parameters())


@remembered
def n_gathered(name: str, context_length: int | None) -> int:
    """How many weights a learner with sharded towers holds whole at once, at most."""
    from jest_core.models import sharding, towers

    return sharding.n_gathered(towers.outline(name, context_length))


@remembered
def forward_flops(
    name: str, context_length: int | None, image_size: int | None, patch_size: int | None
) -> tuple[float, float]:
    """Of one pair through the image and the text tower, at the model's own resolution unless another is given."""
    from jest_core.models import flop_counts

    return flop_counts.forward_flops(name, context_length, image_size, patch_size)


@remembered
def _resolution(
    name: str, context_length: int | None, part: str, image_size: int | None, patch_size: int | None
) -> dict[str, Any]:
    """The resolution that a model has with these sizes, or why it has none."""
    from jest_core import run_file
    from jest_core.models import towers

    model = run_file.Model(name=name, context_length=context_length)
    try:
        found = towers.refuse_resolution(model, part, image_size, patch_size)
    except ValueError as error:
        return {"refused": str(error)}
    return {"image_size": found.image_size, "patch_size": found.patch_size}


def refuse_resolutions(run: "Run") -> None:
    """Raises ValueError where the models of a run cannot score or train so, or settings would do nothing."""

    def resolution(model: "Model", part: str, image_size: int | None, patch_size: int | None) -> dict[str, Any]:
        found: dict[str, Any] = _resolution(model.name, model.context_length, part, image_size, patch_size)
        if "refused" in found:
            raise ValueError(found["refused"])
        return found

    selection, low = run.selection, run.training.low_resolution
    scored = resolution(run.model, "selection.score_", selection.score_image_size, selection.score_patch_size)
    own = resolution(run.model, "", None, None)
    if low is not None and resolution(run.model, "training.low_resolution.", low.image_size, low.patch_size) == own:
        raise ValueError(f"training.low_resolution is that of {run.model.name} itself: make it lower, or leave it out")
    if selection.agreement_every_steps and selection.method != "uniform" and scored == own:
        raise ValueError(
            "selection.agreement_every_steps compares with scoring at full resolution, which is what this run does: "
            "give selection.score_image_size or selection.score_patch_size, or leave it out"
        )
    if run.reference is not None and run.reference.features is None:
        sizes = run.reference.score_image_size, run.reference.score_patch_size
        resolution(run.reference.model, "reference.score_", *sizes)


@lru_cache
def _releases() -> list[str]:
    """Of what decides an answer: the packages, and the models that jest describes itself."""
    own = sorted(Path(__file__).parent.glob("configs/*.json"))
    described = hashlib.sha256(b"".join(path.read_bytes() for path in [*own, *_CODE])).hexdigest()
    return [*(version(package) for package in _DECISIVE), described]


_CODE = [
    Path(__file__).parent / f"{name}.py"
    for name in ("outlines", "flop_counts", "configurations", "towers", "flexible", "sharding")
]


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jest" / "outlines"


def _keep(path: Path, kept: dict[str, Any]) -> None:
    """Whole or not at all. Where the folder cannot be written, it is counted again each time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(kept, file)
        os.replace(file.name, path)
    except OSError:
        return
