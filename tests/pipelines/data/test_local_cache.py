"""Bytes of shards on a local disk: on a real S3 server, with several processes, limits and faults."""

import contextlib
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from s3fs import S3FileSystem

from jest_core.run_file.data import Data
from pipelines.base import storage
from pipelines.data import layouts, local_cache
from pipelines.data.local_cache import LocalCache

DATA = np.random.default_rng(0).bytes(9 << 20)


@pytest.fixture
def gets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GETs that S3 is sent."""
    sent: list[str] = []
    original = S3FileSystem._call_s3

    async def counted(self, method, *args, **options):
        sent.extend([method] if method == "get_object" else [])
        return await original(self, method, *args, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
    return sent


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "bytes"]


def sizes(folder: Path) -> int:
    """Bytes of the blocks; one that is renamed meanwhile counts once."""
    found: dict[str, int] = {}
    for path in files(folder):
        with contextlib.suppress(FileNotFoundError):
            found[path.name.partition(".")[0]] = path.stat().st_size
    return sum(found.values())


def read(cache: LocalCache, path: str, start: int = 0, stop: int = len(DATA)) -> bytes:
    file = cache.open(path)
    file.seek(start)
    return file.read(stop - start)


def test_a_second_epoch_gets_no_picture_from_s3(s3, gets, tmp_path):
    sink = BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for i in range(40):
            for kind, data in (("jpg", DATA[i << 15 : (i + 1) << 15]), ("txt", b"a cat")):
                member = tarfile.TarInfo(f"{i:04d}.{kind}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    path, index = f"{s3}/cached/a.tar", str(tmp_path / "index")
    storage.write_bytes(path, sink.getvalue())
    layouts.write_index(path, {}, index)
    cache = LocalCache(str(tmp_path / "cache"), 1 << 30)
    gets.clear()
    epochs = [layouts.open_shard(path, {}, index, cache).images(0, np.arange(30)) for _ in range(2)]
    assert len(gets) == 1
    assert epochs[0].equals(epochs[1])
    assert epochs[1].to_pylist() == [DATA[i << 15 : (i + 1) << 15] for i in range(30)]
    layouts.open_shard(path, {}, index).images(0)
    assert len(gets) == 2  # they are counted


def test_what_is_read_is_the_file(tmp_path):
    path, cache = str(tmp_path / "a"), LocalCache(str(tmp_path / "cache"), 1 << 30)
    storage.write_bytes(path, DATA)
    for start, stop in (
        (0, 10),
        (5 << 20, 9 << 20),
        (4194300, 4194310),
        (0, len(DATA)),
        (len(DATA) - 1, len(DATA) + 9),
    ):
        for _ in range(2):
            assert read(cache, path, start, stop) == DATA[start:stop]
    file = cache.open(path)
    assert file.seek(-2, os.SEEK_END) == len(DATA) - 2
    assert file.read() == DATA[-2:]
    assert file.read() == b""


def test_a_file_that_was_replaced_is_not_served_from_before(s3, tmp_path):
    path, cache = f"{s3}/cached/replaced", LocalCache(str(tmp_path), 1 << 30)
    for content in (DATA, DATA[::-1]):  # of one size
        storage.write_bytes(path, content)
        assert read(cache, path) == content
        assert read(cache, path) == content


def test_a_file_that_is_replaced_while_it_is_read_is_not_kept(s3, tmp_path):
    path, cache = f"{s3}/cached/changing", LocalCache(str(tmp_path), 1 << 30)
    storage.write_bytes(path, DATA)
    file = cache.open(path)
    storage.write_bytes(path, DATA[::-1])
    file.read(10)
    assert not files(tmp_path)


def test_the_least_recently_used_are_removed_and_the_limit_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(local_cache, "BLOCK", 1000)
    path, cache = str(tmp_path / "a"), LocalCache(str(tmp_path / "cache"), 10_500)
    storage.write_bytes(path, DATA[:40_000])
    for start in range(0, 40_000, 1000):
        read(cache, path, start, start + 1000)
        assert sizes(tmp_path / "cache") <= 10_500
        read(cache, path, 0, 1000)  # always in use
    used = len(files(tmp_path / "cache"))
    before = {file.name for file in files(tmp_path / "cache")}
    read(cache, path, 0, 1000)
    assert {file.name for file in files(tmp_path / "cache")} == before
    assert used >= 8


WORK = """
import sys, numpy as np
from pipelines.data import local_cache
local_cache.BLOCK = 100_000
path, folder, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
cache, random, data = local_cache.LocalCache(folder, 2_050_000), np.random.default_rng(seed), open(path, "rb").read()
print("begun", flush=True)
for _ in range(int(sys.argv[4])):
    start = int(random.integers(len(data)))
    file = cache.open(path)
    file.seek(start)
    assert file.read(250_000) == data[start : start + 250_000]
