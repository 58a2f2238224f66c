import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray import cloudpickle

from pipelines.base import owner, owner_files, storage
from pipelines.base.owner import Owned, Owner

LEASE = 1.0  # seconds
WRITER = """
import itertools, sys, time
from pipelines.base import owner, owner_files, storage
directory, lease = sys.argv[1], float(sys.argv[2])
with owner.owned(directory, lease=lease):
    for number in itertools.count():
        storage.write_bytes(f"{directory}/by-{sys.argv[3]}", str(number).encode())
        time.sleep(0.02)
"""


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@contextlib.contextmanager
def writer(directory: str, name: str, lease: float = LEASE) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the directory and writes a file again and again; the block begins once it has written."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, directory, str(lease), name], stderr=subprocess.PIPE, text=True
    )
    try:
        until(lambda: storage.exists(f"{directory}/by-{name}"))
        yield process
    finally:
        process.kill()
        process.communicate()


def until(happened: Callable[[], bool], seconds: float = 60) -> float:
    """Wait; for how long."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() < began + seconds
        time.sleep(0.05)
    return time.monotonic() - began


def files(directory: str) -> list[str]:
    return storage.names(f"{directory}/owner")


def change(directory: str, **values: object) -> None:
    """Change what the latest owner's file says."""
    path = f"{directory}/owner/{files(directory)[-1]}"
    storage.write_json(path, storage.read_json(path) | values)


def test_a_second_writer_is_refused_with_who_and_since_when(tmp_path):
    folder = str(tmp_path)
    with writer(folder, "first") as first, pytest.raises(Owned) as refused:
        owner.owned(folder).__enter__()
    record = json.loads(storage.read_bytes(f"{folder}/owner/000001.json"))
    for part in (folder, record["user"], record["host"], f"process {first.pid}", record["since"], "wait for its end"):
        assert part in str(refused.value)


def test_one_of_twenty_that_start_at_once_becomes_the_owner(folder):
    starters = [Owner(folder, 6.0) for _ in range(20)]
    together = threading.Barrier(20)

    def start(one: Owner) -> bool:
        together.wait()
        with contextlib.suppress(Owned):
            one.take(wait=False)
            return True
        return False

    with ThreadPoolExecutor(20) as pool:
        won = list(pool.map(start, starters))
    assert sum(won) == 1
    starters[won.index(True)].check()
    assert files(folder) == ["000001.json"]


def test_a_killed_owner_of_this_machine_is_replaced_at_once(tmp_path):
    folder = str(tmp_path)
    with writer(folder, "first", lease=1000) as first:
        first.kill()
        # not waited for: a zombie is gone too
        until(lambda: "Z" in Path(f"/proc/{first.pid}/stat").read_text())
        began = time.monotonic()
        with owner.owned(folder):
            assert time.monotonic() - began < 10
            assert files(folder) == ["000002.json"]


@pytest.mark.parametrize("changed", [{"started": "1"}, {"pid": 1 << 30}, {"released": True}], ids=str)
def test_another_process_with_the_number_of_one_that_is_gone_is_no_owner(tmp_path, changed):
    with owner.owned(str(tmp_path), lease=1000):
        change(str(tmp_path), **changed)
        with owner.owned(str(tmp_path)):
            assert files(str(tmp_path)) == ["000002.json"]


@pytest.mark.parametrize("place", [["another boot", "pid:[1]"], None], ids=str)
def test_an_owner_elsewhere_is_replaced_after_a_lease_without_a_beat(tmp_path, place):
    """Elsewhere is another machine, and another namespace of process ids on this one: a container."""
    place = place or [owner_files._place()[0], "pid:[1]"]
    Owner(str(tmp_path), LEASE).take(wait=False)
    change(str(tmp_path), place=place, pid=os.getpid())
    began = time.monotonic()
    with owner.owned(str(tmp_path)):
        assert LEASE <= time.monotonic() - began < 3 * LEASE


def test_an_owner_elsewhere_that_is_alive_is_not_replaced(folder):
    with owner.owned(folder, lease=5.0) as first:
        first._record["place"] = ["another boot", "pid:[1]"]
        first.beat()
        with pytest.raises(Owned, match="is being written by"):
            owner.owned(folder).__enter__()
        first.check()


def test_an_owner_that_was_stopped_past_its_lease_writes_nothing_more(folder):
    with writer(folder, "first") as first:
        first.send_signal(signal.SIGSTOP)
        seconds = until(lambda: "T" in Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2][:3])
        with writer(folder, "second") as second:
            assert seconds < 60
            before = int(storage.read_bytes(f"{folder}/by-first"))
            first.send_signal(signal.SIGCONT)
            _, error = first.communicate(timeout=60)
            assert f"Lost: {folder} was taken over by" in error
            assert f"process {second.pid}" in error
            after = int(storage.read_bytes(f"{folder}/by-first"))
            assert after <= before + 1  # what was being sent when it was stopped may arrive
            storage.remove(f"{folder}/by-second")
            until(lambda: storage.exists(f"{folder}/by-second"))  # it is not disturbed


