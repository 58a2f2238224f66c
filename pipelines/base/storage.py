"""Files on any storage that fsspec opens: whole-file reads, atomic writes, manifests."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem
from tenacity import (
    retry,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_after_attempt,
    wait_random,
    wait_random_exponential,
)

from jest_core.run_file import join

MANIFEST = "manifest.json"

# An I/O error is retried with backoff, about a minute in all, and then fatal. What another try cannot help is not: our
# own ValueErrors (damaged data, a wrong setting), a missing file, a refused key.
_BACKOFF = wait_random_exponential(multiplier=0.5, max=15)
_LASTING = (ValueError, TypeError, LookupError, AssertionError, FileNotFoundError, PermissionError, MemoryError)
retried = retry(
    retry=retry_if_not_exception_type(_LASTING),
    wait=lambda state: _BACKOFF(state),  # looked up at each wait, for tests that need not sit it out
    stop=stop_after_attempt(8),
    reraise=True,
)


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path within it. Listings are never cached: other processes write."""
    options: dict[str, Any] = {"use_listings_cache": False} if path.startswith(("s3://", "gs://")) else {}
    fs, inner = fsspec.url_to_fs(path, **options)
    return fs, inner


def exists(path: str) -> bool:
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def size(path: str) -> int:
    """Bytes."""
    fs, inner = filesystem(path)
    return int(fs.size(inner))


def read_bytes(path: str) -> bytes:
    fs, inner = filesystem(path)
    data: bytes = fs.cat_file(inner)
    return data


def write_bytes(path: str, data: bytes) -> None:
    """Atomic: a reader sees the whole file or none. Object stores put whole objects; a local file is renamed."""
    fs, inner = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(inner, data)
        return
    _write_local(inner, lambda file: file.write(data))


