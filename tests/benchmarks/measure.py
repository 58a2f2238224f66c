"""Time and peak memory of functions."""

import ctypes
import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pipelines.base.cluster import n_cores
from pipelines.planning.calibrate import cpu

console = Console(width=120)


def machine(device: str) -> str:
    """The machine and versions that figures were measured on, to print above them."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def seconds(contestants: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Median wall-clock seconds of each, in turns so that other load affects all alike; a first turn is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, function in contestants.items():
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def peak_bytes(function: Callable[[Any], Any], prepare: Callable[[], Any], device: str = "cpu") -> tuple[int, float]:
    """Peak memory of function(prepare()) above that after prepare(), in bytes, and its seconds, in a separate process.

    On the CPU it is resident memory, which includes what libraries allocate; on CUDA it is what torch allocates.
    """
    context = multiprocessing.get_context("forkserver")  # a fork server, which imports these packages once
    context.set_forkserver_preload(["torch", "open_clip", "pyarrow.parquet"])
    with context.Pool(1) as pool:
        return pool.apply(_peak, (function, prepare, device))


def _peak(function: Callable[[Any], Any], prepare: Callable[[], Any], device: str) -> tuple[int, float]:
    prepared = prepare()
    _wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the highest resident size
        before = resident_bytes("VmRSS")
    start = time.perf_counter()
    function(prepared)
    _wait(device)
    elapsed = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")
    return after - before, elapsed


def resident_bytes(name: str) -> int:
    """Resident memory of this process: VmRSS is the current value, VmHWM the peak."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not match:
        raise RuntimeError(f"/proc/self/status has no {name}: memory can be measured on Linux only")
    return int(match[1]) * 1024


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    out = Table(*columns, title=title, title_justify="left")
    for row in rows:
        out.add_row(*row)
    console.print(out)


def threads() -> None:
    """Use all cores, whatever OMP_NUM_THREADS says."""
    torch.set_num_threads(n_cores())
