"""FLOPs and wall-clock of a FlexiJEST step and a JEST step, compared with a uniform one of the same sub-batch size.

python -m tests.benchmarks.bench_flexi [--device cuda --sub-batch-size 512 --precision bf16 --compile] [--repeats 3]

The model is the paper's (ViT-B/16 at 256 pixels, a text tower of the same size on 16 tokens: the image tower makes up
94 % of a forward pass). The time is that of a learner's whole step, with pictures already decoded and the reference
cached. Every contestant trains the same weights, in turns.
"""

from functools import partial

import numpy as np
import pyarrow as pa
import torch
import typer

from jest_core import flops, run_file, tables
from jest_core.examples.super_batch import Examples
from jest_core.models import configurations, towers
from jest_core.run_file import Run
from jest_core.training import optim
from jest_core.training.forward import TrainingPass
from jest_core.training.step import Learner, train_step
from tests.benchmarks.measure import console, machine, peak_bytes, seconds, table, threads
from tests.conftest import RUN

LOW = ["training.low_resolution={patch_size: 32}", "selection.score_patch_size=32"]
CONTESTANTS = {
    "uniform": ["selection.method=uniform"],
    "JEST": [],
    "FlexiJEST": LOW,
    "FlexiJEST, scoring in bf16": [*LOW, "selection.score_precision=bf16"],
}


def run_of(name: str, model: str, sub_batch_size: int, micro_batch: int, precision: str) -> Run:
    overrides = [
        f"model.name={model}",
        f"training.sub_batch_size={sub_batch_size}",
        f"training.examples_trained={sub_batch_size * 1000}",
        f"training.score_batch_size={micro_batch}",
        f"training.precision={precision}",
        f"selection.score_precision={precision}",
        "selection.filter_ratio=0.8",
        f"selection.n_chunks={16 if sub_batch_size % 16 == 0 else 4}",
        "training.n_refused_logged=0",
        *CONTESTANTS[name],
    ]
    return run_file.load(RUN.format(root=".", name="x", shards="x"), overrides)


def examples(n: int, pair: towers.Towers) -> Examples:
    """n random pictures and captions, with reference embeddings as wide as the learner's."""
    generator = torch.Generator().manual_seed(0)
    size, width = pair.view.image_size, configurations.width(pair.name)
    columns = {name: np.zeros(n) for name in tables.EXAMPLE.names} | {"uid_low": np.arange(n)}
    columns |= {"image": np.array([b""] * n, object), "caption": np.array([""] * n, object)}
    rows = pa.table({field.name: pa.array(columns[field.name]).cast(field.type) for field in tables.EXAMPLE})
    embeddings = torch.nn.functional.normalize(torch.randn(2, n, width, generator=generator), dim=-1)
    return Examples(
        rows,
        torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator),
        torch.randint(1, 40_000, (n, pair.inputs.tokenizer.context_length), generator=generator),
        *embeddings.half(),
    )


def learners(runs: dict[str, Run], model: str, device: str, compiled: bool) -> tuple[dict[str, Learner], Examples]:
    """One learner for each contestant, all with the same weights; and a super-batch."""
    threads()
    pair = towers.create(model, seed=0)
    pair.model.to(device)
    if compiled:
        pair.compile()
    settings = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 1e-4}
    optimizer = optim.adamw(pair.model, **settings)

    def no_exchange(rows: pa.Table) -> Examples:
        raise AssertionError("one learner exchanges nothing")

    by_name = {
        name: Learner(run, pair, (10.0, -10.0), no_exchange, optimizer=optimizer, wrapped=TrainingPass(pair, run))
        for name, run in runs.items()
    }
    return by_name, examples(max(run.super_batch_size for run in runs.values()), pair)


def step(learner: Learner, batch: Examples) -> None:
    train_step(learner, batch[torch.arange(learner.run.super_batch_size)], 0)


def _prepared(run: Run, model: str, device: str, compiled: bool) -> tuple[Learner, Examples]:
    (by_name, batch) = learners({"": run}, model, device, compiled)
    return by_name[""], batch


def _step(prepared: tuple[Learner, Examples]) -> None:
    step(*prepared)


def main(
    device: str = "cpu",
    model: str = "jest-b-16-256",
    sub_batch_size: int = 16,
    score_batch_size: int = 16,
    precision: str = "fp32",
    compiled: bool = typer.Option(False, "--compile"),
    repeats: int = 3,
) -> None:
    """Print the table."""
    runs = {name: run_of(name, model, sub_batch_size, score_batch_size, precision) for name in CONTESTANTS}
    if precision != "fp32":
        del runs["FlexiJEST, scoring in bf16"]
    by_name, batch = learners(runs, model, device, compiled)
    forward = flops.forward_flops(runs["uniform"].model)
    console.print(
        f"{machine(device)}; {model}, {forward.total / 1e9:.1f} GFLOPs a pair, {forward.image / forward.total:.0%} of "
        f"them the image tower's; b = {sub_batch_size}, f = 0.8, {precision}{', compiled' if compiled else ''}; "
        f"median of {repeats}"
    )
    times = seconds({name: partial(step, learner, batch) for name, learner in by_name.items()}, repeats, device)
    costs = {name: flops.step_flops(run).total for name, run in runs.items()}
    del by_name
    rows = []
    for name, run in runs.items():
        peak, _ = peak_bytes(_step, partial(_prepared, run, model, device, compiled), device)
        cost, time = costs[name] / costs["uniform"], times[name] / times["uniform"]
        rows.append(
            [name, f"{times[name]:.2f}", f"{cost:.3f}", f"{time:.3f}", f"{time / cost:.3f}", f"{peak / 1e6:,.0f}"]
        )
    columns = ["a step", "seconds", "FLOPs of a uniform one", "time of a uniform one", "time / FLOPs", "peak MB"]
    table("FlexiJEST", columns, rows)


if __name__ == "__main__":
    typer.run(main)
