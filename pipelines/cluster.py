"""The Ray that stages run on: the cluster of RAY_ADDRESS where one is set, else one on this machine."""

import contextlib
import ctypes
import logging
import os
from typing import Any

import psutil
import ray

_GIB = 1 << 30
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def connect() -> None:
    """Start or join Ray; a second call does nothing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ layer writes to the terminal otherwise
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    if not is_local():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    cores = os.cpu_count() or 1
    ray.init(
        "local",  # never one that somebody else has started here
        # logical: an actor pool that takes every CPU would leave none to its readers, and the pipeline would never
        # start
        num_cpus=max(8, 2 * cores),
        include_dashboard=False,
        object_store_memory=local_object_store_bytes(),
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


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


def is_local() -> bool:
    """Whether Ray is this machine alone, started by us."""
    return not os.environ.get("RAY_ADDRESS")


def n_workers(gpus_each: float) -> int:
    """How many actors the cluster has room for: by its GPUs; without, one a core here, or for each two CPUs elsewhere,
    which leaves the others to decode."""
    resources = ray.cluster_resources()
    if gpus_each:
        return max(1, int(resources.get("GPU", 0) / gpus_each))
    return n_cores() if is_local() else max(1, int(resources["CPU"]) // 2)


def data_context(n_cpus: int | None = None) -> None:
    """Ray Data as jest uses it, in this process: ordered, quiet, and within n_cpus where given."""
    import ray.data

    context: Any = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # always set: the context is the process's, and what trained in it before has left its own limit there
    limits = ray.data.ExecutionResources() if n_cpus is None else ray.data.ExecutionResources(cpu=n_cpus)
    context.execution_options.resource_limits = limits
