"""Training: jest's loop compared with open_clip's, a JEST step's time beside scoring and training, and `jest plan`.

python -m tests.benchmarks.bench_training [--repeats 3] [--steps 40] [--parts loop,plan,learners]

loop: IID training of the same model from the same weights, with the same batches in memory. open_clip's loop is
`train_one_epoch` of its package; jest's is the whole loop of the train stage with log, metrics and checkpoints, in one
process as `jest reproduce` runs it.
plan: the demonstration's joint run as `jest train` runs it, the parts of its steps' time, and the prediction of
`jest plan`, calibrated in turns with it. learners: that run on one learner and on two.
Each turn of each contestant runs in a separate process.
"""

import argparse
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import typer

from jest_core import run_file
from jest_core.examples.preprocess import normalise
from jest_core.examples.super_batch import Examples
from jest_core.models import towers
from jest_core.run_file import Run
from pipelines.base import cluster
from pipelines.data import catalogue
from pipelines.paper.drawings.place import place
from pipelines.planning import calibrate as machines
from pipelines.training import bottleneck, metrics_line, selection_log, train
from tests.benchmarks.bench_flexi import examples
from tests.benchmarks.measure import console, machine, resident_bytes, table, threads

JOINT = files("jest_deploy") / "runs" / "demo-small" / "joint.yaml"
_WARM_UP = 3
_CHECKPOINTS = 20  # steps between two checkpoints


def loop_run(root: str, model: str, b: int, n_steps: int) -> Run:
    """A uniform run of so many steps over the small tier, of which only the catalogue is read."""
    return run_file.load(
        JOINT.read_text(),
        [
            f"root={root}",
            "run_dir=loop",
            f"model.name={model}",
            "reference=null",
            "selection.method=uniform",
            "evaluation=null",
            f"training.sub_batch_size={b}",
            f"training.examples_trained={n_steps * b}",
            "training.augmentation={}",
            f"training.checkpoint_every_steps={_CHECKPOINTS}",
        ],
    )


def of_jest(root: str, model: str, b: int, n_steps: int) -> list[float]:
    """Seconds of each step of the train stage in this process, whose stream is replaced by batches in memory."""
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        run = loop_run(root, model, b, n_steps).model_copy(update={"run_dir": f"{scratch}/loop"})
        batch = examples(b, towers.create(model, seed=0))

        def stream(*_: Any, first_step: int, **__: Any) -> Iterator[Examples]:
            return iter([batch] * (n_steps - first_step))

        with mock.patch("pipelines.training.sub_batches.stream", stream):
            train.run_stage(run, in_process=True)
        lines = metrics_line.read(f"{scratch}/loop")
    return [line["train/batch_time"] + line["jest/checkpoint_time"] for line in lines]


