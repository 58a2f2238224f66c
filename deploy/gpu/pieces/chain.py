"""The whole chain by the `jest` commands on the demonstration's data: catalogue, reference, scores, train, SIGKILL,
resume, evaluate, report; through Ray Data, and on a GPU through Ray Train with NCCL and one learner.

What a killed run must have in common with one that was not killed is tried with torch.use_deterministic_algorithms,
under which CUDA repeats a run bit for bit, and then without it, where only the difference is written down: cuDNN and
atomic additions then sum in another order each time. On CPUs the two are equal without it.
"""

import json
import os
from pathlib import Path

import pyarrow as pa
import torch

from deploy.gpu.pieces import commands
from deploy.gpu.results import Results
from jest_core.run_file import Run
from pipelines.base import checkpoints
from pipelines.training import metrics_line, selection_log
from tests.commands import Command

DETERMINISTIC = str(Path(__file__).resolve().parents[1] / "deterministic")


def run(results: Results) -> None:
    commands.prepare(results)
    if not results.cuda:
        results.skip("Ray Train with NCCL", "needs CUDA: on a CPU one learner trains in the command's process")
        with results.attempt("Ray Train with gloo"):
            workers = _run(results, "workers", "training.n_learners=2", "training.examples_trained=128")
            results.row("Ray Train with gloo, two learners", seconds=commands.finish(commands.words("train", workers)))
    exact = {}
    if results.cuda:
        path = f"{DETERMINISTIC}:{os.environ.get('PYTHONPATH', '')}"
        exact = {"PYTHONPATH": path, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    quiet, killed = (_run(results, name) for name in ("quiet", "killed"))
    seconds = commands.finish(commands.words("train", quiet), **exact)
    results.row(f"jest train, {quiet.n_steps} steps", seconds=seconds)
    _kill_and_resume(results, killed, exact)
    _compare(results, "killed and resumed, against a run that was not", quiet, killed, must_be_equal=True)
    with results.attempt("evaluate and report"):
        _evaluate(results, quiet, killed)
    if results.cuda and results.has_seconds("two runs without use_deterministic_algorithms", 40):
        runs = [_run(results, name) for name in ("once", "again")]
        for each in runs:
            commands.finish(commands.words("train", each))
        _compare(results, "two runs without use_deterministic_algorithms", *runs, must_be_equal=False)


def _run(results: Results, name: str, *overrides: str) -> Run:
    n_steps = 24 if results.small else 60
    b = 64 if results.small else 256
    return commands.load(
        results,
        "joint",
        f"run_dir={name}",
        f"training.examples_trained={n_steps * b}",
        "training.checkpoint_every_steps=4",
        "training.keep_last_checkpoints=3",
        *overrides,
    )


def _kill_and_resume(results: Results, run: Run, environment: dict[str, str]) -> None:
    """SIGKILL to the command and all that it started, as when a machine goes; then the same command once more."""
    command = commands.words("train", run)
    log = results.scratch / "killed.log"
    driver = Command(log, *command, **environment)
    try:
        driver.wait_for_step(run, 4)
    finally:
        driver.kill()
        print(driver.output, flush=True)
    reached = checkpoints.steps(run.path(run.run_dir))[-1]
    seconds = commands.finish(command, **environment)
    results.check("SIGKILL, and the same command again", reached < run.n_steps, killed_after=reached, seconds=seconds)


def _compare(results: Results, what: str, run: Run, other: Run, *, must_be_equal: bool) -> None:
    """The selection log, row for row, and losses and weights, bit for bit."""
    where = [each.path(each.run_dir) for each in (run, other)]
    logs = [selection_log.read(path) for path in where]
    losses = [[line["train/loss"] for line in metrics_line.read(path)] for path in where]
    weights = [checkpoints.read(path)["state_dict"] for path in where]
    same_weights = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    same = logs[0].equals(logs[1]) and losses[0] == losses[1] and same_weights
    first = next((step for step, (a, b) in enumerate(zip(*losses, strict=True)) if a != b), None)
    values = {
        "equal_logs": logs[0].equals(logs[1]),
        "equal_weights": same_weights,
        "first_step_whose_loss_differs": "none" if first is None else first,
        "largest_difference_of_losses": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "same_examples_in_the_last_step": _in_common(*logs),
    }
    if must_be_equal:
        results.check(what, same, **values)
    else:
        results.row(what, **values)


def _in_common(*logs: pa.Table) -> float:
    """Share of the last step's sub-batch that both selected."""
    chosen = []
    for log in logs:
        table = log.to_pydict()
        last = max(table["step"])
        rows = zip(table["step"], table["uid"], table["selected"], strict=True)
        chosen.append({uid for step, uid, selected in rows if selected and step == last})
    return len(chosen[0] & chosen[1]) / len(chosen[0])


def _evaluate(results: Results, quiet: Run, killed: Run) -> None:
    seconds = commands.finish(commands.words("evaluate", killed))
    lines = Path(killed.path(killed.run_dir), "eval_results.jsonl").read_text().splitlines()
    results.row("jest evaluate", seconds=seconds, results=len([json.loads(line) for line in lines]))
    output = results.scratch / "report.html"
    command = commands.words("report", killed)
    report = [*command[:-1], *(each.path(each.run_dir) for each in (quiet, killed)), "--output", str(output)]
    seconds = commands.finish(report)
    results.check("jest report", output.stat().st_size > 10_000, seconds=seconds, page_bytes=output.stat().st_size)
