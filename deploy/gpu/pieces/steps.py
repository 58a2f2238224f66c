"""Steps of the paper's models: uniform, JEST with a cached reference, and FlexiJEST, at f = 0.8.

Time beside FLOPs, both relative to a uniform step; FLOPs a second against the rate of matrix products, measured here,
and against the card's peak (mfu); memory and time as `jest plan` predicts them; and how often torch.compile compiled
again while steps were timed.
"""

import statistics
import time
from typing import Any, cast

import torch

from deploy.gpu import timing
from deploy.gpu.results import Results
from jest_core import flops
from jest_core.run_file import Run
from jest_core.training.step import Learner, train_step
from pipelines.planning import calibrate, sizes
from pipelines.training.metrics_line import MetricsLine
from tests.benchmarks import bench_flexi

NAMES = ("uniform", "JEST", "FlexiJEST")
GOALS = {"JEST": 1.05, "FlexiJEST": 1.15}  # of JEST its FLOPs ratio; of FlexiJEST a uniform step
HOPPER = 989e12  # FLOPs a second of an H100's and an H200's dense bfloat16 products, as NVIDIA gives them
WARM_UP, MEASURED = 3, 3  # calibrate leaves out three steps of a run


def run(results: Results) -> None:
    dtype = torch.bfloat16 if results.cuda else torch.float32
    rate = timing.product_rate(results.device, dtype, 512 if results.small else 8192)
    results.row("what the device sustains", matrix_products_tflops=rate / 1e12)
    if results.small:
        _model(results, "jest-tiny", [16], rate, compiled=False)
        results.skip("steps, compiled", "needs CUDA: compiling takes minutes on a CPU")
        return
    b = _model(results, "jest-b-16-256", [512, 256, 128], rate, compiled=False)
    _model(results, "jest-l-16-256", [512, 256, 128, 64], rate, compiled=False)
    if b:
        _model(results, "jest-b-16-256", [b], rate, compiled=True)


def _model(results: Results, model: str, batches: list[int], rate: float, *, compiled: bool) -> int | None:
    """All contestants at the largest of the batch sizes that fits; which one that is."""
    for b in batches:
        what = f"{model}, b = {b}{', compiled' if compiled else ''}"
        if not results.has_seconds(what, 40 if compiled else 15):
            return None
        with results.attempt(what):
            if not _contest(results, what, model, b, rate, compiled=compiled):
                torch.cuda.empty_cache()
                continue
        return b
    results.check(f"{model} fits at one of the batch sizes", False, batch_sizes=str(batches))
    return None


def _contest(results: Results, what: str, model: str, b: int, rate: float, *, compiled: bool) -> bool:
    """Whether it fits into the card's memory."""
    precision = "bf16" if results.cuda else "fp32"
    runs = {name: bench_flexi.run_of(name, model, b, min(b, 512), precision) for name in NAMES}
    measured: dict[str, list[dict[str, float]]] = {}
    try:
        learners, held = bench_flexi.learners(runs, model, results.device, compiled)
        for name in runs:
            if results.has_seconds(f"{name}: {what}", 10):
                measured[name] = _lines(results, f"{name}: {what}", learners[name], held, compiled)
                _report(results, f"{name}: {what}", name, runs, measured, rate)
    except torch.OutOfMemoryError as error:
        results.row(f"{what} does not fit", memory=str(error).splitlines()[0])
        return False
    return True


def _lines(results: Results, what: str, learner: Learner, held: Any, compiled: bool) -> list[dict[str, float]]:
    """Times of each step, as metrics.jsonl names them."""
    batch, lines = held[torch.arange(learner.run.super_batch_size)], []
    began = time.perf_counter()
    if results.cuda:
        torch.cuda.reset_peak_memory_stats()
    graphs = 0
    for step in range(WARM_UP + MEASURED):
        if step == WARM_UP:
            graphs = _graphs()
        timing.synchronize(results.device)
        start = time.perf_counter()
        found = train_step(learner, batch, step)
        timing.synchronize(results.device)
        line = {f"jest/{part}_time": seconds for part, seconds in found.seconds.items()}
        lines.append(line | {"train/batch_time": time.perf_counter() - start})
        if step == 0 and compiled:
            results.row(f"first step of {what}", seconds=time.perf_counter() - began)
    if compiled:
        results.row(f"recompilations in the measured steps of {what}", graphs=_graphs() - graphs)
    if results.cuda:
        lines[-1]["peak"] = torch.cuda.max_memory_allocated()
    return lines


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _report(
    results: Results,
    what: str,
    name: str,
    runs: dict[str, Run],
    measured: dict[str, list[dict[str, float]]],
    rate: float,
) -> None:
    def seconds(of: str) -> float:
        return statistics.median(line["train/batch_time"] for line in measured[of][WARM_UP:])

    run, cost, taken = runs[name], flops.step_flops(runs[name]), seconds(name)
    uniform = flops.step_flops(runs["uniform"]).total
    last = measured[name][-1]
    values: dict[str, Any] = {"milliseconds": 1e3 * taken, "share_of_the_rate_of_products": cost.total / taken / rate}
    if results.cuda and torch.cuda.get_device_capability() == (9, 0):
        values["mfu"] = cost.total / taken / HOPPER
    parts = {k.removeprefix("jest/").removesuffix("_time"): v for k, v in last.items() if k.startswith("jest/")}
    values |= {f"{part}_ms": 1e3 * s for part, s in parts.items()}
    if "uniform" in measured:
        values |= {
            "flops_of_a_uniform_step": cost.total / uniform,
            "time_of_a_uniform_step": taken / seconds("uniform"),
        }
    if goal := GOALS.get(name):
        limit = goal * (cost.total / uniform if name == "JEST" else 1.0)
        values |= {"goal": f"{limit:.3g} of a uniform step's time", "met": taken / seconds("uniform") <= limit}
    if "peak" in last:
        values["peak_gb"] = last["peak"] / 1e9
    values["planned_gb_without_activations"] = (sizes.state_bytes(run) + sizes.embedding_bytes(run)) / 1e9
    if name == "FlexiJEST" and "JEST" in measured:
        machine = calibrate.of_lines(runs["JEST"], cast(list[MetricsLine], measured["JEST"]), 0.0)
        values["planned_milliseconds_by_jest"] = 1e3 * sum(calibrate.predict(run, machine).step_seconds.values())
    results.row(what, **values)
