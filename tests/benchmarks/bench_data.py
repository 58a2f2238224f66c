"""Examples delivered to a learner: jest's data plane against open_clip's pipeline and a plain PyTorch DataLoader.

python -m tests.benchmarks.bench_data [--n 20000] [--shards FOLDER] [--raw FOLDER]

All read the same tars: JPEGs of 512 pixels, quality 90, rendered from published SVG drawings (made once, and kept).
All end at the same output: normalised float pixels of 224 and 77 tokens a caption. Each contestant has a process tree
of its own, and its figures start with its first batch. First comes what it costs to plan an epoch of two billion rows.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import psutil
import torch
import typer
import webdataset
from PIL import Image

from jest_core import run_file
from jest_core.examples.order import Order
from jest_core.examples.preprocess import normalise
from jest_core.models import configurations
from pipelines.base import cluster
from pipelines.base.prefetch import prefetch
from pipelines.data import catalogue
from pipelines.paper.drawings import icons, names, packages, pictures, rows
from pipelines.paper.drawings.emoji import EmojiNames
from pipelines.stream import super_batches
from pipelines.stream.source import open_source
from tests.benchmarks.measure import console, machine, peak_bytes, table, threads

MODEL, SIZE, SCORED_SIZE = "ViT-B-32", 224, 112
PER_SHARD = 500
BATCH = 256
MEAN = STD = (0.5, 0.5, 0.5)
FOLDER = Path(gettempdir()) / "jest-bench-data"

RUN = """
root: {root}
run_dir: run
seed: 0
data: {{shards: "{shards}", catalogue: catalogue, rules: [], n_streams: 4, window_rows: 512, decode: {decode}}}
model: {{name: ViT-B-32}}
selection: {{method: {method}, criterion: hard, filter_ratio: 0.8, n_chunks: 16, score_image_size: {size}}}
training:
  sub_batch_size: 256
  examples_trained: {trained}
  learning_rate: 1.0e-3
  warmup_steps: 0
  weight_decay: 0.0
  checkpoint_every_steps: 1000
