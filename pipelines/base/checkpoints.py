"""Checkpoints: the dictionary that open_clip reads and writes, plus the key `jest`; on any storage, atomic."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

from . import storage
from .integrity import Damaged, refuse_damaged_zip

if TYPE_CHECKING:  # PyTorch takes seconds to import, and listing checkpoints needs none of it
    import torch

    from jest_core.models.folders import OpenClipConfig
    from jest_core.models.towers import Towers

_PREFIX, _SUFFIX = "step_", ".pt"
_NAME = re.compile(rf"{_PREFIX}(\d{{8,}}){re.escape(_SUFFIX)}")  # another name is not jest's, and is left alone
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # of a folder that another program wrote
_USUAL_NAMES = (  # the one that open_clip's `local-dir:` reads first
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)


class OnlineReference(TypedDict):
    """The reference whose weights scored the super-batches, of a run with reference.online."""

    checkpoint: str | None  # path of its file; None of model.pretrained
    weights: str  # SHA-256 of the names, shapes and values of its weights


class State(TypedDict):
    """The `jest` key: where a run goes on."""

    step: int  # finished updates
    seconds: float  # of these steps
    log_parts: list[str]  # of the selection log, as in commits.jsonl: versions before that file resume by them
    open_clip_config: NotRequired[OpenClipConfig]  # which model it is, and how it sees pictures; newer than the others
    reference: NotRequired[OnlineReference | None]  # versions before this key did not record it


class OptimizerState(TypedDict):
    """`state_dict()` of a PyTorch optimizer: values by parameter number, and its groups of parameters."""

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class Checkpoint(TypedDict, total=False):
    """A checkpoint as jest writes it: open_clip reads the first four keys. epoch: number of updates."""

    epoch: int
    name: str
    state_dict: dict[str, torch.Tensor]
    optimizer: OptimizerState
    jest: State


def path_of(run_dir: str, step: int) -> str:
    """The path of the checkpoint that is written after `step` updates."""
    return f"{run_dir}/checkpoints/{_PREFIX}{step:08d}{_SUFFIX}"


@storage.retried
def steps(run_dir: str) -> list[int]:
    """Numbers of updates after which there is a checkpoint, ascending."""
    names = storage.names(f"{run_dir}/checkpoints", _SUFFIX)
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def write(run_dir: str, step: int, content: Checkpoint) -> None:
    """Write the checkpoint after `step` updates; a reader sees all of it or none."""
    import torch
    from torch.utils.serialization import config

    sink = io.BytesIO()
    # a user's loop may have turned off the checksums that `read` verifies
    with config.patch("save.compute_crc32", True):  # type: ignore[attr-defined]
        torch.save(content, sink)
    storage.write_bytes(path_of(run_dir, step), sink.getvalue())


def file_of(path: str) -> str:
    """The checkpoint file that a path names: itself, of a run directory its newest, or of a folder as open_clip and
    Hugging Face have them its weights.

    Raises FileNotFoundError where there is none, and ValueError where a folder has several that may be meant.
    """
    fs, inner = storage.filesystem(path)
    if path.endswith(_SUFFIX) or storage.retried(fs.isfile)(inner):
        return path
    if found := steps(path):
        return path_of(path, found[-1])
    names = [name for name in storage.names(path) if name.endswith(_WEIGHTS)]
    usual = [name for name in _USUAL_NAMES if name in names]
    if len(names) > 1 and not usual:
        raise ValueError(f"{path} has several files of weights, {', '.join(names)}: name one of them")
    if not names:
        raise FileNotFoundError(f"no checkpoint in {path}/checkpoints: train that run first, or name a checkpoint file")
    return f"{path}/{(usual or names)[0]}"


def read(path: str) -> dict[str, Any]:
    """A checkpoint file, or the newest checkpoint of a run directory; any that open_clip writes too.

    Only tensors and plain values are loaded: nothing in the file can run code. Raises Damaged where it is not as it was
    written.
    """
    path = file_of(path)
    from jest_core.models import weights

    data = storage.retried(storage.read_bytes)(path)
    refuse_damaged_zip(path, data)
    try:
        return weights.parse(data, path)
    except ValueError as error:
        raise Damaged(str(error)) from error


def content(step: int, pair: Towers, optimizer: torch.optim.Optimizer) -> Checkpoint:
    """A checkpoint without its `jest` key. The tensors are those that train on; `copied` copies them."""
    return {
        "epoch": step,
        "name": pair.name,
        "state_dict": pair.model.state_dict(),
        "optimizer": cast(OptimizerState, optimizer.state_dict()),
    }


def resume(run_dir: str, pair: Towers, optimizer: torch.optim.Optimizer) -> State:
    """Load the newest whole checkpoint of a run directory into model and optimizer, if there is one; returns how far it
    is, or the state of a new run.

    Raises Damaged where there are checkpoints, and none is whole.
    """
    from jest_core.models import towers

    problem = None
    for step in reversed(steps(run_dir)):
        path = path_of(run_dir, step)
        try:
            checkpoint = read(path)
            state: State = checkpoint["jest"]
            if state["step"] != step:
                raise Damaged(f"{path} is the checkpoint after step {state['step']:,}: give it its name again")
        except Damaged as error:
            problem = problem or error
            continue
        towers.load_weights(pair, checkpoint)
        optimizer.load_state_dict(_placed(checkpoint["optimizer"], optimizer))
        return state
    if problem is not None:
        raise Damaged(f"{problem}; no checkpoint before it is whole: restore one from a copy, or start another run_dir")
    return {"step": 0, "seconds": 0.0, "log_parts": []}


def set_aside(run_dir: str, step: int) -> list[str]:
    """Rename the checkpoints after `step`, from which a run resumed: they are damaged. Returns what to say of each."""
    later = [path_of(run_dir, number) for number in steps(run_dir) if number > step]
    for path in later:
        storage.retried(storage.move)(path, f"{path}.damaged")
    return [
        f"{path} is damaged, and is {path}.damaged now: the run goes on from the checkpoint after step {step:,}"
        for path in later
    ]


def _placed(saved: OptimizerState, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's saved state; of sharded parameters only this learner's share."""
    import torch

    from jest_core.models import sharding

    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def share(value: Any, parameter: torch.Tensor) -> Any:
        is_like_it = isinstance(value, torch.Tensor) and value.shape == parameter.shape  # as its moments are
        return sharding.placed(value, parameter) if is_like_it else value

    state = {
        number: {name: share(value, parameters[number]) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    return {**saved, "state": state}


def prune(run_dir: str, keep_last: int | None, keep_every: int | None) -> None:
    """Remove all checkpoints but the last `keep_last` and those whose step is a multiple of `keep_every`.

    Removes nothing where keep_last is None.
    """
    if keep_last is None:
        return
    for step in steps(run_dir)[:-keep_last]:
        if keep_every is None or step % keep_every:
            storage.remove(path_of(run_dir, step))


@storage.retried
def tidy(run_dir: str) -> None:
    """Remove temporary files of checkpoints and metrics, which a process that was killed has left."""
    for folder, prefix in ((f"{run_dir}/checkpoints", _PREFIX), (run_dir, "metrics.jsonl.")):
        for name in storage.names(folder, ".tmp"):
            if name.startswith(prefix):
                storage.remove(f"{folder}/{name}")


def refuse_not_finite(state_dict: dict[str, torch.Tensor]) -> None:
    """Raises Diverged where a tensor has a value that is infinite or NaN: it never replaces a sound checkpoint."""
    import torch

    from jest_core.selection.arguments import Diverged

    for name, value in state_dict.items():
        if value.is_floating_point() and not value.sum(dtype=torch.float32).isfinite():  # one pass, and no copy
            raise Diverged(f"the weights {name} are not finite after the update")


def copied(value: Any, *, keep: bool = True) -> Any:
    """A copy of a checkpoint's content in host memory, with whole tensors that further training does not change.

    Where parameters are sharded all learners must call it, as it gathers them; keep=False takes part in that, and
    returns None in place of each tensor.
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
    """Runs one write after the other in a background thread; the next call raises the error of the last write."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Start a write, once the one before has ended."""
        self.wait()
        self._last = self._thread.submit(write)

    def wait(self) -> None:
        """Wait for the write under way; raises its error."""
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