"""


def started(path: str, folder: Path, seed: int, n: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", WORK, path, str(folder), str(seed), str(n)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()})


@pytest.fixture
def workers() -> Iterator[list["subprocess.Popen[bytes]"]]:
    running: list[subprocess.Popen[bytes]] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()


def test_processes_share_a_folder_and_one_that_is_killed_leaves_nothing_broken(tmp_path, workers, monkeypatch):
    path, folder = str(tmp_path / "a"), tmp_path / "cache"
    storage.write_bytes(path, DATA)
    folder.mkdir()
    workers += [started(path, folder, seed, 25 if seed else 10**9) for seed in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    while workers[1].poll() is None or workers[2].poll() is None:
        assert sizes(folder) <= 2_050_000
        time.sleep(0.01)
    assert workers[1].returncode == workers[2].returncode == 0
    workers[0].send_signal(signal.SIGKILL)
    workers[0].wait()
    (folder / "bytes").write_text("half a num")
    last = started(path, folder, 9, 10)
    workers.append(last)
    assert last.wait() == 0
    assert sizes(folder) <= 2_050_000
    half = folder / "ab" / f"{0:040x}.{0:032x}.tmp"  # of a process that was killed
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    LocalCache(str(folder), 1_000_000).remove_oldest()
    assert not half.exists()
    assert 0 < sizes(folder) <= 900_000


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path, capsys, monkeypatch):
    path = str(tmp_path / "a")
    storage.write_bytes(path, DATA)
    monkeypatch.setattr(local_cache, "_warned", set())
    (tmp_path / "file").write_text("where the folder would be")
    full = LocalCache("/dev/full/folder", 1 << 30)
    for cache in (LocalCache(str(tmp_path / "file"), 1 << 30), full, full):
        assert read(cache, path) == DATA
    said = "".join(capsys.readouterr())
    assert said.count("what is read is not kept, and fetched again") == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: bytes(100) + data[100:], lambda data: b""])
def test_a_block_that_lost_or_changed_bytes_is_fetched_again(tmp_path, damage):
    path, cache = str(tmp_path / "a"), LocalCache(str(tmp_path / "cache"), 1 << 30)
    storage.write_bytes(path, DATA)
    read(cache, path)
    written = {file: file.read_bytes() for file in files(tmp_path / "cache")}
    for file, data in written.items():
        file.write_bytes(damage(data))
    assert read(cache, path) == DATA
    assert {file: file.read_bytes() for file in files(tmp_path / "cache")} == written


def test_files_of_others_are_never_removed(make_run, tmp_path):
    for name in ("dataset/000.tar", "ab/notes", f"jest-blocks/ab/{'0' * 39}.tar", "jest-blocks/mine"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(DATA[:1_000_000])
    theirs = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    cache = local_cache.of(make_run("x", f"data.local_cache={tmp_path}", "data.local_cache_gb=0.000001"))
    assert cache is not None
    path = str(tmp_path / "a")
    storage.write_bytes(path, DATA[:1000])
    for _ in range(3):
        assert read(cache, path, 0, 1000) == DATA[:1000]
    assert {path: path.stat().st_size for path in theirs} == theirs


def test_a_tenth_of_the_disk_stays_free(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(local_cache, "_warned", set())
    monkeypatch.setattr(local_cache, "BLOCK", 1000)
    blocks, path = tmp_path / "cache", str(tmp_path / "a")
    storage.write_bytes(path, DATA[:40_000])
    others = 5_000  # bytes of a disk of 20,000 that other programs have taken

    def disk(_: str) -> os.statvfs_result:
        free = 20_000 - others - sizes(blocks)
        return os.statvfs_result((1, 1, 20_000, free, free, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", disk)
    cache = LocalCache(str(blocks), 1 << 30)
    assert read(cache, path, 0, 40_000) == DATA[:40_000]
    assert 10_000 < sizes(blocks) <= 13_000
    others = 15_000
    assert read(cache, path, 20_000, 25_000) == DATA[20_000:25_000]
    assert 0 < sizes(blocks) <= 3_000
    others = 19_000
    assert read(cache, path, 0, 5_000) == DATA[:5_000]
    assert sizes(blocks) == 0
    assert "no room, with a tenth of the disk left free" in "".join(capsys.readouterr())


def test_nodes_that_cannot_keep_what_they_read_are_named(make_run, tmp_path, capsys):
    local_cache.warn_where_unusable(make_run("x", f"data.local_cache={tmp_path}", "data.local_cache_gb=0.001"))
    assert not capsys.readouterr().out
    local_cache.warn_where_unusable(make_run("x", f"data.local_cache={tmp_path}", "data.local_cache_gb=1000000000"))
    assert "GB of the 1,000,000,000.0 of data.local_cache_gb" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "file").write_text("")
    local_cache.warn_where_unusable(make_run("x", f"data.local_cache={tmp_path}/file"))
    assert "cannot keep what it reads, and fetches it each time" in " ".join(capsys.readouterr().out.split())


def test_a_range_takes_its_bytes_once_in_memory(tmp_path):
    path, cache, n = str(tmp_path / "a"), LocalCache(str(tmp_path / "cache"), 1 << 30), 10 * len(DATA)
    storage.write_bytes(path, DATA * 10)
    for at_once in (local_cache._MOST_AT_ONCE, 1):  # blocks beside it: of those that are fetched, and that are kept
        tracemalloc.start()
        assert len(read(cache, path, 0, n)) == n
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.2 * n + at_once * local_cache.BLOCK


@pytest.mark.parametrize("directory", ["cache", "s3://bucket/cache", "../x"])
def test_a_cache_is_on_a_local_disk(directory):
    values = {"shards": "a", "catalogue": "c", "rules": [], "n_streams": 1, "window_rows": 1, "local_cache": directory}
    with pytest.raises(ValueError, match="is no absolute path of a local disk"):
        Data.model_validate(values)
