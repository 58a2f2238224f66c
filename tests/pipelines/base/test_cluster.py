import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import ray

from pipelines.base import cluster, local_ray
from pipelines.base.prefetch import prefetch


@pytest.fixture
def disconnected(monkeypatch, tmp_path) -> threading.Event:
    """An event that is set when `cluster.disconnect` shuts Ray down; no test here starts a real one."""
    event = threading.Event()
    monkeypatch.setattr(local_ray, "_folder", lambda: tmp_path / "none")
    monkeypatch.setattr(ray, "shutdown", event.set)
    return event


def test_prefetching_ends_before_ray_disconnects(disconnected):
    """Its thread calls Ray for the next block: after a shutdown that would start another Ray, or end the process."""
    order = list[str]()

    def blocks() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            order.append("after" if disconnected.is_set() else "before")

    ahead = prefetch(blocks())
    assert next(ahead) == 0
    cluster.disconnect()
    assert disconnected.is_set()
    assert order == ["before"]
    with pytest.raises(RuntimeError, match="Ray was left while super-batches were being read"):
        next(ahead)


def test_a_prefetching_thread_that_outlives_its_loop_ends_before_ray_disconnects(disconnected, monkeypatch):
    """As when Ctrl-C interrupts the wait, or a read takes longer than the wait."""
    arrived, order = threading.Event(), list[str]()

    def blocks() -> Iterator[int]:
        try:
            yield 0
            assert arrived.wait(10)
            yield 1
        finally:
            order.append("after" if disconnected.is_set() else "before")

    ahead = prefetch(blocks())
    assert next(ahead) == 0
    with monkeypatch.context() as impatient:
        impatient.setattr("pipelines.base.prefetch._PATIENCE", 0.0)
        ahead.close()
    del ahead
    threading.Timer(0.2, arrived.set).start()
    cluster.disconnect()
    assert order == ["before"]


def test_a_consumer_waiting_for_a_super_batch_gets_an_error_when_ray_disconnects(disconnected, monkeypatch):
    monkeypatch.setattr("pipelines.base.prefetch._PATIENCE", 0.2)
    requested, errors = threading.Event(), list[BaseException]()

    def blocks() -> Iterator[int]:
        yield 0
        requested.set()
        assert disconnected.wait(10)  # longer than disconnect waits for the thread
        yield 1

    ahead = prefetch(blocks())
    assert next(ahead) == 0

    def wait() -> None:
        with pytest.raises(RuntimeError, match="Ray was left") as raised:
            next(ahead)
        errors.append(raised.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert requested.wait(10)
    cluster.disconnect()
    waiting.join(10)
    assert errors
    assert not any(thread.name == "super-batches" and thread.is_alive() for thread in _threads_after_prefetching())


def _threads_after_prefetching() -> list[threading.Thread]:
    """The running threads, after some seconds for prefetching threads to end."""
    for thread in threading.enumerate():
        if thread.name == "super-batches":
            thread.join(10)
    return threading.enumerate()


def test_a_stream_does_not_start_after_ray_has_disconnected(disconnected):
    ahead = prefetch(iter(range(3)))
    cluster.disconnect()
    with pytest.raises(RuntimeError, match="Ray was left"):
        next(ahead)


def test_an_abandoned_loop_leaves_no_prefetching_thread():
    closed = threading.Event()

    def blocks() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    before = set(cluster._readers)  # those of other tests
    ahead = prefetch(blocks())
    next(ahead)
    del ahead  # as a SubBatches without references
    assert closed.wait(10)
    _threads_after_prefetching()
    assert set(cluster._readers) <= before


def test_a_program_that_exits_while_prefetching_prints_no_error():
    """As a custom loop that does not close its SubBatches: Ray is shut down when the interpreter exits."""
    code = (
        "import atexit, ray; from pipelines.base import cluster; from pipelines.base.prefetch import prefetch;"
        "atexit.register(cluster.disconnect); ahead = prefetch(iter(range(9)));"
        "print(next(ahead), len(cluster._readers));"
        "cluster._leave = lambda: print('left')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (out.stdout, out.stderr) == ("0 1\nleft\n", "")


def test_a_failed_large_import_turns_the_garbage_collector_on_again():
    with pytest.raises(ModuleNotFoundError):
        cluster.import_large("pipelines.no_such_module")
    assert gc.isenabled()


def test_a_worker_that_outlived_its_command_ends_with_the_folder_of_its_logs(tmp_path):
    """An actor that hangs when its Ray is gone would stay for good: nothing is its parent."""
    folders = tmp_path / "jest-ray-1", tmp_path / "jest-ray-12"
    workers = []
    for folder in folders:
        folder.mkdir()
        with (folder / "worker.out").open("w") as out:
            workers.append(subprocess.Popen(["bash", "-c", "exec -a ray::Left sleep 60"], stdout=out))
    for worker in workers:
        while not "".join(psutil.Process(worker.pid).cmdline()).startswith("ray::"):  # empty while it starts
            time.sleep(0.01)
    local_ray._remove(folders[0])
    try:
        assert workers[0].wait(10) == -signal.SIGKILL
        assert workers[1].poll() is None
        assert not folders[0].exists()
        assert folders[1].exists()
    finally:
        workers[1].kill()
        workers[1].wait()
