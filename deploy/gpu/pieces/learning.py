"""Joint, independent and uniform selection on the demonstration's data at b = 2,048, as long as time is left."""

import json
from pathlib import Path

from deploy.gpu.pieces import commands
from deploy.gpu.results import Results
from pipelines.training import bottleneck, metrics_line


def run(results: Results) -> None:
    b, n_steps = (64, 4) if results.small else (2048, 20)
    if not results.has_seconds("joint, independent and uniform selection", 30):
        return
    commands.prepare(results)
    for method in ("joint", "independent", "uniform"):
        what = f"{method}, b = {b:,}, {n_steps} steps"
        if results.small and method != "joint":
            results.skip(what, "one method shows that it runs, and at this size none learns")
        elif results.has_seconds(what, 25):
            with results.attempt(what):
                _train(results, what, method, b, n_steps)


def _train(results: Results, what: str, method: str, b: int, n_steps: int) -> None:
    run = commands.load(
        results,
        method,
        f"run_dir={method}-{b}",
        f"training.sub_batch_size={b}",
        f"training.examples_trained={n_steps * b}",
        f"training.warmup_steps={n_steps // 6}",
        f"training.checkpoint_every_steps={n_steps}",
    )
    seconds = commands.finish(commands.words("stages train evaluate", run))
    directory = run.path(run.run_dir)
    lines = metrics_line.read(directory)
    shares = bottleneck.shares(lines[1:])
    found = map(json.loads, Path(directory, "eval_results.jsonl").read_text().splitlines())
    scores = {line["key"]: line["metrics"]["main_metric"] for line in found}
    values = {f"{part}_share": share for part, share in shares.items() if share >= 0.01}
    results.row(what, seconds=seconds, seconds_in_steps=lines[-1]["jest/seconds"], **values, **scores)
