"""Files on any storage that fsspec opens: whole-file reads, atomic writes, listings, Parquet and JSON."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from tenacity import (
    retry,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random,
    wait_random_exponential,
)

from .integrity import CUT, ParquetFile, seal

# An I/O error is retried with backoff for about a minute in all, and then raised. Errors that another try cannot help
# are raised at once: our ValueErrors (damaged data, a wrong setting), a missing file, a refused access key; so is what
# ends a process or a Ray task (KeyboardInterrupt, SystemExit).
_BACKOFF = wait_random_exponential(multiplier=0.5, max=15)
_LASTING = (
    *(ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError, ImportError, MemoryError),
    *(NotImplementedError, RecursionError),  # Arrow's, of a column that it cannot convert; of data that is nested deep
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
)


class Lost(RuntimeError):
    """Another process has taken over the directory to which this one was about to write."""


retried = retry(
    retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, (*_LASTING, Lost))),
    wait=lambda state: _BACKOFF(state),  # looked up at each wait, so that tests can set a shorter one
    stop=stop_after_attempt(8),
    reraise=True,
)


OWNER = "owner"  # the folder of a stage's directory that says who writes there
# Directories whose owner this process is, or works for -> a function that raises Lost once it is not; see owner.py
owned: dict[str, Callable[[], None]] = {}


def refuse_lost(path: str) -> None:
    """Raises Lost where this process wrote below the path's directory as its owner, and no longer is that."""
    for directory, check in list(owned.items()):
        if path.startswith(f"{directory}/") and not path.startswith(f"{directory}/{OWNER}/"):
            check()


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path within it. Listings are never cached: other processes write."""
    options = {"use_listings_cache": False} if path.startswith(("s3://", "gs://")) else {}
    chains = "://" in path and not options  # else a::b is the name of a folder, and no chain of file systems
    fs, inner = fsspec.url_to_fs(path if chains else path.partition("::")[0], **options)
    return fs, inner if chains else fs._strip_protocol(path)


def exists(path: str) -> bool:
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def size(path: str) -> int:
    """Size of a file in bytes."""
    fs, inner = filesystem(path)
    return int(fs.size(inner))


# Of a local file; of S3; of GCS; of Azure; over HTTP; of Hugging Face
_VERSIONS = (
    *("mtime", "ino", "ETag", "LastModified", "generation", "etag", "last_modified", "Last-Modified", "Content-MD5"),
    *("Digest", "blob_id"),
)


def version(path: str) -> str:
    """What another content of the file would change: its size, and when it was written. Raises FileNotFoundError."""
    return str(size_and_version(path))


def size_and_version(path: str) -> tuple[int, str]:
    """Its size in bytes, and what its storage says that another content would change; empty where it says nothing.

    Raises FileNotFoundError; ValueError where the storage says no size.
    """
    fs, inner = filesystem(path)
    info = fs.info(inner)
    if info.get("size") is None:
        raise ValueError(f"{path}: its storage does not say how many bytes it has")
    return int(info["size"]), " ".join(f"{name}={info[name]}" for name in _VERSIONS if info.get(name))


def read_bytes(path: str) -> bytes:
    fs, inner = filesystem(path)
    data: bytes = fs.cat_file(inner)
    return data


def write_bytes(path: str, data: bytes) -> None:
    """Atomic: a reader sees the whole file or none. Object stores put whole objects; a local file is renamed."""
    fs, inner = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        refuse_lost(path)
        fs.pipe_file(inner, data)
        return
    _write_local(inner, lambda file: file.write(data), lambda: refuse_lost(path))


@retry(
    retry=retry_if_exception_type((FileNotFoundError, FileExistsError)),  # makedirs may find a folder, and then none
    wait=wait_random(0, 0.05),
    stop=stop_after_attempt(20),
    reraise=True,
)
def _write_local(path: str, write: Callable[[BinaryIO], Any], check: Callable[[], None]) -> None:
    """Write a temporary file, check and rename it; tried again where another process removes the folder meanwhile."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def upload(local: str, path: str) -> None:
    """Copy a local file; atomic, as write_bytes is, and of any size."""
    fs, inner = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        refuse_lost(path)
        fs.put_file(local, inner)
        return

    def copy(file: BinaryIO) -> None:
        with open(local, "rb") as source:
            shutil.copyfileobj(source, file)

    _write_local(inner, copy, lambda: refuse_lost(path))


