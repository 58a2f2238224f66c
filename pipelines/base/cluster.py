"""The Ray cluster that stages run on: that of RAY_ADDRESS where it is set, else one that `connect` starts locally."""

import atexit
import contextlib
import ctypes
import gc
import importlib
import logging
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, Protocol

from . import demand, growth, local_ray, tokens, waiting
from .local_ray import is_own as is_own
from .local_ray import local_object_store_bytes as local_object_store_bytes
from .log_level import LogLevel, shows

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stoppable(Protocol):
    """Something that asks Ray for data in a thread, and can be stopped."""

    def stop(self) -> None: ...


_readers: weakref.WeakSet[Stoppable] = weakref.WeakSet()  # `disconnect` stops them first
_watch: waiting.Watch | None = None


def connect() -> None:
    """Start or join Ray; a second call does nothing.

    Raises PermissionError where the cluster of RAY_ADDRESS asks for another token than the one here, and
    ConnectionError where it cannot be joined.
    """
    global _watch
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    shown = shows(LogLevel.debug)
    import ray

    if ray.is_initialized():
        return
    waiting.minutes()  # raises where it is wrong
    if is_local():
        atexit.register(disconnect)  # where a user's program calls jest, not the command line
        local_ray.start(shown=shown)
    else:
        _join(os.environ["RAY_ADDRESS"], shown=shown)
    _watch = waiting.Watch(alone=is_local())


def _join(address: str, *, shown: bool) -> None:
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    if "://" not in address and (found := canonicalize_bootstrap_address(address)) is not None:
        tokens.agree_with_cluster(found)
    try:
        ray.init(log_to_driver=shown, logging_level=logging.INFO if shown else logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"RAY_ADDRESS={address} cannot be joined: {error}. Only a process on one of the cluster's machines can, "
            "with the cluster's versions of Ray and Python; from elsewhere `jest submit` sends the stages as a job"
        ) from error


@contextlib.contextmanager
def connected_meanwhile(module: str, *, readers: str | None) -> Iterator[None]:
    """Start or join Ray while a thread imports a module; both are done when the block begins.

    PyTorch's import and Ray's start take seconds each, and neither needs the other. readers: a module that Ray's
    workers import meanwhile where Ray is local, so that those which read data start at once.
    """
    with ThreadPoolExecutor(1, "import") as thread:
        imported = thread.submit(import_large, module)
        connect()
        import ray

        warm = []
        if readers and is_local():
            warm = [ray.remote(num_cpus=1)(import_large).remote(readers) for _ in range(n_cores())]
        imported.result()
    yield
    ray.get(warm)  # while these workers are busy Ray would start others for the read tasks


def import_large(module: str) -> None:
    """Import a module with the garbage collector off, and exempt all objects that exist then from collection: PyTorch's
    import makes most of a million objects that stay, which the collector would visit again and again."""
    if module in sys.modules:
        importlib.import_module(module)  # waits for another thread that imports it
        return
    gc.collect()  # freeze() would keep what is garbage already
    was_on = gc.isenabled()
    gc.disable()
    try:
        importlib.import_module(module)
        gc.freeze()
    finally:
        if was_on:
            gc.enable()


def stop_first(reader: Stoppable) -> None:
    """Have `disconnect` stop this reader before it leaves Ray; only a weak reference is kept."""
    _readers.add(reader)


def disconnect() -> None:
    """Leave Ray. No process, socket or file of a local Ray that `connect` started stays behind."""
    try:
        for reader in set(_readers):  # one after the other: as the interpreter ends no thread pool can start
            reader.stop()
    finally:
        _leave()


def _leave() -> None:
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # reads under way fail now; their errors say nothing
    if is_own():
        local_ray.leave()
    elif "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    tokens.restore()


def is_joined() -> bool:
    """Whether this process has started or joined a Ray, and has not left it."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def kill_own(name: str) -> None:
    """Kill the actors of this process, and all processes of a local Ray that it started, whose class or command line
    contains `name`."""
    if is_own():
        local_ray.kill(name)
        return
    import ray
    from ray._private import state

    worker: Any = ray._private.worker.global_worker
    for actor_id, actor in state.actors(job_id=worker.current_job_id).items():
        if name in actor["ActorClassName"] and actor["State"] != "DEAD":
            with contextlib.suppress(ray.exceptions.RayError):
                worker.core_worker.kill_actor(ray.ActorID(bytes.fromhex(actor_id)), True)  # for good


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raises why the block has been interrupted, where that was for want of room (waiting.py)."""
    try:
        yield
    except KeyboardInterrupt:
        if _watch is not None and _watch.failure is not None:
            raise _watch.failure from None
        raise


@contextlib.contextmanager
def cleared_up() -> Iterator[None]:
    """Disconnect from Ray however the block ends, so that no process of a local Ray outlives it.

    SIGTERM, and SIGHUP of a terminal that closes, end the block as an exception does, with exit status 128 + signal.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (*_ENDS, signal.SIGINT)}
    for number in _ENDS:
        if before[number] is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, end)
    try:
        with watched():
            yield
    finally:
        for number in before:  # a second signal must not interrupt this
            signal.signal(number, signal.SIG_IGN)
        disconnect()
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def n_cores() -> int:
    """Cores that this process may use; all of the machine where the system does not say."""
    if hasattr(os, "process_cpu_count"):  # since Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Linux, macOS


def keep_freed_memory() -> None:
    """Have the C library keep memory that this process frees: a training step on CPUs allocates the same activations
    again, and each page that the system hands out costs a page fault. Needs glibc; helps most in the main thread."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(
            _M_MMAP_THRESHOLD, 1 << 25
        )  # the most that older versions allow
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def is_local() -> bool:
    """Whether stages run on a local Ray, which `connect` starts, and not on the cluster of RAY_ADDRESS."""
    return not os.environ.get("RAY_ADDRESS")


def n_workers(gpus_each: float) -> int:
    """How many actors the cluster has room for now.

    gpus_each: GPUs of an actor; without GPUs, a local Ray gets an actor for each core, and a cluster one for every two
    CPUs, which leaves the others to decode.
    """
    import ray

    if gpus_each:
        return max(1, int(ray.cluster_resources().get("GPU", 0) / gpus_each))
    return n_cores() if is_local() else max(1, growth.n_cpus() // 2)


def n_tasks(fixed: int | None = None) -> Callable[[], int]:
    """How many tasks of a CPU each to submit at once, asked again and again: the cluster may grow. fixed: if set, so
    many."""
    if fixed is not None:
        return lambda: fixed
    return n_cores if is_local() else growth.AtOnce()


def grows() -> bool:
    """Whether an autoscaler starts nodes for what waits."""
    return not is_local() and demand.autoscales()


def data_context(n_cpus: int | None = None) -> None:
    """Set Ray Data up in this process: blocks in order, no progress bars, at most n_cpus CPUs where given."""
    import ray.data  # sets up its loggers, so comes before the level is set

    shown = shows(LogLevel.debug)
    logging.getLogger("ray.data").setLevel(logging.INFO if shown else logging.CRITICAL)  # what it logs is raised too
    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # always set: the context belongs to the process, and an earlier stage may have left its limit there
    limits = ray.data.ExecutionResources() if n_cpus is None else ray.data.ExecutionResources(cpu=n_cpus)
    context.execution_options.resource_limits = limits
