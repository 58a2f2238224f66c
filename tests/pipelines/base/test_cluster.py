import gc
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import ray

from pipelines.base import cluster
from pipelines.base.prefetch import prefetch


@pytest.fixture
def left(monkeypatch, tmp_path) -> threading.Event:
    """Set when `disconnect` leaves Ray, which no test here has started."""
    event = threading.Event()
    monkeypatch.setattr(cluster, "_folder", lambda: tmp_path / "none")
    monkeypatch.setattr(ray, "shutdown", event.set)
    return event


def test_what_reads_ahead_ends_before_ray_is_left(left):
    """Its thread asks Ray for what comes next: once Ray was gone it would start another, or end the whole process."""
    order = list[str]()

    def blocks() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            order.append("after" if left.is_set() else "before")

    ahead = prefetch(blocks())
    assert next(ahead) == 0
    cluster.disconnect()
    assert left.is_set()
    assert order == ["before"]
    with pytest.raises(RuntimeError, match="Ray was left while super-batches were being read"):
        next(ahead)


def test_a_thread_that_its_loop_did_not_wait_for_ends_before_ray_is_left(left, monkeypatch):
    """As where Ctrl-C cuts the wait short, or a read takes longer than it is waited for."""
    comes, order = threading.Event(), list[str]()

    def blocks() -> Iterator[int]:
        try:
            yield 0
            assert comes.wait(10)
            yield 1
        finally:
            order.append("after" if left.is_set() else "before")

    ahead = prefetch(blocks())
    assert next(ahead) == 0
    with monkeypatch.context() as impatient:
        impatient.setattr("pipelines.base.prefetch._PATIENCE", 0.0)
        ahead.close()
    del ahead
    threading.Timer(0.2, comes.set).start()
    cluster.disconnect()
    assert order == ["before"]


def test_one_who_waits_for_a_super_batch_is_told_that_ray_was_left(left, monkeypatch):
    monkeypatch.setattr("pipelines.base.prefetch._PATIENCE", 0.2)
    asked, told = threading.Event(), list[BaseException]()

    def blocks() -> Iterator[int]:
        yield 0
        asked.set()
        assert left.wait(10)  # longer than it is waited for
        yield 1

    ahead = prefetch(blocks())
    assert next(ahead) == 0

    def wait() -> None:
        with pytest.raises(RuntimeError, match="Ray was left") as raised:
            next(ahead)
        told.append(raised.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert asked.wait(10)
    cluster.disconnect()
    waiting.join(10)
    assert told
    assert not any(thread.name == "super-batches" and thread.is_alive() for thread in _soon_without_readers())


def _soon_without_readers() -> list[threading.Thread]:
    """The threads that are there once those that read have had some seconds to end."""
    for thread in threading.enumerate():
        if thread.name == "super-batches":
            thread.join(10)
    return threading.enumerate()


def test_a_stream_that_nobody_has_begun_does_not_begin_when_ray_has_been_left(left):
    ahead = prefetch(iter(range(3)))
    cluster.disconnect()
    with pytest.raises(RuntimeError, match="Ray was left"):
        next(ahead)


def test_a_loop_that_was_given_up_leaves_nothing_that_reads():
    closed = threading.Event()

    def blocks() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    before = set(cluster._readers)  # of other tests
    ahead = prefetch(blocks())
    next(ahead)
    del ahead  # as a SubBatches that nobody holds
    assert closed.wait(10)
    _soon_without_readers()
    assert set(cluster._readers) <= before


def test_a_program_that_ends_while_it_reads_ends_quietly():
    """As a loop of one's own does that leaves its SubBatches behind: the interpreter itself is what leaves Ray."""
    code = (
        "import atexit, ray; from pipelines.base import cluster; from pipelines.base.prefetch import prefetch;"
        "atexit.register(cluster.disconnect); ahead = prefetch(iter(range(9)));"
        "print(next(ahead), len(cluster._readers));"
        "cluster._leave = lambda: print('left')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (out.stdout, out.stderr) == ("0 1\nleft\n", "")


def test_a_large_import_that_fails_leaves_the_garbage_collector_on():
    with pytest.raises(ModuleNotFoundError):
        cluster.import_large("pipelines.no_such_module")
    assert gc.isenabled()
