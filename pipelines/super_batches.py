"""Catalogue + score cache -> each learner's share of the super-batches, in the order of jest_core.order.

Ray Data executes the order, it does not define it: each learner runs one small dataset of windows after the other, read
and decoded by tasks anywhere on the cluster and delivered in sequence. The learner itself opens no shard.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from jest_core import config as run_files
from jest_core import tables
from jest_core.config import Run
from jest_core.examples import Examples
from jest_core.order import Order, Window
from jest_core.towers import Towers
from pipelines import blocks, catalogue, cluster, reference_scores, storage
from pipelines.shards import Shard, part_name

_WINDOWS_AHEAD = 2  # windows of each stream in one Ray dataset; at most two datasets are held
_DATA_CPUS = 2  # concurrent read tasks of one learner


@dataclass(frozen=True)
class Source:
    """What a run's super-batches are made of: the catalogue and, unless nothing is scored, the reference's cache."""

    order: Order
    bad_rows: dict[str, list[int]]
    shard_paths: list[str]
    scale_and_bias: tuple[float, float] | None


def open_source(run: Run) -> Source:
    """Read the manifests. Raises where a stage has not run, or the cache belongs to another catalogue."""
    listing = storage.finished(run.path(run.data.catalogue), "catalogue", "run `jest catalogue` first")
    bad: dict[str, list[int]] = {}
    scale_and_bias = None
    if run.uses_reference:
        assert run.reference is not None
        directory = run.path(run.reference.scores)
        scores = storage.finished(directory, "reference-scores", "run `jest reference-scores` first")
        if scores["config"]["catalogue"] != listing["fingerprint"]:
            raise ValueError(
                f"{directory} was scored for another catalogue than {run.data.catalogue}: run `jest "
                "reference-scores` into a new directory"
            )
        bad = reference_scores.bad_rows(scores)
        scale_and_bias = (scores["config"]["logit_scale"], scores["config"]["logit_bias"])
    return Source(
        catalogue.order(listing, run, bad), bad, [shard["path"] for shard in listing["shards"]], scale_and_bias
    )


def stream(
    run: Run, source: Source, towers: Towers, *, rank: int, n_learners: int, first_step: int
) -> Iterator[Examples]:
    """Learner `rank`'s share of super-batch first_step, first_step + 1, ... to the end of the run.

    The place in the stream is the number of the super-batch: super-batch k takes rows k m .. (k + 1) m of every
    canonical stream, m = B / n_streams. A learner holds B / n_learners consecutive slots.
    """
    m = run.super_batch_size // run.data.n_streams
    share = run.super_batch_size // n_learners
    low, high = rank * share, (rank + 1) * share
    mine = range(low // m, -(-high // m))  # streams whose slots this learner holds, in part or whole
    buffers: dict[int, deque[pa.Table]] = {s: deque() for s in mine}
    skip = dict.fromkeys(mine, first_step * m)  # rows of a stream that come before the first super-batch
    blocks_in = _windows(run, source, mine, first_step, m)
    for _ in range(first_step, run.n_steps):
        parts = []
        for s in mine:
            while sum(map(len, buffers[s])) < m:
                window, block = next(blocks_in)
                late = max(0, skip[window.stream] - window.first_row)
                buffers[window.stream].append(block.slice(late))
            parts.append(_pop(buffers[s], m))
        table = pa.concat_tables(parts).slice(low - mine.start * m, share)
        yield _examples(table, towers, run.uses_reference)


def _windows(run: Run, source: Source, streams: range, first_step: int, m: int) -> Iterator[tuple[Window, pa.Table]]:
    """Windows in the order in which super-batches first need them, each with its rows, through Ray Data."""
    first, last = first_step * m, run.n_steps * m

    def needed(s: int) -> Iterator[tuple[tuple[int, int], Window]]:
        for window in source.order.windows(s, first):
            if window.first_row >= last:
                return
            yield (max(window.first_row, first) // m, s), window

    planned = merge(*(needed(s) for s in streams), key=itemgetter(0))
    cluster.data_context(_DATA_CPUS)
    text = run_files.dump(run)

    def read(windows: list[Window]) -> list[Any]:
        """One Ray dataset: a few windows of each stream -> references to their blocks, in order."""
        items = [{"task": _ReadTask(window, source)} for window in windows]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _read_window,  # type: ignore[arg-type]
            batch_size=1,
            batch_format="numpy",
            fn_kwargs={"run_text": text},
        )
        return dataset.to_arrow_refs()

    def next_windows() -> list[Window]:
        return [window for _, window in islice(planned, _WINDOWS_AHEAD * len(streams))]

    # One dataset at a time, and the next while this one is consumed. A dataset over the whole run would leave its
    # bound to Ray Data's backpressure, whose scheduler then spins in the learner's process and takes its interpreter.
    with ThreadPoolExecutor(1, "read-windows") as reader:
        windows = next_windows()
        reading = reader.submit(read, windows)
        while windows:
            blocks_in = iter(reading.result())
            coming = next_windows()
            if coming:
                reading = reader.submit(read, coming)
            for window in windows:
                # Ray may split a window's block; order is preserved, so its parts follow each other
                parts: list[pa.Table] = []
                while sum(map(len, parts)) < len(window):
                    parts.append(ray.get(next(blocks_in)))
                yield window, pa.concat_tables(parts)
            windows = coming


class _ReadTask:
    """A window with what a worker needs to read it: the paths and the bad rows of its shards alone."""

    def __init__(self, window: Window, source: Source) -> None:
        self.window = window
        self.paths = {piece.shard: source.shard_paths[piece.shard] for piece in window.pieces}
        self.bad_rows = {shard: source.bad_rows.get(str(shard), []) for shard in self.paths}


def _read_window(batch: dict[str, np.ndarray], run_text: str) -> pa.Table:
    """One window -> its rows in stream order: encoded and decoded images, tokens, cached reference embeddings."""
    run, task = run_files.load(run_text), batch["task"][0]
    pieces = [
        _read_piece(run, piece, task.paths[piece.shard], task.bad_rows[piece.shard], task.window.epoch)
        for piece in task.window.pieces
    ]
    table = pa.concat_tables(pieces).take(pa.array(task.window.permutation()))
    inputs = learner_inputs(run)
    pixels, valid = inputs.view.batch(table["image"].to_pylist())
    tokens = inputs.tokens(table["caption"].to_pylist()).numpy()
    return (
        table.append_column("pixels", blocks.pack(pixels))
        .append_column("tokens", blocks.pack(tokens))
        .append_column("valid", pa.array(valid))
    )


def _read_piece(run: Run, piece: Any, path: str, bad_rows: list[int], epoch: int) -> pa.Table:
    shard = Shard(path)
    first_row = sum(shard.row_group_sizes[: piece.row_group])
    kept, uids = catalogue.kept_rows(run.path(run.data.catalogue), piece.shard, piece.row_group)
    kept = kept[~np.isin(kept + first_row, bad_rows)][piece.start : piece.stop]
    rows = pa.array(kept)
    if shard.uids(piece.row_group) != uids:
        raise ValueError(f"{path}, row group {piece.row_group}, changed since it was catalogued")
    captions = shard.captions(piece.row_group)
    high, low = tables.uid_from_hex([uids[i] for i in kept])
    columns: dict[str, Any] = {
        "uid_high": high,
        "uid_low": low,
        "occurrence": np.full(len(kept), epoch),
        "shard": np.full(len(kept), piece.shard),
        "row": kept + first_row,
        "image": shard.images(piece.row_group).take(rows),
        "caption": [captions[i] for i in kept],
    }
    table = pa.table(columns).cast(tables.EXAMPLE)
    if not run.uses_reference:
        return table
    assert run.reference is not None
    cache = storage.open_parquet(f"{run.path(run.reference.scores)}/parts/{part_name(piece.shard)}")
    cached = cache.read_row_group(piece.row_group, columns=["uid", "image_embedding", "text_embedding"]).take(rows)
    if cached["uid"].to_pylist() != [uids[i] for i in kept]:
        raise ValueError(
            f"the score cache does not line up with {path}, row group {piece.row_group}: score it again into a "
            "new directory"
        )
    return table.append_column("reference_image", cached["image_embedding"]).append_column(
        "reference_text", cached["text_embedding"]
    )


_inputs: dict[str, Towers] = {}


def learner_inputs(run: Run) -> Towers:
    """The learner's view and tokenizer, made once in each worker process."""
    from jest_core import towers

    if run.model.name not in _inputs:
        _inputs[run.model.name] = towers.create(run.model.name, seed=0)
    return _inputs[run.model.name]


