"""Checkpoints: open_clip's dictionary plus one `jest` key, written whole to any storage."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from . import storage

if TYPE_CHECKING:  # PyTorch is not needed to list checkpoints
    import torch

    from jest_core.models.towers import Towers

_PREFIX, _SUFFIX = "step_", ".pt"


class OnlineReference(TypedDict):
    """The reference whose weights scored the super-batches, of a run with reference.online."""

    checkpoint: str | None  # path of its file; None of model.pretrained
    weights: str  # SHA-256 of the names, shapes and values of its weights


class State(TypedDict):
    """The `jest` key: where a run goes on."""

    step: int  # finished updates
    seconds: float  # of these steps
    log_parts: list[str]  # of the selection log, as in commits.jsonl: versions before that file resume by them
    reference: NotRequired[OnlineReference | None]  # versions before this key did not record it


def path_of(run_dir: str, step: int) -> str:
    """Path of the checkpoint after `step` updates."""
    return f"{run_dir}/checkpoints/{_PREFIX}{step:08d}{_SUFFIX}"


@storage.retried
def steps(run_dir: str) -> list[int]:
    """Numbers of updates after which there is a checkpoint, ascending."""
    found = storage.names(f"{run_dir}/checkpoints", _SUFFIX)
    return [int(name.removeprefix(_PREFIX).removesuffix(_SUFFIX)) for name in found if name.startswith(_PREFIX)]


def write(run_dir: str, step: int, content: dict[str, Any]) -> None:
    import torch

    sink = io.BytesIO()
    torch.save(content, sink)
    storage.write_bytes(path_of(run_dir, step), sink.getvalue())


def file_of(path: str) -> str:
    """The checkpoint file that a path names: itself, or of a run directory its newest.

    Raises FileNotFoundError where the run directory has none.
    """
    if path.endswith(_SUFFIX):
        return path
    found = steps(path)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {path}/checkpoints: train that run first, or name a checkpoint file")
    return path_of(path, found[-1])


def read(path: str) -> dict[str, Any]:
    """A checkpoint file, or a run directory's newest. Tensors and plain values only: nothing in it can run."""
    path = file_of(path)
    import torch

    data = storage.retried(storage.read_bytes)(path)
    checkpoint: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return checkpoint


def content(step: int, pair: Towers, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A checkpoint's keys but for `jest`."""
    state = {"state_dict": pair.model.state_dict(), "optimizer": optimizer.state_dict()}
    return {"epoch": step, "name": pair.name, **state}


def resume(run_dir: str, pair: Towers, optimizer: torch.optim.Optimizer) -> State:
    """Load model and optimizer from the newest checkpoint of a run directory, if there is one.

    Returns its `jest` key, or that of a run before its first step.
    """
    if not steps(run_dir):
        return State(step=0, seconds=0.0, log_parts=[])
    from jest_core.models import towers

    checkpoint = read(run_dir)
    towers.load_weights(pair, checkpoint)
    optimizer.load_state_dict(_placed(checkpoint["optimizer"], optimizer))
    state: State = checkpoint["jest"]
    return state


def _placed(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state as this learner needs it: of sharded parameters its share."""
    import torch

    from jest_core.models import sharding

    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def share(number: int, values: dict[str, Any]) -> dict[str, Any]:
        own = parameters[number]
        same = {name: isinstance(v, torch.Tensor) and v.shape == own.shape for name, v in values.items()}
        return {name: sharding.placed(v, own) if same[name] else v for name, v in values.items()}

    return state | {"state": {number: share(number, values) for number, values in state["state"].items()}}


def prune(run_dir: str, keep_last: int | None, keep_every: int | None) -> None:
    """Remove all checkpoints but the last few and those of every so many steps; none where keep_last is None."""
    if keep_last is None:
        return
    for step in steps(run_dir)[:-keep_last]:
        if keep_every is None or step % keep_every:
            storage.remove(path_of(run_dir, step))


@storage.retried
def tidy(run_dir: str) -> None:
    """Remove the half-written checkpoints and metrics of a killed run."""
    for folder, prefix in ((f"{run_dir}/checkpoints", _PREFIX), (run_dir, "metrics.jsonl.")):
        for name in storage.names(folder, ".tmp"):
            if name.startswith(prefix):
                storage.remove(f"{folder}/{name}")


def copied(value: Any, *, keep: bool = True) -> Any:
    """A checkpoint's content with its tensors copied to the host, whole: further training does not change them.

    Collective where towers are sharded: every learner calls it, and those that pass keep=False get None for tensors.
    """
    import torch

    from jest_core.models import sharding

    if isinstance(value, torch.Tensor):
        whole = sharding.whole(value.detach())
        return whole.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {key: copied(part, keep=keep) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(part, keep=keep) for part in value)
    return value


class Writer:
    """Writes in a background thread, in the order of the calls; an error is raised by the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Wait for the write before, and start this one."""
        self.wait()
        self._last = self._thread.submit(write)

    def wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()
