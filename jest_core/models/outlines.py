"""Facts about a model by its name: widths, sizes, parameters, FLOPs, and which resolutions its image tower refuses.

Computing them needs PyTorch and open_clip, whose imports take seconds, and gives the same for the same releases of
these: each result is cached in the user's cache folder (XDG_CACHE_HOME, or ~/.cache), and looked up there first.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar, cast

from jest_core.models import folders

if TYPE_CHECKING:
    from jest_core.models.trial import Trial
    from jest_core.run_file import Model, Run

_DECISIVE = ("open_clip_torch", "timm", "torch")  # packages whose releases may change a result

Function = TypeVar("Function", bound=Callable[..., Any])


class _Cached(TypedDict):
    """A file of the cache folder."""

    question: str
    answer: Any  # a value of JSON


class _Resolution(TypedDict):
    """A resolution that a model works at, or why it does not."""

    refused: NotRequired[str]
    image_size: NotRequired[int]
    patch_size: NotRequired[int | None]


def cached(function: Function) -> Function:
    """Cache the results of a function in the process and on disk; its arguments and results are values of JSON."""

    @lru_cache(maxsize=256)
    def look_up(*arguments: Any) -> Any:
        question = json.dumps([function.__name__, *arguments, _releases(), *_folder_contents(arguments)])
        path = _folder() / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"
        try:
            stored: _Cached = json.loads(path.read_text())
            if stored["question"] == question:
                return stored["answer"]
        except (OSError, ValueError, KeyError):  # not there, or damaged: it is computed again
            pass
        answer = function(*arguments)
        _write(path, {"question": question, "answer": answer})
        return answer

    return cast(Function, look_up)


@cached
def width(name: str) -> int:
    """Width of an open_clip model's embeddings."""
    from jest_core.models import configurations

    return configurations.width(name)


@cached
def image_size(name: str) -> int:
    """Size of an open_clip model's images, in pixels a side."""
    from jest_core.models import configurations

    return configurations.image_size(name)


@cached
def patch_size(name: str) -> int | None:
    """The patch size of an image tower in pixels a side; None where it has no patches of variable size."""
    from jest_core.models import flexible, towers

    visual = towers.outline(name).visual
    return flexible.patch_size(visual) if flexible.is_flexible(visual) else None


@cached
def n_parameters(name: str, context_length: int | None) -> int:
    """Number of parameters of both towers, with logit_scale and logit_bias."""
    from jest_core.models import towers

    return sum(p.numel() for p in towers.outline(name, context_length).parameters())


@cached
def n_gathered(name: str, context_length: int | None) -> int:
    """How many weights a learner with sharded towers has whole at the same time, at most."""
    from jest_core.models import sharding, towers

    return sharding.n_gathered(towers.outline(name, context_length))


@cached
def forward_flops(
    name: str, context_length: int | None, image_size: int | None, patch_size: int | None
) -> tuple[float, float]:
    """FLOPs of one pair through the image and the text tower, at the model's resolution if no other is given."""
    from jest_core.models import flop_counts

    return flop_counts.forward_flops(name, context_length, image_size, patch_size)


@cached
def training_trial(name: str, context_length: int | None) -> "Trial":
    """What a training pass of the model would do unseen."""
    from jest_core.models import towers, trial

    return trial.training_pass(towers.without_weights(name, context_length))


@cached
def _resolution(
    name: str, context_length: int | None, part: str, image_size: int | None, patch_size: int | None
) -> _Resolution:
    """The resolution of a model with these sizes, or why the model does not work at it."""
    from jest_core import run_file
    from jest_core.models import towers

    model = run_file.Model(name=name, context_length=context_length)
    try:
        resolution = towers.refuse_resolution(model, part, image_size, patch_size)
    except ValueError as error:
        return {"refused": str(error)}
    return {"image_size": resolution.image_size, "patch_size": resolution.patch_size}


def refuse_resolutions(run: "Run") -> None:
    """Raises ValueError where a model of the run does not work at its resolutions, or where a setting has no effect."""

    def resolution(model: "Model", part: str, image_size: int | None, patch_size: int | None) -> _Resolution:
        answer = _resolution(model.name, model.context_length, part, image_size, patch_size)
        if "refused" in answer:
            raise ValueError(answer["refused"])
        return answer

    selection, low = run.selection, run.training.low_resolution
    scored = resolution(run.model, "selection.score_", selection.score_image_size, selection.score_patch_size)
    full = resolution(run.model, "", None, None)
    if low is not None and resolution(run.model, "training.low_resolution.", low.image_size, low.patch_size) == full:
        raise ValueError(f"training.low_resolution is that of {run.model.name} itself: make it lower, or leave it out")
    if selection.agreement_every_steps and selection.selects and scored == full:
        raise ValueError(
            "selection.agreement_every_steps compares with scoring at full resolution, which is what this run does: "
            "give selection.score_image_size or selection.score_patch_size, or leave it out"
        )
    if run.reference is not None and run.reference.features is None:
        sizes = run.reference.score_image_size, run.reference.score_patch_size
        resolution(run.reference.model, "reference.score_", *sizes)


def _folder_contents(arguments: tuple[Any, ...]) -> list[Any]:
    """The configurations of models that are named by their folders, which can change."""
    return [folders.read(x) for x in arguments if isinstance(x, str) and x.startswith(folders.PREFIX)]


def refuse_hidden_state(model: "Model") -> None:
    """Raises ValueError where a checkpoint would not have all that decides the learner's next step."""
    if hidden := training_trial(model.name, model.context_length)["hidden"]:
        raise ValueError(
            f"model.name {model.name} has state beside its weights ({'; '.join(hidden[:3])}), so that a resumed run "
            "would differ: choose a model without"
        )


def untrained_parameters(model: "Model") -> str | None:
    """A warning where the contrastive loss does not train all of a model."""
    names = training_trial(model.name, model.context_length)["untrained"]
    if not names:
        return None
    tops = [name.split(".")[0] for name in names]
    where = ", ".join(f"{top} {tops.count(top)}" for top in dict.fromkeys(tops))
    return (
        f"{len(names)} parameters of {model.name} get no gradient from the contrastive loss and keep their first "
        f"values ({where}): another model.name trains all that it has"
    )


@lru_cache
def _releases() -> list[str]:
    """What decides a result: releases of packages, and a hash of jest's model configurations and of the code."""
    configs = sorted(Path(__file__).parent.glob("configs/*.json"))
    described = hashlib.sha256(b"".join(path.read_bytes() for path in [*configs, *_CODE])).hexdigest()
    return [*(version(package) for package in _DECISIVE), described]


_CODE = [
    Path(__file__).parent / f"{name}.py"
    for name in ("outlines", "folders", "flop_counts", "configurations", "towers", "flexible", "sharding", "trial")
]


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jest" / "outlines"


def _write(path: Path, content: _Cached) -> None:
    """Atomically. Where the folder cannot be written, results are computed again each time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, path)
    except OSError:
        return
