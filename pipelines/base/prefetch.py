"""An iterator drawn from in a thread, ahead of whoever wants the items."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from . import cluster

_PATIENCE = 5.0  # seconds that the thread gets to end
Item = TypeVar("Item")


def prefetch(items: Iterator[Item], depth: int = 1) -> Generator[Item, None, None]:
    """Draw from an iterator in a thread, `depth` items ahead: the next super-batch is put together during the step.

    Where it is closed, or Ray is left, the thread ends with the item that it is at, which is waited for some seconds.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    done, closed = object(), threading.Event()
    ended = threading.Event()  # is_alive() may err: up to Python 3.12 a join that Ctrl-C ends marks the thread as ended

    def put(item: Any) -> None:
        if not closed.is_set():  # else nobody takes it, and the thread would wait for ever
            ready.put(item)

    def fill() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
            put(done)
        except BaseException as error:
            put(error)
        finally:
            if isinstance(items, Generator):
                items.close()

    def run(_stop: Callable[[], None]) -> None:
        """Holding `stop` keeps it among cluster's weak references, where `disconnect` looks, while this thread runs."""
        try:
            fill()
        finally:
            ended.set()

    def stop() -> None:
        if closed.is_set() and ended.is_set():  # nothing is left to stop; as Python ends modules may be empty already
            return
        closed.set()
        started = thread.ident is not None
        own = thread is threading.current_thread()  # in which the garbage collector may close the generator
        deadline = time.monotonic() + _PATIENCE
        while started and not own and not ended.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            ended.wait(0.05)
        with contextlib.suppress(queue.Full):
            ready.put_nowait(done)  # for one who waits for an item

    thread = threading.Thread(target=run, args=(stop,), daemon=True, name="super-batches")

    def drawn() -> Generator[Item, None, None]:
        try:
            if not closed.is_set():
                thread.start()
            while (item := ready.get()) is not done and not closed.is_set():
                if isinstance(item, BaseException):
                    raise item
                yield item
            if closed.is_set():
                raise RuntimeError("Ray was left while super-batches were being read")
        finally:
            stop()

    cluster.stop_first(stop)
    return drawn()