def of_open_clip(root: str, model: str, b: int, n_steps: int) -> list[float]:
    """Seconds of each step of open_clip's train_one_epoch over batches in memory."""
    import open_clip
    from open_clip.loss import SigLipLoss
    from open_clip_train.train import train_one_epoch

    threads()
    decoded = examples(b, pair := towers.create(model, seed=0))
    batch = normalise(decoded.pixels, pair.inputs.mean, pair.inputs.std), decoded.tokens
    network = open_clip.create_model(model, output_dict=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    settings = {"device": "cpu", "precision": "fp32", "distill": False, "accum_freq": 1, "skip_scheduler": True}
    settings |= {"horovod": False, "grad_clip_norm": 1.0, "rank": 0, "local_rank": 0, "world_size": 1, "batch_size": b}
    settings |= {"log_every_n_steps": 1, "wandb": False, "log_local": False}
    ends: list[float] = []

    class Batches:
        num_batches, num_samples = n_steps, n_steps * b

        def __iter__(self) -> Iterator[Any]:
            for _ in range(n_steps):
                ends.append(time.perf_counter())
                yield batch

    data = mock.Mock(dataloader=Batches())
    loss = SigLipLoss()
    train_one_epoch(network, {"train": data}, loss, 0, optimizer, None, None, None, argparse.Namespace(**settings))
    ends.append(time.perf_counter())
    return [after - before for before, after in pairwise(ends)]


def _with_peak(function: Callable[[], list[float]]) -> tuple[list[float], int]:
    result = function()
    return result, resident_bytes("VmHWM")


def in_separate_process(function: Callable[[], list[float]]) -> tuple[list[float], int]:
    """The result of function(), and the peak memory of its process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_peak, (function,))


def bench_loop(root: str, model: str, b: int, n_steps: int, repeats: int) -> None:
    catalogue.run_stage(loop_run(root, model, b, n_steps))
    import ray

    ray.shutdown()
    contestants = {"open_clip's loop": of_open_clip, "jest": of_jest}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    peak = dict.fromkeys(contestants, 0)
    for _ in range(repeats):
        for name, function in contestants.items():
            times, peak_of_turn = in_separate_process(partial(function, root, model, b, n_steps))
            seconds[name].append(median(times[_WARM_UP:]))
            peak[name] = max(peak[name], peak_of_turn)
    base = median(seconds["open_clip's loop"])
    rows = []
    for name in contestants:
        typical = median(seconds[name])
        spread = f"{min(seconds[name]):.4f} to {max(seconds[name]):.4f}"
        cells = [f"{typical:.4f}", spread, f"{b / typical:.0f}", f"{base / typical:.3f}", f"{peak[name] / 1e6:,.0f}"]
        rows.append([name, *cells])
    columns = ["IID training", "s a step", "of the turns", "examples/s", "rate of open_clip's", "peak MB"]
    table(f"{model}, b = {b}, float32, {n_steps} steps a turn, medians of {repeats} turns in turn", columns, rows)


def jest(*arguments: str) -> float:
    """Seconds of a command."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipelines", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def prepare(root: str) -> None:
    """Catalogue, a reference of a few steps, and its score cache."""
    place("small", root)
    few = ["--set", f"root={root}", "--set", "training.examples_trained=2560"]
    reference = str(JOINT.parent / "reference.yaml")  # type: ignore[attr-defined]
    for command, path in (("catalogue", reference), ("train", reference), ("catalogue", str(JOINT))):
        jest(command, path, *few)
    jest("reference-scores", str(JOINT), *few)


def bench_step(lines: list[dict[str, Any]]) -> None:
    shares = bottleneck.shares(lines[1:])
    beside = sum(share for part, share in shares.items() if part not in ("score", "reference", "train", "agreement"))
    parts = ", ".join(f"{part} {share:.1%}" for part, share in shares.items() if share >= 0.0005)
    console.print(f"a JEST step, B = 1,280, b = 256: {parts}; beside scoring and training: {beside:.1%}")


def bench_plan(root: str, repeats: int) -> None:
    """jest plan --calibrate and the run that it predicts, in turns."""
    predicted, measured, steps_predicted, steps_measured = [], [], [], []
    for turn in range(repeats):
        name, file = f"joint-{turn}", f"{root}/machine-{turn}.json"
        common = [str(JOINT), "--set", f"root={root}", "--set", f"run_dir={name}", "--set", "evaluation=null"]
        jest("plan", *common, "--calibrate", file)
        measured.append(jest("train", *common))
        run = run_file.load(JOINT.read_text(), [f"root={root}", f"run_dir={name}"])
        expected = machines.predict(run, machines.read(file))
        predicted.append(expected.total)
        steps_predicted.append(expected.steps_seconds)
        steps_measured.append(json.loads(Path(root, name, "manifest.json").read_text())["seconds"])
        bench_step(metrics_line.read(f"{root}/{name}"))
    rows = []
    for name, expected_s, measured_s in (
        ("the command", predicted, measured),
        ("its steps", steps_predicted, steps_measured),
    ):
        turns = ", ".join(f"{e:.0f}/{f:.0f}" for e, f in zip(expected_s, measured_s, strict=True))
        e, f = median(expected_s), median(measured_s)
        rows.append([name, f"{e:.1f}", f"{f:.1f}", f"{e / f:.3f}", turns])
    title = f"jest plan --calibrate, and the demonstration's joint run: medians of {repeats}, in turns"
    table(title, ["seconds of", "predicted", "measured", "ratio", "turns"], rows)


def bench_learners(root: str, repeats: int) -> None:
    """The joint run on one learner and on two, which share the cores."""
    measured: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for turn in range(repeats):
        for n, parts in measured.items():
            name = f"learners-{n}-{turn}"
            sizes = ["--set", f"training.n_learners={n}", "--set", "training.examples_trained=10240"]
            jest("train", str(JOINT), "--set", f"root={root}", "--set", f"run_dir={name}", *sizes)
            lines = metrics_line.read(f"{root}/{name}")[_WARM_UP:]
            parts.append(
                {
                    part: median(line.get(f"jest/{part}_time", math.nan) for line in lines)
                    for part in ("wait", "score", "select", "log", "exchange", "train")
                }
                | {"step": median(line["train/batch_time"] for line in lines)}
            )
    rows = []
    for part in measured[1][0]:
        one, two = (median(turn[part] for turn in measured[n]) for n in (1, 2))
        rows.append([part, f"{one:.4f}", f"{two:.4f}", f"{two / one:.2f}"])
    title = f"one learner, and two on the same {cluster.n_cores()} cores: seconds, medians of {repeats}, in turns"
    table(title, ["", "one", "two", "two / one"], rows)
    drifts = {"one and two": drift(root, "learners-1-0", "learners-2-0")}
    if repeats > 1:
        drifts |= {f"{n} and {n} again": drift(root, f"learners-{n}-0", f"learners-{n}-1") for n in (1, 2)}
    steps = sorted({0, 1, 2, 5, 10, 20, len(drifts["one and two"]) - 1})
    rows = [[name, *(f"{shares[step]:.3f}" for step in steps)] for name, shares in drifts.items()]
    table("share of a step's sub-batch that two runs have in common", ["learners", *(f"step {s}" for s in steps)], rows)


def drift(root: str, one: str, other: str) -> list[float]:
    """By step: the share of the sub-batch that both runs selected."""

    def selected(name: str) -> dict[int, set[str]]:
        log = selection_log.read(f"{root}/{name}")
        rows = zip(*(log[column].to_pylist() for column in ("step", "uid", "selected")), strict=True)
        by_step: dict[int, set[str]] = {}
        for step, uid, chosen in rows:
            if chosen:
                by_step.setdefault(step, set()).add(uid)
        return by_step

    first, second = selected(one), selected(other)
    return [len(first[step] & second[step]) / len(first[step]) for step in sorted(first)]


def main(
    model: str = "jest-drawings",
    sub_batch_size: int = 256,
    steps: int = 40,
    repeats: int = 3,
    parts: str = "loop,plan,learners",
) -> None:
    """Print the tables."""
    console.print(machine("cpu"))
    with tempfile.TemporaryDirectory(prefix="jest-bench-") as root:
        place("small", root)
        if "loop" in parts:
            bench_loop(root, model, sub_batch_size, steps, repeats)
        if "plan" in parts or "learners" in parts:
            prepare(root)
        if "plan" in parts:
            bench_plan(root, repeats)
        if "learners" in parts:
            bench_learners(root, repeats)


if __name__ == "__main__":
    typer.run(main)
