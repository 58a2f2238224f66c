"""Seconds and bytes of functions on a device, and what the device itself sustains: the floors to compare with."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str, repeats: int = 5, warm_up: int = 1) -> float:
    """Median of single calls, by CUDA events; on the CPU by the clock."""
    for _ in range(warm_up):
        function()
    synchronize(device)
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_mb(function: Callable[[], Any], device: str) -> float | None:
    """Of the allocations of one call, above what is allocated before it; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def product_rate(device: str, dtype: torch.dtype, n: int = 8192) -> float:
    """FLOPs a second of an n x n matrix product of random numbers."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device, repeats=10, warm_up=3)


def copy_rate(device: str, n_bytes: int) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / seconds(lambda: target.copy_(source), device)