def names(directory: str, suffix: str = "") -> list[str]:
    """Sorted names of the files directly in a directory; none where it does not exist."""
    fs, inner = filesystem(directory)
    try:
        paths = fs.ls(inner, detail=False)
    except FileNotFoundError:
        return []
    return sorted(name for path in paths if (name := path.rstrip("/").rsplit("/", 1)[-1]).endswith(suffix))


def folders(directory: str) -> list[str]:
    """Sorted names of the folders directly in a directory; none where it does not exist."""
    fs, inner = filesystem(directory)
    try:
        entries = fs.ls(inner, detail=True)
    except FileNotFoundError:
        return []
    return sorted(
        entry["name"].rstrip("/").rsplit("/", 1)[-1]
        for entry in entries
        if entry["type"] == "directory" or fs.isdir(entry["name"])
    )


def move(path: str, target: str) -> None:
    """Rename a file within its storage."""
    fs, inner = filesystem(path)
    fs.mv(inner, filesystem(target)[1])


def remove(path: str) -> None:
    refuse_lost(path)
    fs, inner = filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(inner)


def remove_tree(directory: str) -> None:
    """Remove a directory and all below it. Other processes may remove it at the same time; files that they write into
    it meanwhile may stay."""
    refuse_lost(f"{directory}/")
    fs, inner = filesystem(directory)
    while True:
        try:
            fs.rm(inner, recursive=True)
        except (FileNotFoundError, IsADirectoryError):  # another process removed it or a part of it, or made it again
            if isinstance(fs, LocalFileSystem) and fs.exists(inner):
                continue
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        return


def open_file(path: str) -> BinaryIO:
    """Open a file for reading; a read fetches the bytes that it asks for, and no others."""
    fs, inner = filesystem(path)
    file: BinaryIO = fs.open(inner, "rb", **({} if isinstance(fs, LocalFileSystem) else {"cache_type": "none"}))
    return file


def open_parquet(path: str) -> ParquetFile:
    """Open a Parquet file. Raises Damaged, also when it is read, where it is not as it was written."""
    return ParquetFile(path, open_file(path))


def write_table(
    path: str, table: pa.Table, row_groups: Iterable[int] | None = None, most_rows: int | None = None
) -> None:
    """Atomic Parquet file; row_groups: the number of rows of each row group (default: one group).

    most_rows: larger ones are cut into several of so many rows, which ParquetFile.cut_groups tells.
    """
    write_bytes(path, table_bytes(table, row_groups, most_rows))


def table_bytes(table: pa.Table, row_groups: Iterable[int] | None = None, most_rows: int | None = None) -> bytes:
    """A Parquet file with checksums.

    Without dictionary encoding: zstd finds repeated strings itself.
    """
    sizes = [len(table)] if row_groups is None else list(row_groups)
    if most_rows is not None:
        cut = [[min(most_rows, size - start) for start in range(0, max(1, size), most_rows)] for size in sizes]
        counts = json.dumps([len(parts) for parts in cut]).encode()
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), CUT: counts})
        sizes = [size for parts in cut for size in parts]
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink, table.schema, compression=_codecs(table.schema), use_dictionary=False, write_page_checksum=True
    ) as writer:
        start = 0
        for size in sizes:
            writer.write_table(table.slice(start, size), row_group_size=max(1, size))
            start += size
    seal(sink)
    return sink.getvalue()


def _codecs(schema: pa.Schema) -> str | dict[str, str]:
    """zstd, but nothing for embeddings: it would save 8 % of their bytes and make reading three times slower."""
    if not any(pa.types.is_fixed_size_binary(kind) for kind in schema.types):
        return "zstd"
    return {
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name: "none"
        if pa.types.is_fixed_size_binary(field.type)
        else "zstd"
        for field in schema
    }


def read_json(path: str) -> Any:
    """The value of a JSON file; callers name its type. Raises ValueError where the file is not JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): correct it, or have what made it write it again") from error


def read_lines(path: str) -> list[Any]:
    """The values of a file of JSON lines, None for a line that is damaged; none where the file does not exist."""

    def value(line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError:
            return None

    return [value(line) for line in read_bytes(path).splitlines()] if exists(path) else []


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