def prepare(table: pa.Table, towers: Towers) -> Examples:
    """Decode and tokenise encoded rows that came from another learner."""
    pixels, valid = towers.view.batch(table["image"].to_pylist())
    tokens = towers.tokens(table["caption"].to_pylist())
    return Examples(table, torch.from_numpy(pixels), tokens, torch.from_numpy(valid))


def _examples(table: pa.Table, towers: Towers, with_reference: bool) -> Examples:
    size = towers.view.image_size
    image, text = (
        (torch.from_numpy(blocks.unpack(table[name]).copy()) if with_reference else None)
        for name in ("reference_image", "reference_text")
    )
    return Examples(
        table.select(tables.EXAMPLE.names),
        torch.from_numpy(blocks.unpack(table["pixels"]).reshape(-1, 3, size, size).copy()),
        torch.from_numpy(blocks.unpack(table["tokens"]).copy()),
        torch.from_numpy(table["valid"].to_numpy().copy()),
        image,
        text,
    )


def _pop(buffer: deque[pa.Table], n: int) -> pa.Table:
    """The first n rows of a buffer of blocks."""
    out = []
    while n:
        block = buffer.popleft()
        out.append(block.slice(0, n))
        if len(block) > n:
            buffer.appendleft(block.slice(n))
        n -= len(out[-1])
    return pa.concat_tables(out)


def prefetch(items: Iterator[Examples], depth: int = 1) -> Iterator[Examples]:
    """Draw from an iterator in a thread, `depth` items ahead: the next super-batch is put together during the step."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    done = object()

    def run() -> None:
        try:
            for item in items:
                ready.put(item)
            ready.put(done)
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=run, daemon=True, name="super-batches").start()
    while (item := ready.get()) is not done:
        if isinstance(item, BaseException):
            raise item
        yield item
