"""Checkpoints: open_clip's dictionary plus one `jest` key, written whole to any storage."""

import io
from typing import Any

import torch

from pipelines import storage

_PREFIX, _SUFFIX = "step_", ".pt"


def path_of(run_dir: str, step: int) -> str:
    """Where the checkpoint after `step` updates lies."""
    return f"{run_dir}/checkpoints/{_PREFIX}{step:08d}{_SUFFIX}"


def steps(run_dir: str) -> list[int]:
    """Numbers of updates after which there is a checkpoint, ascending."""
    found = storage.names(f"{run_dir}/checkpoints", _SUFFIX)
    return [int(name.removeprefix(_PREFIX).removesuffix(_SUFFIX)) for name in found if name.startswith(_PREFIX)]


def write(run_dir: str, step: int, content: dict[str, Any]) -> None:
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
    checkpoint: dict[str, Any] = torch.load(io.BytesIO(storage.read_bytes(path)), map_location="cpu", weights_only=True)
    return checkpoint
