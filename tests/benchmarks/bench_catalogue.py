"""What the process that starts a stage does for a catalogue of many shards: CPU seconds and peak memory at two sizes.

python -m tests.benchmarks.bench_catalogue [--shards 200000]

The tables are synthetic, 10 row groups of 1,000 rows a shard; the functions are those that the commands call. 4 in the
last column is linear, as the larger size has four times the shards. What tasks of Ray do, a shard each, is not in it.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import typer

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import manifests, shard_paths, storage
from pipelines.data.catalogue import Catalogue, open_catalogue
from pipelines.data.catalogue_parts import Description
from pipelines.data.descriptions import Descriptions
from pipelines.offline import export
from pipelines.scores import reference_scores, score_cache
from tests.benchmarks.measure import console, machine, peak_bytes, table

GROUPS, ROWS, KEPT = 10, 1000, 600
N_STREAMS = 256

RUN = """
root: {root}
run_dir: run
seed: 0
data: {{shards: "shards/*.tar", catalogue: catalogue, rules: [], n_streams: 256, window_rows: 1024}}
model: {{name: ViT-B-32}}
selection: {{method: joint, criterion: hard, filter_ratio: 0.8, n_chunks: 16}}
training:
  sub_batch_size: 32768
  examples_trained: 1000013824
  learning_rate: 1.0e-3
  warmup_steps: 0
  weight_decay: 0.0
  checkpoint_every_steps: 1000
"""


def described(n: int) -> Iterator[tuple[int, Description]]:
    """What the parts of n shards say, as the tasks of `jest catalogue` send it."""
    for number in range(n):
        slots = [KEPT + (number + group) % 7 for group in range(GROUPS)]
        text = json.dumps(
            {
                "bytes": 200_000_000 + number,
                "rows": GROUPS * ROWS,
                "fingerprint": f"{number:064x}",
                "counts": {"kept": sum(slots), "unsafe": 100, "caption": GROUPS * ROWS - 100 - sum(slots)},
                "group_rows": [ROWS] * GROUPS,
                "group_slots": slots,
                "notes": {},
                "named": {},
            }
        )
        yield number, json.loads(text)


def make(folder: Path, n: int) -> None:
    """A finished catalogue of n shards, without its parts."""
    catalogue = str(folder / "catalogue")
    write_tables(n, catalogue)
    config = {"shards": ["shards/*.tar"], "n_shards": n, "shards_hash": "", "rules": [], "columns": {}, "refines": None}
    manifests.finish(
        catalogue,
        {
            "stage": "catalogue",
            "complete": True,
            "config": config,
            "counts": {"kept": n * GROUPS * KEPT},
            "index": f"{catalogue}/index",
            "shards_fingerprint": "",
            "rules": [],
            "lineage": [],
        },
    )


def write_tables(n: int, catalogue: str) -> None:
    """`jest catalogue`: all descriptions -> tables and fingerprint."""
    descriptions = Descriptions(n)
    for number, description in described(n):
        descriptions.add(number, description)
    paths = [f"s3://bucket/a-folder-of-shards/{number:06d}.tar" for number in range(n)]
    descriptions.write_tables(catalogue, paths, [0] * n)
    descriptions.counts()
    storage.fingerprint(descriptions.fingerprints)


def expand(folder: Path) -> None:
    """The paths of data.shards, and their hash."""
    paths = shard_paths.expand(["shards/*.tar"], str(folder))
    storage.fingerprint([paths, [0] * len(paths)])


def _opened(folder: Path) -> tuple[Run, Catalogue]:
    run = run_file.load(RUN.format(root=folder))
    return run, open_catalogue(run.path(run.data.catalogue))


def start(folder: Path, first_step: int = 0) -> None:
    """`jest train`: the order, and the first windows of every stream with the places of their shards."""
    run, catalogue = _opened(folder)
    order = catalogue.order(run)
    m = run.super_batch_size // run.data.n_streams
    for stream in range(order.n_streams):
        for window in islice(order.windows(stream, first_step * m), 4):
            [catalogue.place(piece.shard) for piece in window.pieces]


def plan_scores(folder: Path) -> None:
    """`jest reference-scores`: the shards without a part, and their row groups."""
    run, catalogue = _opened(folder)
    todo = score_cache.missing(run.path("scores"), catalogue)
    units = reference_scores._units(catalogue, todo)
    assert len(units.shard) == GROUPS * len(todo)


def rows_of_parts(folder: Path) -> None:
    """Parts of a score cache: the row group sizes of every shard."""
    _, catalogue = _opened(folder)
    for shard in range(len(catalogue.shards)):
        assert len(catalogue.row_group_sizes(shard)) == GROUPS


def report(folder: Path) -> None:
    """`jest report`: the row groups of 100,000 selected rows."""
    _, catalogue = _opened(folder)
    random = np.random.default_rng(0)
    shards, rows = random.integers(len(catalogue.shards), size=(100_000)), random.integers(GROUPS * ROWS, size=100_000)
    found = catalogue.by_row_group(list(zip(shards.tolist(), rows.tolist(), strict=True)))
    for number, _ in found:
        catalogue.place(number)


def export_scores(folder: Path) -> None:
    """`jest export --what scores`: which shards each file has."""
    _, catalogue = _opened(folder)
    groups = catalogue.row_groups
    export.plan(groups["shard"].to_numpy().astype(np.int64), groups["slots"].to_numpy(), 1_000_000)


def main(shards: int = 200_000) -> None:
    console.print(machine("cpu"))
    sizes = (shards // 4, shards)
    results: dict[str, list[tuple[float, float]]] = {}
    for n in sizes:
        folder = Path(tempfile.mkdtemp())
        make(folder, n)
        (folder / "shards").mkdir()
        for number in range(n):
            (folder / f"shards/{number:06d}.tar").touch()
        parts: dict[str, tuple[Callable[..., None], object]] = {
            "catalogue: paths of the shards": (expand, folder),
            "catalogue: tables of what parts say": (partial(write_tables, catalogue=str(folder / "again")), n),
            "score planning": (plan_scores, folder),
            "score parts: sizes of row groups": (rows_of_parts, folder),
            "train start": (start, folder),
            "resume in the fourth epoch": (partial(start, first_step=3 * KEPT * GROUPS * n // 163_840), folder),
            "report: 100,000 rows": (report, folder),
            "export of scores": (export_scores, folder),
        }
        for name, (function, argument) in parts.items():
            peak, _ = peak_bytes(function, partial(_same, argument))
            results.setdefault(name, []).append((min(_cpu_seconds(function, argument) for _ in range(3)), peak))
        shutil.rmtree(folder)
    rows = [
        [name, *(f"{s:.2f} s, {peak / 1e6:,.0f} MB" for s, peak in both), f"{both[1][0] / max(both[0][0], 1e-3):.1f}"]
        for name, both in results.items()
    ]
    table("What the driver does", ["", *(f"{n:,} shards" for n in sizes), "ratio of seconds"], rows)


def _cpu_seconds(function: Callable[..., None], argument: object) -> float:
    begun = time.process_time()
    function(argument)
    return time.process_time() - begun


def _same(value: object) -> object:
    return value


if __name__ == "__main__":
    typer.run(main)
