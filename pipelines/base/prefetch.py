"""An iterator that a thread draws from, ahead of whoever wants the items."""

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any, Generic, TypeVar

from . import cluster

_PATIENCE = 5.0  # seconds that the thread gets to end
_DONE = object()  # in the queue: no item follows
Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 1) -> Generator[Item, None, None]:
    """Draw from an iterator in a thread, `depth` items ahead: the next super-batch is put together during the step.

    When the generator is closed, or `cluster.disconnect` leaves Ray, the thread ends after its current item; closing
    waits for that for at most _PATIENCE seconds.
    """
    reader = _Reader(items, depth)
    cluster.stop_first(reader)
    return reader.drawn()


class _Reader(Generic[Item]):
    """The thread and the queue that it fills.

    `cluster` keeps a weak reference; the thread's target is a bound method, which keeps the reader alive while it runs.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._items = items
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)  # items, then _DONE or an error
        self._closed = threading.Event()
        # is_alive() may err: up to Python 3.12 a join that Ctrl-C ends marks the thread as ended
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="super-batches")

    def drawn(self) -> Generator[Item, None, None]:
        """The items in order. Raises what drawing them raised, and RuntimeError once Ray has been left."""
        try:
            if not self._closed.is_set():
                self._thread.start()
            while (item := self._ready.get()) is not _DONE and not self._closed.is_set():
                if isinstance(item, BaseException):
                    raise item
                yield item
            if self._closed.is_set():
                raise RuntimeError("Ray was left while super-batches were being read")
        finally:
            self.stop()

    def stop(self) -> None:
        """End the thread, and whoever waits for an item."""
        if self._closed.is_set() and self._ended.is_set():  # as Python ends, modules may be empty already
            return
        self._closed.set()
        started = self._thread.ident is not None
        # the garbage collector may close the generator in the thread itself
        is_inside = self._thread is threading.current_thread()
        deadline = time.monotonic() + _PATIENCE
        while started and not is_inside and not self._ended.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()
            self._ended.wait(0.05)
        with contextlib.suppress(queue.Full):
            self._ready.put_nowait(_DONE)  # for one who waits for an item

    def _run(self) -> None:
        try:
            for item in self._items:
                self._put(item)
                if self._closed.is_set():
                    return
            self._put(_DONE)
        except BaseException as error:
            self._put(error)
        finally:
            try:
                if isinstance(self._items, Generator):
                    self._items.close()
            finally:
                self._ended.set()

    def _put(self, item: object) -> None:
        if not self._closed.is_set():  # else nobody takes it, and the thread would wait for ever
            self._ready.put(item)
