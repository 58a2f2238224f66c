"""Lists of uids: those that a stage kept or selected, and DataComp's subset files."""

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jest_core import tables

from ..base import checkpoints, commits, in_parallel, manifests, storage
from . import listed

Uids = NDArray[np.uint64]  # (n, 2): the upper and lower half of each
NPY = np.dtype("u8,u8")  # of DataComp's subset files: a field for each half


def read(directory: str) -> Uids:
    """Uids of a finished catalogue (kept rows, as often as they come), of what `jest select` selected, or of a training
    run's committed selection log (as often as they were selected). Raises FileNotFoundError where it is none of these.
    """
    manifest = manifests.read(directory)
    if manifest["stage"] == "catalogue" and manifest["complete"]:
        return _gather(f"{directory}/parts", storage.names(f"{directory}/parts", ".parquet"), "multiplicity", np.repeat)
    if manifest["stage"] == "select" and manifest["complete"]:
        return _gather(f"{directory}/parts", storage.names(f"{directory}/parts", ".parquet"), "selected", _where)
    if manifest["stage"] in ("train", "sub-batches"):
        if not checkpoints.steps(directory):
            raise FileNotFoundError(
                f"{directory} holds a run that has not come to a checkpoint: train it until it writes one"
            )
        return _gather(f"{directory}/selection", commits.read(directory), "selected", _where)
    raise FileNotFoundError(
        f"{directory} holds a {manifest['stage']} that has no uids, or is not finished: name a finished catalogue or "
        "selection, or a run"
    )


def _where(uids: Uids, selected: NDArray[np.bool_], axis: int) -> Uids:
    return np.compress(selected, uids, axis=axis)


def _gather(folder: str, names: list[str], column: str, apply: Callable[..., Uids]) -> Uids:
    """The uids of parts, each repeated or chosen by another column of its row."""

    def uids(name: str) -> Uids:
        rows = storage.open_parquet(f"{folder}/{name}").read(columns=["uid", column])
        return apply(from_hex(rows["uid"]), rows[column].to_numpy(), axis=0)

    return np.concatenate([np.empty((0, 2), np.uint64), *in_parallel.read_each(uids, names)])


def from_hex(column: pa.ChunkedArray) -> Uids:
    """A column of 32 hex digits -> (n, 2)."""
    return np.stack(tables.uid_from_hex(column.to_pylist()), axis=1)


def ordered(uids: Uids) -> Uids:
    """Sorted by their hex digits; repeats stay."""
    return uids[np.lexsort((uids[:, 1], uids[:, 0]))]


def to_npy(uids: Uids) -> bytes:
    """The bytes of a DataComp subset file: sorted; a uid that is repeated has more weight."""
    array = np.empty(len(uids), dtype=NPY)
    array["f0"], array["f1"] = ordered(uids).T
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def from_npy(path: str) -> Uids:
    """Uids of a DataComp subset file. Raises ValueError where the file is not one."""
    return _from_npy(listed.read(path), path)


def from_file(path: str) -> Uids:
    """Uids of a file, in whichever form `listed` reads. Raises ValueError where it has none."""
    data = listed.read(path)
    if path.endswith(".npy") or data.startswith(np.lib.format.MAGIC_PREFIX):
        return _from_npy(data, path)
    return np.stack(tables.uid_from_hex(listed.entries(path, "uid")), axis=1)


def _from_npy(data: bytes, path: str) -> Uids:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file ({error}): name a DataComp subset file") from error
    if array.ndim == 1 and array.dtype.kind in "US":
        return np.stack(tables.uid_from_hex(listed.entries(path, "uid")), axis=1)
    if array.ndim == 2 and array.dtype.kind == "u" and array.shape[1] == 2 and array.dtype.itemsize == 8:
        return array.astype(np.uint64)
    halves = [array.dtype[i] for i in range(len(array.dtype))]
    if array.ndim != 1 or len(halves) != 2 or any(half.kind != "u" or half.itemsize != 8 for half in halves):
        raise ValueError(
            f"{path} has dtype {array.dtype} and {array.ndim} dimensions; a subset is (n,) of u8,u8: name a DataComp "
            "subset file"
        )
    return np.stack([array[name].astype(np.uint64) for name in array.dtype.names], axis=1)


def to_table(uids: Uids) -> pa.Table:
    """A column `uid` of 32 hex digits, sorted."""
    return pa.table({"uid": pa.array(tables.uid_to_hex(*ordered(uids).T), pa.string())})
