"""Bytes of shards, kept on a disk of the node: shared by the epochs, and by all learners and tasks that read there.

fsspec's filecache and blockcache have no limit of bytes and one list of files that processes overwrite for each other;
diskcache (5.6.3) counts no file of a process that was killed, and unpickles what is in its folder (CVE-2025-69872).
Here a file is cut into blocks, each a file with its CRC-32 whose name is a hash of path, version and number. A block is
written under another name and renamed; the least recently used are removed. No process needs another one to be alive.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import platform
import re
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from jest_core.run_file import Run

from ..base import node_checks, progress, storage
from ..base.raw_file import RawFile

BLOCK = 4 << 20
_MOST_AT_ONCE = 16  # blocks that are fetched at once
_TO = 0.9  # of the limit: as many bytes stay when the least recently used are removed
_FREE = 0.1  # of the disk, that stays free: Ray spills no objects to a disk that is 95 % full
_LEFT = 3600.0  # seconds after which a block that is not renamed is one of a process that was killed
_SUM_BYTES = 4  # after a block's data
_FOLDER = "jest-blocks"  # below the directory that the run file names, where other things may be
_OURS = re.compile(r"[0-9a-f]{2}/[0-9a-f]{40}(\.[0-9a-f]{32}\.tmp)?")  # paths in it
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

    def get(self, name: str, size: int) -> memoryview | None:
        """The bytes of a block, None where they are not there, or are not those that were written."""
        with contextlib.suppress(OSError):
            with open(self._path(name), "rb") as file:
                found = memoryview(file.read(size + _SUM_BYTES + 1))
            if len(found) == size + _SUM_BYTES and found[size:] == _sum(found[:size]):
                os.utime(self._path(name))  # the time of its last use
                return found[:size]
        return None

    def has(self, name: str) -> bool:
        return os.path.exists(self._path(name))

    def put(self, name: str, data: memoryview) -> None:
        """Keep a block. A full or broken disk is a warning: the block is fetched again when it is needed."""
        temporary = f"{self._path(name)}.{uuid.uuid4().hex}.tmp"
        try:
            os.makedirs(os.path.dirname(temporary), exist_ok=True)
            with open(f"{self.directory}/bytes", "a+b") as count:
                fcntl.flock(count, fcntl.LOCK_EX)  # until it is closed, or the process ends
                self._reserve(len(data) + _SUM_BYTES, count.fileno())
                with open(temporary, "wb") as file:
                    file.truncate(len(data) + _SUM_BYTES)  # so that others count it
            with open(temporary, "r+b") as file:
                file.write(data)
                file.write(_sum(data))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(name))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            if self.directory not in _warned:
                _warned.add(self.directory)
                progress.warn("data.local_cache", f"{error}: what is read is not kept, and fetched again")

    def _reserve(self, n: int, count: int) -> None:
        """Make room for n bytes, and count them. count: the file with the number of bytes of all blocks, which only
        this process changes now. Raises OSError where the disk has no room."""
        text = os.pread(count, 32, 0)
        total = int(text) if text.isdigit() else None
        if total is None or total + n > self._limit(total):
            total = self.remove_oldest(n)
        if total + n > self._limit(total):
            raise OSError(errno.ENOSPC, f"no room, with a tenth of the disk left free, in {self.directory}")
        os.ftruncate(count, 0)
        os.write(count, b"%d" % (total + n))  # it is open for appending

    def _limit(self, total: int) -> int:
        """Bytes that all blocks may have, where they have `total` now."""
        disk = os.statvfs(self.directory)
        return min(self.n_bytes, total + disk.f_frsize * (disk.f_bavail - int(_FREE * disk.f_blocks)))

    def remove_oldest(self, more: int = 0) -> int:
        """Remove the least recently used until _TO of the limit is left, with `more` bytes to come. Returns the bytes
        that stay."""
        blocks, total = [], 0
        for path in self._blocks():
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)
                total += status.st_size
                if not path.endswith(".tmp") or status.st_mtime < time.time() - _LEFT:
                    blocks.append((status.st_mtime_ns, status.st_size, path))
        most = _TO * self._limit(total)
        for _, size, path in sorted(blocks):
            if total + more <= most:
                break
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            total -= size
        return total

    def _blocks(self) -> Iterator[str]:
        """Paths of the files that a cache has written; no other file is ever touched."""
        for folder in os.scandir(self.directory):
            for entry in os.scandir(folder.path) if folder.is_dir(follow_symlinks=False) else ():
                if _OURS.fullmatch(f"{folder.name}/{entry.name}"):
                    yield entry.path

    def _path(self, name: str) -> str:
        return f"{self.directory}/{name[:2]}/{name}"


def _sum(data: memoryview) -> bytes:
    return zlib.crc32(data).to_bytes(_SUM_BYTES, "big")


class CachedFile(RawFile):
    """A file of any storage, whose blocks are read from the cache, or fetched and kept there."""

    def __init__(self, cache: LocalCache, path: str) -> None:
        self._cache, self._path = cache, path
        size, self._version = storage.size_and_version(path)
        super().__init__(size)

    def range(self, start: int, stop: int) -> bytes:
        out, number = io.BytesIO(), start // BLOCK  # one copy of what is asked for, and a few blocks at a time
        end = -(-stop // BLOCK)
        while number < end:
            block = self._cache.get(self._name(number), self._length(number))
            for data in self._fetched(number, end) if block is None else [block]:
                out.write(data[max(0, start - number * BLOCK) : stop - number * BLOCK])
                number += 1
        return out.getvalue()

    def _fetched(self, first: int, end: int) -> list[memoryview]:
        """Blocks from the storage: the first, and those after it that are not in the cache. They are kept if the file
        was the same before and after."""
        end = min(end, first + _MOST_AT_ONCE)
        numbers = range(first, next((i for i in range(first + 1, end) if self._cache.has(self._name(i))), end))
        fs, inner = storage.filesystem(self._path)
        start, stop = numbers[0] * BLOCK, numbers[-1] * BLOCK + self._length(numbers[-1])
        whole = memoryview(fs.cat_file(inner, start=start, end=stop))
        is_same = self._version and storage.size_and_version(self._path) == (self._size, self._version)
        blocks = [whole[i * BLOCK - start : (i + 1) * BLOCK - start] for i in numbers]
        for i, block in zip(numbers, blocks, strict=True):
            if is_same and len(block) == self._length(i):
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
    directory = f"{os.path.expanduser(run.data.local_cache)}/{_FOLDER}"
    return LocalCache(directory, int(run.data.local_cache_gb * _GB))


def warn_where_unusable(run: Run) -> None:
    """Say which nodes cannot keep what they read, or less than the run file allows. Asked before a stage starts, as
    what tasks print stays in Ray's logs."""
    if (cache := of(run)) is not None:
        for text in node_checks.answers(_lacks, "CPU", cache=cache):
            progress.warn("data.local_cache", text)


def _lacks(*, cache: LocalCache) -> str:
    """What is wrong with the folder on this machine; empty if nothing."""
    try:
        os.makedirs(cache.directory, exist_ok=True)
        with open(f"{cache.directory}/bytes", "a+b"):
            pass
        n_bytes = cache._limit(sum(os.stat(path).st_size for path in cache._blocks()))
    except OSError as error:
        return f"{platform.node()} cannot keep what it reads, and fetches it each time: {error}"
    if n_bytes < cache.n_bytes:
        room = f"{max(0, n_bytes) / _GB:,.1f} GB of the {cache.n_bytes / _GB:,.1f} of data.local_cache_gb"
        return f"{platform.node()} has room for {room} in {cache.directory}, with a tenth of the disk left free"
    return ""
