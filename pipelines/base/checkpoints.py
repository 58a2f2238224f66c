"""Checkpoints: open_clip's dictionary plus one `jest` key, written whole to any storage."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import storage

if TYPE_CHECKING:  # how far a run is, is asked without
    import torch

    from jest_core.models.towers import Towers

_PREFIX, _SUFFIX = "step_", ".pt"


def path_of(run_dir: str, step: int) -> str:
    """Where the checkpoint after `step` updates lies."""
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


def read(path: str) -> dict[str, Any]:
    """A checkpoint file, or a run directory's newest. Tensors and plain values only: nothing in it can run."""
    if not path.endswith(_SUFFIX):
        found = steps(path)
        if not found:
            raise FileNotFoundError(
                f"no checkpoint in {path}/checkpoints: train that run first, or name a checkpoint file"
            )
        path = path_of(path, found[-1])
    import torch

    data = storage.retried(storage.read_bytes)(path)
    checkpoint: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return checkpoint


def content(step: int, pair: Towers, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds beside the `jest` key."""
    state = {"state_dict": pair.model.state_dict(), "optimizer": optimizer.state_dict()}
    return {"epoch": step, "name": pair.name, **state}


def resume(run_dir: str, pair: Towers, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Take up the newest checkpoint of a run directory, if there is one; returns its `jest` key, or a new run's."""
    if not steps(run_dir):
        return {"step": 0, "seconds": 0.0, "log_parts": []}
    from jest_core.models import towers

    checkpoint = read(run_dir)
    towers.load_weights(pair, checkpoint)
    optimizer.load_state_dict(_placed(checkpoint["optimizer"], optimizer))
    found: dict[str, Any] = checkpoint["jest"]
    return found


def _placed(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole state, of sharded parameters this learner's share."""
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
    """Remove half-written checkpoints and metrics, which a try that was killed has left."""
    for folder, prefix in ((f"{run_dir}/checkpoints", _PREFIX), (run_dir, "metrics.jsonl.")):
        for name in storage.names(folder, ".tmp"):
            if name.startswith(prefix):
                storage.remove(f"{folder}/{name}")


def copied(value: Any, *, keep: bool = True) -> Any:
    """A checkpoint's content with whole tensors of its own, on the host: what trains on does not change them.

    Collective where towers are sharded; keep=False takes part in that, and keeps no tensor.
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
    """Writes in a thread of its own, one thing after the other; errors come with the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Wait for what was submitted before, and start this."""
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
