"""What a machine sustains, measured on real steps of a run, and what other runs take on it: `jest plan --calibrate`."""

import math
import platform
import re
import statistics
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from jest_core import flops, run_file
from jest_core.run_file import Run

from ..base import cluster, progress, storage
from ..stream import read_costs
from ..stream.read_costs import ReadCosts
from ..training import metrics_line, train
from ..training.metrics_line import MetricsLine, part_seconds

_WARM_UP = 3  # steps that are not measured: the first starts the readers, and kernels are chosen in it
_MEASURED = 30  # at least
_PARTS = {  # seconds of metrics.jsonl -> the FLOPs that were made in them
    "score": ("score",),
    "reference": ("reference",),
    "select": ("select",),
    "train": ("train", "loss", "optimizer"),
}


class Machine(BaseModel):
    """Rates of one learner of such a machine; what moves between learners is not in them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: str  # that was measured; another is as fast a FLOP only where it is of its kind
    flops_per_second: dict[str, float]  # by part of a step; parts that the run did not have are left out
    seconds_per_example: float  # of its share of a super-batch: waiting for data, log, exchange, and what has no name
    first_step_seconds: float  # more than of another
    checkpoint_seconds: float  # of the loop
    start_seconds: float  # of the command, outside its steps
    wait_seconds_per_example: float = 0.0  # of seconds_per_example, that the learner waited for data
    reading: ReadCosts | None = None


@dataclass(frozen=True)
class Duration:
    """What a run takes on a machine. `select` is rather too long where there are many more learners than were measured
    with: the chunks of one learner's share are small, and small products slow."""

    step_seconds: dict[str, float]  # by part
    steps_seconds: float  # of all steps together, the first one's start included
    checkpoints_seconds: float
    start_seconds: float
    wait_seconds: float = 0.0  # of all steps, that learners would wait for data as the measured one did

    @property
    def total(self) -> float:
        """Seconds of the command."""
        return self.steps_seconds + self.checkpoints_seconds + self.start_seconds


def read(path: str) -> Machine:
    machine = Machine.model_validate_json(storage.read_bytes(path))
    if machine.reading is not None and machine.reading.decoder is None:
        progress.say("plan", f"{path} is of an earlier version, which does not say how it decoded: calibrate again")
    return machine


def measure_into(run: Run, path: str) -> Machine:
    """Measure, and write the rates to a file for `read`."""
    machine = measure(run)
    storage.write_bytes(path, machine.model_dump_json(indent=1).encode() + b"\n")
    return machine


def measure(run: Run) -> Machine:
    """Train some steps of one learner's share of the run, with its data, in a directory that is removed afterwards.

    Raises FileNotFoundError, with the remedy, where the run has no catalogue or no score cache yet: those of a few
    shards are enough; ValueError where one learner's share is no run by itself, or too short a one.
    """
    directory = run.path(f"calibration-{uuid.uuid4().hex}")  # where a learner on any machine writes to
    part = _share(run, directory)
    try:
        began = time.perf_counter()
        train.run_stage(part, label="calibrate")
        whole = time.perf_counter() - began
        lines = metrics_line.read(directory)
    finally:
        storage.remove_tree(directory)
    rates = of_lines(part, lines, whole)
    try:
        return rates.model_copy(update={"reading": read_costs.measure(run)})
    except Exception as error:  # minutes of training have given all else
        progress.warn("calibrate", f"the machine file is without what reading costs, which could not be read: {error}")
        return rates


def of_lines(run: Run, lines: Sequence[MetricsLine], whole_seconds: float) -> Machine:
    """The rates that a run's metrics show; whole_seconds: of its command."""
    step, warm = flops.step_flops(run), lines[_WARM_UP:]

    def mean(part: str) -> float:
        return statistics.fmean(part_seconds(line, part) for line in warm)

    import torch

    batch = statistics.fmean(line["train/batch_time"] for line in warm)
    done = {part: sum(getattr(step, name) for name in names) for part, names in _PARTS.items()}
    seconds = {part: mean(part) for part in _PARTS if done[part]}
    return Machine(
        name=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu()}, {cluster.n_cores()} cores",
        model=run.model.name,
        flops_per_second={part: done[part] / spent for part, spent in seconds.items() if spent},
        seconds_per_example=(batch - sum(seconds.values()) - mean("agreement")) / run.super_batch_size,
        first_step_seconds=max(0.0, sum(line["train/batch_time"] for line in lines[:_WARM_UP]) - _WARM_UP * batch),
        checkpoint_seconds=max(part_seconds(line, "checkpoint") for line in lines),
        start_seconds=whole_seconds
        - sum(line["train/batch_time"] + part_seconds(line, "checkpoint") for line in lines),
        wait_seconds_per_example=mean("wait") / run.super_batch_size,
    )


def predict(run: Run, machine: Machine) -> Duration:
    """Raises ValueError where the machine was measured on a run without a part that this one has."""
    step, n = flops.step_flops(run), run.training.max_learners
    seconds = {}
    for part, names in _PARTS.items():
        work = sum(getattr(step, name) for name in names) + (step.agreement if part == "score" else 0.0)
        if work and part not in machine.flops_per_second:
            raise ValueError(
                f"{machine.name} was calibrated with a run that has no {part}, and this run has: calibrate with it"
            )
        if work:
            shared = step.optimizer if part == "train" else 0.0  # which every learner does whole
            seconds[part] = ((work - shared) / n + shared) / machine.flops_per_second[part]
    seconds["wait, log, exchange"] = machine.seconds_per_example * run.super_batch_size / n
    every = run.training.checkpoint_every_steps
    return Duration(
        seconds,
        run.n_steps * sum(seconds.values()) + machine.first_step_seconds,
        math.ceil(run.n_steps / every) * machine.checkpoint_seconds,
        machine.start_seconds,
        run.n_steps * machine.wait_seconds_per_example * run.super_batch_size / n,
    )


def _share(run: Run, directory: str) -> Run:
    """What one learner has of a run, for as many steps as its readers need for two windows of each stream."""
    n = run.training.max_learners
    if run.n_steps <= _WARM_UP:
        raise ValueError(f"{run.n_steps} steps are too few to measure: calibrate with a run of {_WARM_UP + 1} or more")
    streams = max(1, run.data.n_streams // n)
    share = run.super_batch_size // n
    steps = min(run.n_steps, _WARM_UP + max(_MEASURED, math.ceil(2 * streams * run.data.window_rows / share)))
    changes = [
        f"run_dir={directory}",
        f"data.n_streams={streams}",
        "training.n_learners=1",
        f"training.sub_batch_size={run.sub_batch_size // n}",
        f"training.examples_trained={steps * (run.sub_batch_size // n)}",
        f"training.checkpoint_every_steps={max(1, steps // 2)}",
        "training.keep_last_checkpoints=null",
        "training.keep_checkpoint_every_steps=null",
        "training.checkpoint_every_minutes=null",
        "training.report_to=[]",
        "training.cooldown_steps=0",
        "evaluation=null",
    ]
    return run_file.load(run_file.dump(run), changes, "the share of one learner")


def cpu() -> str:
    """The processor's name, where the system has one."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux; elsewhere there is only the kind of processor
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.machine()
