"""The Ray cluster that stages run on: that of RAY_ADDRESS where it is set, else one that `connect` starts locally."""

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil

from .log_level import LogLevel, shows

_DATA_CPUS = 2  # concurrent read tasks of one learner
_GIB = 1 << 30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_FOLDER = "jest-ray-"  # and the process id: the folder of a local Ray's sockets and logs
_PATIENCE = 5.0  # seconds that Ray's processes get to end by themselves
_ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stoppable(Protocol):
    """Something that asks Ray for data in a thread, and can be stopped."""

    def stop(self) -> None: ...


_readers: weakref.WeakSet[Stoppable] = weakref.WeakSet()  # `disconnect` stops them first


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
    os.environ.setdefault(
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0"
    )  # one process less, which watches for preempted nodes
    _remove_stale_folders()
    atexit.register(disconnect)  # where a user's program calls jest, not the command line
    cores = os.cpu_count() or 1
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(
        "local",  # never join a Ray that another program has started on this machine
        # more CPUs than there are: an actor pool that reserves all CPUs would leave none to the tasks that read for it,
        # and the pipeline would never start
        num_cpus=max(8, 2 * cores),
        include_dashboard=False,
        object_store_memory=local_object_store_bytes(),
        log_to_driver=shown,
        logging_level=logging.INFO if shown else logging.ERROR,
        _temp_dir=str(_folder()),
    )
    if on_sigterm is not signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has replaced the handler


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
            warm = [ray.remote(num_cpus=1)(import_large).remote(readers) for _ in range(data_cpus(1))]
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
    folder = _folder()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # reads under way fail now; their errors say nothing
    if not is_own():
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        return
    import ray

    processes = _own_processes()
    ray.shutdown()
    _, alive = psutil.wait_procs(processes, timeout=_PATIENCE)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_PATIENCE)
    _remove(folder)


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
        yield
    finally:
        for number in before:  # a second signal must not interrupt this
            signal.signal(number, signal.SIG_IGN)
        disconnect()
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def kill_own(name: str) -> None:
    """SIGKILL the processes of the local Ray that `connect` started whose command line contains `name`."""
    for process in _own_processes():
        if name in " ".join(_command(process)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _own_processes() -> list[psutil.Process]:
    """The servers of the local Ray that `connect` started, and the processes that those started."""
    folder, processes = str(_folder()), []
    for process in psutil.Process().children():
        if folder in " ".join(_command(process)):
            processes.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                processes += process.children(recursive=True)
    return processes


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _folder() -> Path:
    """The folder of the local Ray that this process starts. Short, because the paths of sockets have to be."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / f"{_FOLDER}{os.getpid()}"


def _remove(folder: Path) -> None:
    """Remove the folder of a local Ray whose command has ended, and end what is left of its processes: those that lost
    their parent, and hang."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if _is_left_of(folder, process):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _is_left_of(folder: Path, process: psutil.Process) -> bool:
    """Whether a process of that Ray has outlived the one that started it. The command line of a worker is its title;
    its logs are in the folder."""
    words = process.cmdline() or [""]
    if words[0].startswith("ray::"):
        return any(file.path.startswith(f"{folder}/") for file in process.open_files())
    return f"{folder}/" in " ".join(words) and process.ppid() == 1


def _remove_stale_folders() -> None:
    """Remove what is left of processes that were killed."""
    for folder in _folder().parent.glob(f"{_FOLDER}*"):
        pid = folder.name.removeprefix(_FOLDER)
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(folder)


def local_object_store_bytes() -> int:
    """Size of the object store of a local Ray."""
    return int(min(2 * _GIB, 0.15 * psutil.virtual_memory().available))


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


def data_cpus(n_learners: int) -> int:
    """Concurrent read tasks of one learner; on a single machine no more than its share of the cores, since each task
    keeps one core busy."""
    import ray

    return min(_DATA_CPUS, max(1, n_cores() // n_learners)) if len(ray.nodes()) == 1 else _DATA_CPUS


def is_own() -> bool:
    """Whether a local Ray that `connect` has started is running."""
    return _folder().exists()


def is_local() -> bool:
    """Whether stages run on a local Ray, which `connect` starts, and not on the cluster of RAY_ADDRESS."""
    return not os.environ.get("RAY_ADDRESS")


def n_workers(gpus_each: float) -> int:
    """How many actors the cluster has room for.

    gpus_each: GPUs of an actor; without GPUs, a local Ray gets an actor for each core, and a cluster one for every two
    CPUs, which leaves the others to decode.
    """
    import ray

    resources = ray.cluster_resources()
    if gpus_each:
        return max(1, int(resources.get("GPU", 0) / gpus_each))
    return n_cores() if is_local() else max(1, int(resources["CPU"]) // 2)


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
