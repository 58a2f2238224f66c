"""Start-up: the time that a command takes before its work, and the time to a run's first step.

python -m tests.benchmarks.bench_start [--repeats 3] [--timeline]

Each command is compared, in turns, with a Python that only imports PyTorch. `first step` is the time from the start of
`jest train` to its first checkpoint, for the demonstration's joint run at smoke sizes with a checkpoint every step, on
one learner and on two. --timeline: when each process of those began, and how long its imports took.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from pipelines.base import checkpoints
from tests.benchmarks.measure import console, machine, table

JEST = [sys.executable, "-m", "pipelines"]
TRACE = Path(__file__).parent / "trace"


def prepare(root: Path) -> Path:
    """The demonstration at smoke sizes; returns its joint run's file."""
    subprocess.run([*JEST, "demo", "--smoke", "--root", str(root)], check=True, stdout=subprocess.DEVNULL)
    return root / "joint-seed0" / "run.yaml"


def duration(command: list[str]) -> float:
    """Seconds of a command."""
    began = time.perf_counter()
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def peak_mb(command: list[str]) -> float:
    """Peak memory of the command's process, without its children."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], capture_output=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def first_step(root: Path, run_file: Path, n_learners: int) -> tuple[float, float, list[str]]:
    """Seconds to the first checkpoint and to the end of a run of ten steps, and its timeline."""
    shutil.rmtree(root / "started", ignore_errors=True)
    trace = root / "trace.txt"
    trace.unlink(missing_ok=True)
    overrides = [
        "run_dir=started",
        f"root={root}",
        "training.checkpoint_every_steps=1",
        "training.examples_trained=640",
    ]
    sets = [word for each in [*overrides, f"training.n_learners={n_learners}"] for word in ("--set", each)]
    began = time.time()
    environment = os.environ | {"PYTHONPATH": str(TRACE), "JEST_TRACE": str(trace)}
    process = subprocess.Popen([*JEST, "train", str(run_file), *sets], env=environment, stdout=subprocess.DEVNULL)
    first = 0.0
    while process.poll() is None:
        if not first and checkpoints.steps(str(root / "started")):
            first = time.time() - began
        time.sleep(0.02)
    assert process.returncode == 0
    lines = [line.split(maxsplit=2) for line in trace.read_text().splitlines()]
    return first, time.time() - began, [f"{float(at) - began:7.2f}  {pid}  {what}" for at, pid, what in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeline", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_file = prepare(Path(folder))
        contestants = {
            "python, import torch": [sys.executable, "-c", "import torch"],
            "jest --help": [*JEST, "--help"],
            "jest train, no such file": [*JEST, "train", "nowhere.yaml"],
            "jest train, a wrong value": [*JEST, "train", str(run_file), "--set", "selection.n_chunks=5"],
            "jest train, no catalogue": [*JEST, "train", str(run_file), "--set", "data.catalogue=nowhere"],
            "jest plan": [*JEST, "plan", str(run_file)],
        }
        times = {name: [duration(command) for _ in range(options.repeats)] for name, command in contestants.items()}
        base = median(times["python, import torch"])
        console.print(machine("cpu"))
        rows = [
            [name, f"{median(times[name]):.2f}", f"{median(times[name]) / base:.2f}", f"{peak_mb(command):.0f}"]
            for name, command in contestants.items()
        ]
        table("Before the work", ["command", "seconds", "of import torch", "peak MB"], rows)
        rows, timelines = [], {}
        for n_learners in (1, 2):
            measured = [first_step(Path(folder), run_file, n_learners) for _ in range(options.repeats)]
            first, end = (median(values) for values in zip(*((a, b) for a, b, _ in measured), strict=True))
            rows.append([f"{n_learners} learner(s)", f"{first:.1f}", f"{first / base:.1f}", f"{end:.1f}"])
            timelines[n_learners] = measured[-1][2]
        table("jest train of ten steps", ["", "to the first step, s", "of import torch", "to the end, s"], rows)
        for n_learners, lines in timelines.items() if options.timeline else ():
            console.print(f"\n{n_learners} learner(s): seconds, process, what", *lines, sep="\n")


if __name__ == "__main__":
    main()