"""


# --------------------------------------------------------------------------------------------------------- the shards


def make_shards(folder: Path, raw: Path, n: int) -> None:
    """n // PER_SHARD tars of drawings with their captions, as webdataset writes them."""
    n_shards = n // PER_SHARD
    if len(list(folder.glob("*.tar"))) >= n_shards:
        return
    folder.mkdir(parents=True, exist_ok=True)
    versions = packages.fetch("medium", raw)
    icon_sets, emoji = icons.list_icon_sets(raw, "medium"), EmojiNames(raw / "emojibase-data/package")
    listed = [r for r in rows.list_rows("medium", raw, icon_sets, emoji, versions, 0) if r.prefix]
    listed.sort(key=lambda row: names.stable_hash(row.uid))
    # by icon set within a worker's part, which reads each set once
    spare = PER_SHARD + PER_SHARD // 10  # some drawings come out blank
    parts = [listed[i * spare : (i + 1) * spare] for i in range(n_shards)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for number, _ in enumerate(
            pool.map(_write_shard, [folder] * n_shards, [raw] * n_shards, range(n_shards), parts)
        ):
            console.print(f"rendered {(number + 1) * PER_SHARD:,} of {n:,}", end="\r")


def _write_shard(folder: Path, raw: Path, number: int, part: list[rows.Row]) -> None:
    path = folder / f"{number:05d}.tar"
    if path.exists():
        return
    written = 0
    with webdataset.TarWriter(str(path) + ".partial") as writer:
        for row in part:
            try:
                drawing, _, background = pictures.draw(row, "medium", raw, 512)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # resvg's panics
                continue
            sink = io.BytesIO()
            pictures.on_background(drawing, background, 512).save(sink, "JPEG", quality=90)
            key = f"{number:05d}{written:04d}"
            writer.write({"__key__": key, "jpg": sink.getvalue(), "txt": row.caption, "json": {"uid": row.uid}})
            written += 1
            if written == PER_SHARD:
                break
    Path(str(path) + ".partial").rename(path)


# ------------------------------------------------------------------------------------------------------ the contestants


def with_open_clip(shards: str, n: int, work: Path) -> Iterator[int]:
    """open_clip_train's own training pipeline, with its evaluation transform and two workers."""
    from open_clip.transform import image_transform
    from open_clip_train import data as open_clip_data

    # open_clip 3.3 asks for webdataset up to 0.2.86; later ones mark the end of a tar with an empty sample
    open_clip_data.tar_file_expander = partial(open_clip_data.tar_file_expander, eof_value=None)
    settings = SimpleNamespace(
        train_data=shards,
        train_num_samples=n,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=BATCH,
        workers=2,
        world_size=1,
        seed=0,
    )
    transform = image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
    data = open_clip_data.get_wds_dataset(settings, transform, True, tokenizer=open_clip.get_tokenizer(MODEL))
    for images, tokens in data.dataloader:
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert tokens.shape[1] == 77
        yield len(images)


class _Pairs(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random access to pairs that were unpacked from the tars."""

    def __init__(self, folder: Path) -> None:
        from open_clip.transform import image_transform

        self.images = sorted(folder.glob("*.jpg"))
        self.transform = image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
        self.tokenizer = open_clip.get_tokenizer(MODEL)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        caption = self.images[i].with_suffix(".txt").read_text()
        return self.transform(Image.open(self.images[i])), self.tokenizer(caption)[0]


def with_data_loader(shards: str, n: int, work: Path) -> Iterator[int]:
    """A map-style Dataset of unpacked files, shuffled, with two workers."""
    folder = work / "unpacked"
    folder.mkdir()
    for path in webdataset.shardlists.expand_urls(shards):
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
    loader = torch.utils.data.DataLoader(_Pairs(folder), BATCH, shuffle=True, num_workers=2)
    for images, _ in loader:
        yield len(images)


def _super_batches(shards: str, n: int, work: Path, method: str, decode: str) -> Iterator[Any]:
    cluster.connect()
    size = SCORED_SIZE if decode == "late" else "null"
    trained = n // 256 * 256 if method == "uniform" else n // 1280 * 256
    text = RUN.format(root=work, shards=shards, decode=decode, method=method, size=size, trained=trained)
    run = run_file.load(text)
    catalogue.run_stage(run)
    source = open_source(run)
    return prefetch(super_batches.stream(run, source, SIZE, rank=0, n_learners=1, first_step=0))


def with_jest(shards: str, n: int, work: Path) -> Iterator[int]:
    """Uniform super-batches of 256, decoded by Ray workers, normalised by the learner."""
    for batch in _super_batches(shards, n, work, "uniform", "eager"):
        assert normalise(batch.pixels, MEAN, STD).shape[1:] == (3, SIZE, SIZE)
        assert batch.tokens.shape[1] == 77
        yield len(batch)


def jest_eager(shards: str, n: int, work: Path) -> Iterator[int]:
    """f = 0.8: all 1,280 of a super-batch at 224 pixels; counts the 256 that are trained on."""
    for batch in _super_batches(shards, n, work, "joint", "eager"):
        selected = batch[torch.arange(0, len(batch), 5)]
        yield len(normalise(selected.pixels, MEAN, STD))


def jest_late(shards: str, n: int, work: Path) -> Iterator[int]:
    """f = 0.8: all at 112 pixels out of the reduced decoder, the selected again at 224 by the learner's threads."""
    pool = ThreadPoolExecutor(2)
    for batch in _super_batches(shards, n, work, "joint", "late"):
        assert batch.pixels.shape[-1] == SCORED_SIZE
        selected = super_batches.prepare(batch[torch.arange(0, len(batch), 5)].rows, configurations.inputs(MODEL), pool)
        yield len(normalise(selected.pixels, MEAN, STD))


CONTESTANTS: dict[str, Callable[[str, int, Path], Iterator[int]]] = {
    f.__name__: f for f in (with_open_clip, with_data_loader, with_jest, jest_eager, jest_late)
}


class _Watch(threading.Thread):
    """CPU seconds and memory of this process and all that it starts."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.cpu: dict[int, float] = {}
        self.peak = 0
        self.over = threading.Event()

    def look(self) -> float:
        """CPU seconds so far; those of processes that are gone count as last seen."""
        memory = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                times = process.cpu_times()
                self.cpu[process.pid] = times.user + times.system
                memory += process.memory_full_info().pss
            except psutil.Error:
                continue
        self.peak = max(self.peak, memory)
        return sum(self.cpu.values())

    def run(self) -> None:
        while not self.over.wait(2):  # looking costs, too
            self.look()


def contest(name: str, shards: str, n: int, work: Path) -> dict[str, float]:
    """One contestant, in this process."""
    threads()
    watch = _Watch()
    watch.start()
    batches = CONTESTANTS[name](shards, n, work)
    next(batches)  # processes are started, caches warm
    cpu, began = watch.look(), time.perf_counter()
    count = sum(batches)
    seconds, used = time.perf_counter() - began, watch.look() - cpu
    watch.over.set()
    return {"examples": count, "per_second": count / seconds, "cpu_ms": 1e3 * used / count, "peak": watch.peak}


def measured(name: str, shards: str, n: int, work: Path) -> dict[str, float]:
    """One contestant, in a process of its own."""
    folder = work / f"{name}-{n}"
    folder.mkdir()
    out = folder / "result.json"
    code = (
        "import json, sys; from pathlib import Path; from tests.benchmarks.bench_data import contest; "
        "name, shards, n, work, out = sys.argv[1:]; "
        "Path(out).write_text(json.dumps(contest(name, shards, int(n), Path(work))))"
    )
    command = [sys.executable, "-c", code, name, shards, str(n), str(folder), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stdout}\n{ran.stderr}")
    return dict(json.loads(out.read_text()))


# -------------------------------------------------------------------------------------------------------- two billion


def _order(n_rows: int) -> Order:
    """Shards of about 10,000 rows in row groups of about 1,000."""
    groups = np.arange(n_rows // 1000)
    kept = 1000 + groups % 7 - 3
    return Order(groups // 10, groups % 10, kept, seed=0, n_streams=64, window_rows=8192)


def _epoch(n_rows: int) -> int:
    """All windows of an epoch, one after the other."""
    order = _order(n_rows)
    return sum(
        sum(1 for _ in takewhile(lambda window: window.epoch == 0, order.windows(stream, 0)))
        for stream in range(order.n_streams)
    )


def _cursors(n_rows: int) -> None:
    """The place in the middle of the epoch, of all streams, as after a restart."""
    order = _order(n_rows)
    for stream in range(order.n_streams):
        next(order.windows(stream, order.stream_length(stream) // 2))


def plan(n_rows: int) -> None:
    """Print what an epoch's order costs; images and parts play no part in it."""
    begun = time.perf_counter()
    n_windows = _epoch(n_rows)
    seconds = time.perf_counter() - begun
    peak, _ = peak_bytes(_epoch, partial(int, n_rows))
    begun = time.perf_counter()
    _cursors(n_rows)
    cursor = time.perf_counter() - begun
    console.print(
        f"Planning {n_rows:,} rows in {n_rows // 10_000:,} shards: all {n_windows:,} windows of an epoch in "
        f"{seconds:.1f} s and {peak / 1e6:.0f} MB; from nothing to the middle of it, in all 64 streams, in "
        f"{cursor:.2f} s"
    )


def main(
    n: int = 20_000,
    shards: Path = FOLDER / "shards",
    raw: Path = FOLDER / "raw",
    planned_rows: int = 2_000_000_000,
) -> None:
    threads()
    console.print(machine("cpu"))
    plan(planned_rows)
    make_shards(shards, raw, n)
    n_shards = n // PER_SHARD
    paths = [shards / f"{i:05d}.tar" for i in range(n_shards)]
    size = sum(path.stat().st_size for path in paths) / n
    console.print(f"{n:,} JPEGs of 512 pixels, quality 90: {size:,.0f} bytes each with caption and headers")

    def among(count: int) -> str:
        return f"{shards}/{{00000..{count // PER_SHARD - 1:05d}}}.tar"

    work = shards.parent / f"work-{os.getpid()}"
    work.mkdir(parents=True)
    half = n // 2 // PER_SHARD * PER_SHARD
    full = {name: measured(name, among(n), n, work) for name in CONTESTANTS}
    at_half = measured("with_jest", among(half), half, work)
    base = full["with_open_clip"]
    table(
        "Delivered to one learner on this machine (224 pixels, 77 tokens)",
        ["", "examples/s", "of open_clip", "CPU ms an example", "peak MB"],
        [
            [
                name,
                f"{full[name]['per_second']:.0f}",
                f"{full[name]['per_second'] / base['per_second']:.2f}",
                f"{full[name]['cpu_ms']:.2f}",
                f"{full[name]['peak'] / 1e6:.0f}",
            ]
            for name in ("with_open_clip", "with_data_loader", "with_jest")
        ],
    )
    eager, late = full["jest_eager"], full["jest_late"]
    console.print(
        f"f = 0.8, CPU ms per trained example: eager {eager['cpu_ms']:.1f}, late {late['cpu_ms']:.1f} "
        f"({late['cpu_ms'] / eager['cpu_ms']:.2f} of it); trained examples/s {eager['per_second']:.0f} and "
        f"{late['per_second']:.0f}"
    )
    console.print(
        f"Peak memory of with_jest: {at_half['peak'] / 1e6:.0f} MB at {half:,} examples, "
        f"{full['with_jest']['peak'] / 1e6:.0f} MB at {n:,}"
    )


if __name__ == "__main__":
    typer.run(main)