def test_the_workers_of_an_owner_that_was_replaced_write_nothing_more(folder):
    with owner.owned(folder, lease=LEASE) as first:
        token = first.token
    with owner.working_for(token):
        storage.write_bytes(f"{folder}/one", b"")
    Owner(folder, LEASE).take(wait=False)
    with owner.working_for(token):
        for write in (
            lambda: storage.write_bytes(f"{folder}/two", b""),
            lambda: storage.write_json(f"{folder}/deep/er/two", {}),
            lambda: storage.upload(__file__, f"{folder}/two"),
            lambda: storage.remove(f"{folder}/one"),
            lambda: storage.remove_tree(f"{folder}"),
        ):
            with pytest.raises(storage.Lost, match="was taken over by"):
                write()
        assert storage.exists(f"{folder}/one")
        assert not storage.exists(f"{folder}/two")
        storage.write_bytes(f"{folder}2/two", b"")  # of another directory


def test_what_an_owner_starts_elsewhere_writes_as_long_as_it_does(tmp_path):
    directory, sent = str(tmp_path), []

    @owner.until_return
    def start() -> None:
        owner.claim(directory)
        sent.append(cloudpickle.dumps(owner.carried(storage.write_bytes)))

    start()
    write = cloudpickle.loads(sent[0])
    write(f"{directory}/one", b"")
    Owner(directory, LEASE).take(wait=False)
    with pytest.raises(storage.Lost, match="was taken over by"):
        write(f"{directory}/two", b"")
    assert storage.names(directory) == ["one", "owner"]


def test_an_owner_that_slept_and_was_not_replaced_goes_on(folder, monkeypatch):
    """A laptop that was closed: nobody else has begun, so it becomes the owner once more, and its workers go on."""
    with owner.owned(folder, lease=1000) as one:
        token, now = one.token, owner._clock()
        monkeypatch.setattr(owner, "_clock", lambda: now + 5000)
        storage.write_bytes(f"{folder}/file", b"")
        assert files(folder) == ["000002.json"]
        token.check()
        storage.write_bytes(f"{folder}/file", b"")
        assert files(folder) == ["000002.json"]


def test_a_released_directory_has_no_owner(folder):
    for number in (1, 2, 3):
        with owner.owned(folder):
            storage.write_bytes(f"{folder}/file", b"")
        assert files(folder) == [f"00000{number}.json"]


def test_a_disk_that_takes_no_more_is_an_error_and_leaves_no_owner(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            owner_files.create_only.__wrapped__(f"{tmp_path}/owner/000001.json", b"x")  # without retries
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(str(tmp_path)) == []


def test_a_directory_that_this_process_could_not_release_is_its_own_again(tmp_path):
    with owner.owned(str(tmp_path), lease=1000) as first:
        first._write = lambda: (_ for _ in ()).throw(OSError("storage that fails now"))
    assert not storage.read_json(f"{tmp_path}/owner/000001.json")["released"]
    with owner.owned(str(tmp_path)):
        assert files(str(tmp_path)) == ["000002.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id": 1}'])
def test_a_file_that_no_owner_finished_is_replaced_after_a_lease(tmp_path, content):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "000004.json").write_bytes(content)
    (tmp_path / "owner" / "notes.txt").write_text("not an owner's")
    (tmp_path / "owner" / "last.json").write_text("neither")
    with owner.owned(str(tmp_path), lease=0.2):
        assert files(str(tmp_path)) == ["000005.json", "last.json", "notes.txt"]


def test_a_directory_that_was_removed_is_written_no_more(tmp_path):
    with owner.owned(str(tmp_path / "run"), lease=LEASE):
        storage.remove_tree(str(tmp_path / "run" / "owner"))
        with pytest.raises(storage.Lost, match="was removed"):
            storage.write_bytes(f"{tmp_path}/run/file", b"")


def test_a_waiting_owner_comes_next(folder):
    order = []

    def second() -> None:
        with owner.owned(folder, wait=True):
            order.append("second")

    with owner.owned(folder):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_what_is_claimed_is_owned_until_the_function_returns(tmp_path):
    directory = str(tmp_path)

    @owner.until_return
    def inner() -> None:
        owner.claim(directory)  # the outer function has it

    @owner.until_return
    def outer() -> None:
        owner.claim(directory)
        inner()
        assert directory in storage.owned
        raise ValueError("an error releases it too")

    with pytest.raises(ValueError, match="releases"):
        outer()
    assert directory not in storage.owned
    assert storage.read_json(f"{directory}/owner/000001.json")["released"]


def test_a_notebook_may_begin_again_in_a_directory_that_it_removed(tmp_path):
    directory = str(tmp_path / "run")
    owner.claim(directory)
    assert owner.claim(directory) is owner.claim(directory)
    storage.remove_tree(directory)
    owner.claim(directory)
    storage.write_bytes(f"{directory}/file", b"")
    owner._process.stack.close()
    assert directory not in storage.owned