@retry(
    retry=retry_if_exception_type((FileNotFoundError, FileExistsError)),  # makedirs may find a folder, and then none
    wait=wait_random(0, 0.05),
    stop=stop_after_attempt(20),
    reraise=True,
)
def _write_local(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Once more where somebody removed the folder at the same time."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def upload(local: str, path: str) -> None:
    """Copy a local file; atomic, as write_bytes is, and of any size."""
    fs, inner = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        fs.put_file(local, inner)
        return

    def copy(file: BinaryIO) -> None:
        with open(local, "rb") as source:
            shutil.copyfileobj(source, file)

    _write_local(inner, copy)


def names(directory: str, suffix: str = "") -> list[str]:
    """Sorted names of the files directly in a directory; none where it does not exist."""
    fs, inner = filesystem(directory)
    try:
        found = fs.ls(inner, detail=False)
    except FileNotFoundError:
        return []
    return sorted(name for path in found if (name := path.rstrip("/").rsplit("/", 1)[-1]).endswith(suffix))


def folders(directory: str) -> list[str]:
    """Sorted names of the folders directly in a directory; none where it does not exist."""
    fs, inner = filesystem(directory)
    try:
        found = fs.ls(inner, detail=True)
    except FileNotFoundError:
        return []
    return sorted(
        entry["name"].rstrip("/").rsplit("/", 1)[-1]
        for entry in found
        if entry["type"] == "directory" or fs.isdir(entry["name"])
    )


def remove(path: str) -> None:
    fs, inner = filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(inner)


def remove_tree(directory: str) -> None:
    """Others may remove it too; what they write into it meanwhile stays, theirs to remove."""
    fs, inner = filesystem(directory)
    while True:
        try:
            fs.rm(inner, recursive=True)
        except (FileNotFoundError, IsADirectoryError):  # another has just removed it, or a part; or made it again
            if isinstance(fs, LocalFileSystem) and fs.exists(inner):
                continue
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        return


def expand(patterns: Sequence[str], root: str) -> list[str]:
    """Paths of shards from paths, folders, globs and brace ranges, below root.

    A folder stands for its .parquet and .tar files; DataComp's, for the tars of its `shards`. Raises FileNotFoundError
    where a pattern names no file.
    """
    out: list[str] = []
    folders: dict[str, set[str]] = {}  # listed once, not asked file by file: a range may name 200,000
    for pattern in patterns:
        for path in braceexpand(pattern):
            found = _matches(join(root, path), folders)
            if not found:
                raise FileNotFoundError(f"no shard at {join(root, path)}: correct the path, or root")
            out += found
    return out


def _matches(path: str, folders: dict[str, set[str]]) -> list[str]:
    fs, inner = filesystem(path)
    if any(c in path for c in "*?["):
        return sorted(fs.unstrip_protocol(p) if "://" in path else p for p in fs.glob(inner))
    path = path.rstrip("/")
    if not path.endswith((".tar", ".parquet")):
        if "shards" in (inside := names(path)):
            path, inside = f"{path}/shards", [name for name in names(f"{path}/shards") if name.endswith(".tar")]
        # img2dataset leaves a .parquet of metadata beside each of its tars
        tars = [f"{path}/{name}" for name in inside if name.endswith(".tar")]
        return tars or [f"{path}/{name}" for name in inside if name.endswith(".parquet")]
    folder, name = path.rsplit("/", 1)
    if folder not in folders:
        folders[folder] = set(names(folder))
    return [path] if name in folders[folder] else []


def open_parquet(path: str) -> pq.ParquetFile:
    """A Parquet file, of which only what is asked for is read: exact ranges, close ones together."""
    fs, inner = filesystem(path)
    options = {} if isinstance(fs, LocalFileSystem) else {"cache_type": "none"}
    return pq.ParquetFile(fs.open(inner, "rb", **options), pre_buffer=True)


def write_table(path: str, table: pa.Table, row_groups: Iterable[int] | None = None) -> None:
    """Atomic Parquet file; row_groups are the sizes of its row groups (one group where not given).

    Without dictionaries: embeddings have none worth having (2.7 times the reading, 1.2 times the bytes), and zstd finds
    repeated strings itself.
    """
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", use_dictionary=False) as writer:
        start = 0
        for size in row_groups if row_groups is not None else [len(table)]:
            writer.write_table(table.slice(start, size), row_group_size=max(1, size))
            start += size
    write_bytes(path, sink.getvalue())


def read_json(path: str) -> Any:
    return json.loads(read_bytes(path))


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


Config = dict[str, Any]


def refuse_other(
    directory: str,
    stage: str,
    config: Config,
    *,
    today: Callable[[Config], Config] = dict,
    extends: Callable[[Config, list[str]], bool] = lambda old, differing: False,
) -> Config | None:
    """The manifest of a stage's output directory, None where nothing has begun there; writes nothing.

    today: a configuration that an earlier version wrote, in the fields of this one. extends: whether what was begun
    with that configuration may go on with this one, which differs in those fields.
    Raises ValueError, naming the difference, where the directory was begun with another configuration.
    """
    path = f"{directory}/{MANIFEST}"
    if not exists(path):
        return None
    manifest: Config = read_json(path)
    old = today(manifest["config"])
    differing = [k for k in sorted(old.keys() | config.keys()) if old.get(k) != config.get(k)]
    if manifest["stage"] != stage or (differing and not extends(old, differing)):
        detail = "; ".join(f"{k}: there {_short(old.get(k))}, here {_short(config.get(k))}" for k in differing)
        raise ValueError(
            f"{directory} was made by {manifest['stage']!r} with another configuration ({detail}); choose "
            "another directory, or remove it"
        )
    return manifest | {"complete": manifest["complete"] and not differing}


@retried
def begin(directory: str, stage: str, config: Config, **changes: Any) -> Config | None:
    """Claim a stage's output directory: its finished manifest where one with this configuration is there, else None.

    changes: those of `refuse_other`, which refuses what has another configuration.
    """
    manifest = refuse_other(directory, stage, config, **changes)
    if manifest is not None and manifest["complete"]:
        return manifest
    if manifest is None or manifest["config"] != config:
        write_json(f"{directory}/{MANIFEST}", {"stage": stage, "complete": False, "config": config})
    return None


@retried
def finish(directory: str, stage: str, config: dict[str, Any], **results: Any) -> dict[str, Any]:
    """Write a stage's manifest: what it read, how, and what came of it."""
    manifest = {"stage": stage, "complete": True, "config": config, **results}
    manifest["fingerprint"] = fingerprint(manifest)
    write_json(f"{directory}/{MANIFEST}", manifest)
    return manifest


def manifest(directory: str) -> dict[str, Any]:
    """A stage's manifest, finished or not. Raises FileNotFoundError where no stage has written there."""
    path = f"{directory}/{MANIFEST}"
    if not exists(path):
        raise FileNotFoundError(f"{directory} holds no {MANIFEST}: no stage has written there")
    found: dict[str, Any] = read_json(path)
    return found


def is_finished(directory: str) -> bool:
    """Whether a stage has written all of a directory."""
    return exists(f"{directory}/{MANIFEST}") and bool(manifest(directory).get("complete"))


def finished(directory: str, stage: str, remedy: str) -> dict[str, Any]:
    """A stage's finished manifest. Raises FileNotFoundError, with the remedy, where there is none."""
    path = f"{directory}/{MANIFEST}"
    if not exists(path) or not (manifest := read_json(path))["complete"] or manifest["stage"] != stage:
        raise FileNotFoundError(f"{directory} holds no finished {stage}: {remedy}")
    assert isinstance(manifest, dict)
    return manifest


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."
