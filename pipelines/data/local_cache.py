"""Bytes of shards, kept on a disk of the node: shared by the epochs, and by all learners and tasks that read there.

fsspec's filecache and blockcache have no limit of bytes and one list of files that processes overwrite for each other;
diskcache (5.6.3) counts no file of a process that was killed, and unpickles what is in its folder (CVE-2025-69872).
Here a file is cut into blocks, each a file whose name is a hash of path, version and number. A block is written under
another name and renamed; the least recently used are removed. No process needs another one to be alive.
"""

import contextlib
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from jest_core.run_file import Run

from ..base import progress, storage
from ..base.raw_file import RawFile

BLOCK = 4 << 20
_MOST_AT_ONCE = 16  # blocks that are fetched at once
_TO = 0.9  # of the limit: as many bytes stay when the least recently used are removed
_LEFT = 3600.0  # seconds after which a block that is not renamed is one of a process that was killed
_GB = 10**9
_warned: set[str] = set()


@dataclass(frozen=True)
class LocalCache:
    """A folder on a local disk, which may hold so many bytes of shards."""

    directory: str
    n_bytes: int

    def open(self, path: str) -> "CachedFile":
        """A file that reads from the folder what is there, and leaves there what it fetches."""
        return CachedFile(self, path)

    def get(self, name: str, size: int) -> bytes | None:
        """The bytes of a block, None where they are not there."""
        try:
            with open(self._path(name), "rb") as file:
                data = file.read(size + 1)
            if len(data) == size:
                os.utime(self._path(name))  # the time of its last use
                return data
        except OSError:
            pass
        return None

    def put(self, name: str, data: bytes) -> None:
        """Keep a block. A full or broken disk is a warning: the block is fetched again when it is needed."""
        if len(data) > self.n_bytes:
            return
        temporary = f"{self._path(name)}.{uuid.uuid4().hex}.tmp"
        try:
            os.makedirs(os.path.dirname(temporary), exist_ok=True)
            with self._locked() as total, open(temporary, "wb") as file:
                total.add(len(data), self)
                file.truncate(len(data))  # so that others count it
            with open(temporary, "r+b") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(name))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            if self.directory not in _warned:
                _warned.add(self.directory)
                progress.warn("data.local_cache", f"{error}: what is read is not kept, and fetched again")

    def remove_oldest(self, more: int = 0) -> int:
        """Remove the least recently used until _TO of the limit is left, with `more` bytes to come; returns how many
        these are."""
        blocks, total = [], more
        for folder in os.scandir(self.directory):
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    total += status.st_size
                    if not entry.name.endswith(".tmp") or status.st_mtime < time.time() - _LEFT:
                        blocks.append((status.st_mtime_ns, status.st_size, entry.path))
        for _, size, path in sorted(blocks):
            if total <= _TO * self.n_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            total -= size
        return total

    def _path(self, name: str) -> str:
        return f"{self.directory}/{name[:2]}/{name}"

    @contextlib.contextmanager
    def _locked(self) -> Iterator["_Total"]:
        """The count of bytes, which one process at a time may change; the system unlocks it when a process ends."""
        with open(f"{self.directory}/bytes", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield _Total(file.fileno())


@dataclass(frozen=True)
class _Total:
    """The file with the number of bytes of all blocks."""

    file: int

    def add(self, n: int, cache: LocalCache) -> None:
        text = os.pread(self.file, 32, 0)
        total = int(text) + n if text.isdigit() else cache.n_bytes + 1  # then it counts
        if total > cache.n_bytes:
            total = cache.remove_oldest(n)
        os.ftruncate(self.file, 0)
        os.write(self.file, b"%d" % total)  # it is open for appending


class CachedFile(RawFile):
    """A file of any storage, whose blocks are read from the cache, or fetched and kept there."""

    def __init__(self, cache: LocalCache, path: str) -> None:
        self._cache, self._path = cache, path
        size, self._version = storage.size_and_version(path)
        super().__init__(size)

    def range(self, start: int, stop: int) -> bytes:
        numbers = range(start // BLOCK, -(-stop // BLOCK))
        blocks = {i: self._cache.get(self._name(i), self._length(i)) for i in numbers}
        missing = [i for i in numbers if blocks[i] is None]
        for _, run in groupby(enumerate(missing), lambda pair: (pair[1] - pair[0], pair[0] // _MOST_AT_ONCE)):
            blocks |= self._fetched([i for _, i in run])
        whole = b"".join(data for i in numbers if (data := blocks[i]) is not None)
        before = numbers.start * BLOCK
        return whole[start - before : stop - before]

    def _fetched(self, numbers: list[int]) -> dict[int, bytes | None]:
        """Consecutive blocks, from the storage; they are kept if the file was the same before and after."""
        fs, inner = storage.filesystem(self._path)
        start, stop = numbers[0] * BLOCK, numbers[-1] * BLOCK + self._length(numbers[-1])
        data = fs.cat_file(inner, start=start, end=stop)
        same = storage.size_and_version(self._path) == (self._size, self._version)
        blocks: dict[int, bytes | None] = {i: data[i * BLOCK - start : (i + 1) * BLOCK - start] for i in numbers}
        for i, block in blocks.items():
            if same and block is not None and len(block) == self._length(i):
                self._cache.put(self._name(i), block)
        return blocks

    def _length(self, number: int) -> int:
        return min(BLOCK, self._size - number * BLOCK)

    def _name(self, number: int) -> str:
        return hashlib.sha256(f"{self._path}\n{self._version}\n{number}".encode()).hexdigest()[:40]


def of(run: Run) -> LocalCache | None:
    """The cache that a run file asks for."""
    if run.data.local_cache is None:
        return None
    directory = os.path.expanduser(run.data.local_cache)
    with contextlib.suppress(OSError):  # `put` warns
        os.makedirs(directory, exist_ok=True)
    return LocalCache(directory, int(run.data.local_cache_gb * _GB))
