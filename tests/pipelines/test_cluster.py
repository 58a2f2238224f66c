import threading
from collections.abc import Iterator

import pytest
import ray

from pipelines import cluster, super_batches


@pytest.fixture
def left(monkeypatch, tmp_path) -> threading.Event:
    """Set when `disconnect` leaves Ray, which no test here has started."""
    event = threading.Event()
    monkeypatch.setattr(cluster, "_folder", lambda: tmp_path / "none")
    monkeypatch.setattr(ray, "shutdown", event.set)
    return event


def test_what_reads_ahead_ends_before_ray_is_left(left):
    """Its thread asks Ray for what comes next: once Ray was gone it would start another, or end the whole process."""
    asked, order = threading.Event(), list[str]()

    def blocks() -> Iterator[int]:
        try:
            for i in range(1000):
                asked.set()
                yield i
        finally:
            order.append("after" if left.is_set() else "before")

    ahead = super_batches.prefetch(blocks())
    assert next(ahead) == 0
    asked.wait(10)
    cluster.disconnect()
    assert left.is_set()
    assert order == ["before"]
    assert next(ahead, None) is None


def test_a_loop_that_was_given_up_leaves_nothing_that_reads(left):
    closed = threading.Event()

    def blocks() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    ahead = super_batches.prefetch(blocks())
    next(ahead)
    del ahead  # as a SubBatches that nobody holds
    assert closed.wait(10)
    cluster.disconnect()
    assert left.is_set()
