"""The Ray that stages run on: the cluster of RAY_ADDRESS where one is set, else one on this machine."""

import atexit
import contextlib
import ctypes
import gc
import importlib
import logging
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from .log_level import LogLevel, shows

_DATA_CPUS = 2  # concurrent read tasks of one learner
_GIB = 1 << 30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_FOLDER = "jest-ray-"  # and the number of our process: where a local Ray keeps its sockets and logs
_PATIENCE = 5.0  # seconds that Ray's processes get to end by themselves
_stops: weakref.WeakSet[Callable[[], None]] = weakref.WeakSet()  # of what reads: `disconnect` calls them first
_ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def connect() -> None:
    """Start or join Ray; a second call does nothing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    shown = shows(LogLevel.debug)
    import ray

    if ray.is_initialized():
        return
    if not is_local():
        ray.init(log_to_driver=shown, logging_level=logging.INFO if shown else logging.ERROR)
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process that asks whether a node will go
    _remove_stale_folders()
    atexit.register(disconnect)  # for those who call from a program of their own
    cores = os.cpu_count() or 1
    ends = signal.getsignal(signal.SIGTERM)
    ray.init(
        "local",  # never one that somebody else has started here
        # logical: an actor pool that takes every CPU would leave none to its readers, and the pipeline would never
        # start
        num_cpus=max(8, 2 * cores),
        include_dashboard=False,
        object_store_memory=local_object_store_bytes(),
        log_to_driver=shown,
        logging_level=logging.INFO if shown else logging.ERROR,
        _temp_dir=str(_folder()),
    )
    if ends is not signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ends)  # Ray has put its own in place of it


@contextlib.contextmanager
def connected_meanwhile(module: str, *, readers: str | None) -> Iterator[None]:
    """Start or join Ray while this process imports a module in a thread; within the block both are done.

    readers: a module that the workers which will read for this process import meanwhile too, where Ray is this machine
    alone. PyTorch's import and Ray's start take seconds each, and neither needs the other.
    """
    with ThreadPoolExecutor(1, "import") as thread:
        imported = thread.submit(import_large, module)
        connect()
        import ray

        warm = []
        if readers and is_local():
            warm = [ray.remote(num_cpus=1)(import_large).remote(readers) for _ in range(data_cpus(1))]
        imported.result()
    yield
    ray.get(warm)  # while they are busy Ray would start others for what is to be read


def import_large(module: str) -> None:
    """Import a module while the garbage collector rests, and have it leave alone what is there then: PyTorch's import
    makes most of a million objects that stay, and it would look through them again and again."""
    if module in sys.modules:
        importlib.import_module(module)  # which waits for another thread that is at it
        return
    gc.collect()  # what is garbage already would be left alone too
    was_on = gc.isenabled()
    gc.disable()
    try:
        importlib.import_module(module)
        gc.freeze()
    finally:
        if was_on:
            gc.enable()


def stop_first(stop: Callable[[], None]) -> None:
    """Have `disconnect` call this before it leaves Ray, if anything holds it still."""
    _stops.add(stop)


def disconnect() -> None:
    """Leave Ray. Of one that `connect` started here, no process, socket or file stays behind."""
    try:
        for stop in set(_stops):  # one after the other: as the interpreter ends there are no pools any more
            stop()
    finally:
        _leave()


def _leave() -> None:
    folder = _folder()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # reads under way fail now, and nobody needs their errors
    if not is_own():
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        return
    import ray

    own = _own_processes()
    ray.shutdown()
    _, alive = psutil.wait_procs(own, timeout=_PATIENCE)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_PATIENCE)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cleared_up() -> Iterator[None]:
    """Within the block Ray may be started; however the block ends, nothing of a local one outlives it. SIGTERM, and
    SIGHUP of a terminal that closes, end it as an error does, with the exit status that shells give them."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (*_ENDS, signal.SIGINT)}
    for number in _ENDS:
        if before[number] is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, end)
    try:
        yield
    finally:
        for number in before:  # another must not cut this short
            signal.signal(number, signal.SIG_IGN)
        disconnect()
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def kill_own(name: str) -> None:
    """SIGKILL to the processes of the Ray that `connect` started here which have this in their command line."""
    for process in _own_processes():
        if name in " ".join(_command(process)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _own_processes() -> list[psutil.Process]:
    """Of the Ray that `connect` started here: its servers, and what they started."""
    folder, found = str(_folder()), []
    for process in psutil.Process().children():
        if folder in " ".join(_command(process)):
            found.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                found += process.children(recursive=True)
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _folder() -> Path:
    """Of the Ray that this process starts. Short, as paths of sockets have to be."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / f"{_FOLDER}{os.getpid()}"


def _remove_stale_folders() -> None:
    """What commands that were killed could not remove."""
    for folder in _folder().parent.glob(f"{_FOLDER}*"):
        pid = folder.name.removeprefix(_FOLDER)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def local_object_store_bytes() -> int:
    """Of the Ray that `connect` starts on this machine."""
    return int(min(2 * _GIB, 0.15 * psutil.virtual_memory().available))


def n_cores() -> int:
    """Cores that this process may use, where the system tells; those of the machine elsewhere."""
    if hasattr(os, "process_cpu_count"):  # since Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Linux, macOS


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees: a step on CPUs asks for the same activations again, and each
    page that comes from the system anew costs a fault and a clearing. Only glibc, and most in the main thread."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # all that older ones take
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def data_cpus(n_learners: int) -> int:
    """Concurrent read tasks of one learner; where Ray is one machine no more than its share of the cores: each keeps
    one busy."""
    import ray

    return min(_DATA_CPUS, max(1, n_cores() // n_learners)) if len(ray.nodes()) == 1 else _DATA_CPUS


def is_own() -> bool:
    """Whether there is a Ray that `connect` has started here."""
    return _folder().exists()


def is_local() -> bool:
    """Whether Ray is this machine alone, started by us."""
    return not os.environ.get("RAY_ADDRESS")


def n_workers(gpus_each: float) -> int:
    """How many actors the cluster has room for: by its GPUs; without, one a core here, or for each two CPUs elsewhere,
    which leaves the others to decode."""
    import ray

    resources = ray.cluster_resources()
    if gpus_each:
        return max(1, int(resources.get("GPU", 0) / gpus_each))
    return n_cores() if is_local() else max(1, int(resources["CPU"]) // 2)


def data_context(n_cpus: int | None = None) -> None:
    """Ray Data as jest uses it, in this process: ordered, quiet, and within n_cpus where given."""
    import ray.data  # which sets its loggers up

    shown = shows(LogLevel.debug)
    logging.getLogger("ray.data").setLevel(logging.INFO if shown else logging.CRITICAL)  # what it logs is raised too
    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # always set: the context is the process's, and what trained in it before has left its own limit there
    limits = ray.data.ExecutionResources() if n_cpus is None else ray.data.ExecutionResources(cpu=n_cpus)
    context.execution_options.resource_limits = limits
