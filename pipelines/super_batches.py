"""Catalogue + score cache -> each learner's share of the super-batches, in the order of jest_core.order.

Ray Data executes the order, it does not define it: each learner runs one small dataset of windows after the other, read
and decoded by tasks anywhere on the cluster and delivered in sequence. The learner itself opens no shard.
"""

import contextlib
import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from heapq import merge
from itertools import islice
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from numpy.typing import NDArray

from jest_core import config as run_files
from jest_core import tables, towers
from jest_core.config import Run
from jest_core.examples import Examples
from jest_core.order import Piece, Window
from jest_core.towers import Inputs
from pipelines import blocks, cluster, score_cache, storage
from pipelines.catalogue import Place
from pipelines.shards import Shard
from pipelines.source import Source

T = TypeVar("T")

_PATIENCE = 5.0  # seconds that what reads ahead gets to end
_WINDOWS_AHEAD = 2  # windows of each stream in one Ray dataset; at most two datasets are held


def stream(
    run: Run, source: Source, image_size: int, *, rank: int, n_learners: int, first_step: int
) -> Iterator[Examples]:
    """Learner `rank`'s share of super-batch first_step, first_step + 1, ... to the end of the run.

    The place in the stream is the number of the super-batch: super-batch k takes rows k m .. (k + 1) m of every
    canonical stream, m = B / n_streams. A learner holds B / n_learners consecutive slots. image_size: of the model; in
    `late` mode pixels have selection.score_image_size instead.
    """
    m = run.super_batch_size // run.data.n_streams
    share = run.super_batch_size // n_learners
    low, high = rank * share, (rank + 1) * share
    mine = range(low // m, -(-high // m))  # streams whose slots this learner holds, in part or whole
    buffers: dict[int, deque[pa.Table]] = {s: deque() for s in mine}
    skip = dict.fromkeys(mine, first_step * m)  # rows of a stream that come before the first super-batch
    blocks_in = _windows(run, source, mine, first_step, m, n_learners)
    if run.data.decode == "late":
        image_size = run.selection.score_image_size or image_size
    for _ in range(first_step, run.n_steps):
        parts = []
        for s in mine:
            while sum(map(len, buffers[s])) < m:
                window, block = next(blocks_in)
                late = max(0, skip[window.stream] - window.first_row)
                buffers[window.stream].append(block.slice(late))
            parts.append(_pop(buffers[s], m))
        table = pa.concat_tables(parts).slice(low - mine.start * m, share)
        yield examples(table, image_size, run.reads_scores)


def _windows(
    run: Run, source: Source, streams: range, first_step: int, m: int, n_learners: int
) -> Iterator[tuple[Window, pa.Table]]:
    """Windows in the order in which super-batches first need them, each with its rows, through Ray Data."""
    first, last = first_step * m, run.n_steps * m

    def needed(s: int) -> Iterator[tuple[tuple[int, int], Window]]:
        for window in source.order.windows(s, first):
            if window.first_row >= last:
                return
            yield (max(window.first_row, first) // m, s), window

    planned = (window for _, window in merge(*(needed(s) for s in streams), key=itemgetter(0)))

    def item(window: Window) -> dict[str, Any]:
        return {"window": window, "places": {p.shard: source.catalogue.place(p.shard) for p in window.pieces}}

    n_ahead, n_cpus = _WINDOWS_AHEAD * len(streams), cluster.data_cpus(n_learners)
    return read_ahead(planned, item, len, _read_window, n_ahead, n_cpus, run_text=run_files.dump(run))


def read_ahead(
    planned: Iterator[T],
    item: Callable[[T], dict[str, Any]],
    size: Callable[[T], int],
    read: Callable[..., pa.Table],
    n_ahead: int,
    n_cpus: int,
    **settings: Any,
) -> Iterator[tuple[T, pa.Table]]:
    """What is planned, each with its rows, in order, read by tasks of Ray Data anywhere on the cluster.

    item: what a task is told of one; size: its number of rows; n_ahead: so many in one Ray dataset; n_cpus: so
    many tasks at once.
    """
    cluster.data_context(n_cpus)

    def start(some: list[T]) -> list[Any]:
        """One Ray dataset -> references to its blocks, in order."""
        dataset = ray.data.from_items([item(one) for one in some], override_num_blocks=len(some)).map_batches(
            read,
            batch_size=1,
            batch_format="numpy",
            fn_kwargs=settings,
        )
        return dataset.to_arrow_refs()

    # One dataset at a time, and the next while this one is consumed. A dataset over the whole run would leave its
    # bound to Ray Data's backpressure, whose scheduler then spins in the learner's process and takes its interpreter.
    with ThreadPoolExecutor(1, "read-ahead") as reader:
        some = list(islice(planned, n_ahead))
        reading = reader.submit(start, some)
        while some:
            blocks_in = iter(reading.result())
            coming = list(islice(planned, n_ahead))
            if coming:
                reading = reader.submit(start, coming)
            for one in some:
                # Ray may split a task's block; order is preserved, so its parts follow each other
                parts: list[pa.Table] = []
                while sum(map(len, parts)) < size(one):
                    parts.append(ray.get(next(blocks_in)))
                yield one, pa.concat_tables(parts)
            some = coming


def _read_window(batch: dict[str, np.ndarray], run_text: str) -> pa.Table:
    """One window -> its slots in stream order: encoded and decoded images, tokens, cached reference embeddings."""
    run, window, places = run_files.load(run_text), batch["window"][0], batch["places"][0]
    pieces = [_read_piece(run, piece, places[piece.shard], window.epoch) for piece in window.pieces]
    table = pa.concat_tables(pieces).take(pa.array(window.permutation()))
    return decoded(run, table)


def decoded(run: Run, table: pa.Table) -> pa.Table:
    """Encoded rows with status, pixels and tokens."""
    inputs = towers.inputs_of(run.model)
    view = inputs.view
    if run.data.decode == "late":
        assert run.selection.score_image_size is not None
        view = view.smaller(run.selection.score_image_size)
    pixels, status = view.batch(table["image"].to_pylist())
    tokens = inputs.tokens(table["caption"].to_pylist()).numpy()
    return (
        table.append_column(tables.EXAMPLE.field("status"), pa.array(status))
        .append_column("pixels", blocks.pack(pixels))
        .append_column("tokens", blocks.pack(tokens))
    )


@storage.retried
def _read_piece(run: Run, piece: Piece, place: Place, epoch: int) -> pa.Table:
    """The slots of a piece, laid end to end."""
    shard = place.open(run.data.columns)
    uids, multiplicity = place.aligned(shard, piece.row_group)
    cached = None
    if run.reads_scores:
        assert run.reference is not None
        columns = ["status", "image_embedding", "text_embedding"]
        cached = score_cache.read(run.path(run.reference.scores), place, piece.row_group, uids, columns)
        multiplicity = np.where(pc.equal(cached["status"], "ok").to_numpy(), multiplicity, 0)
    try:
        rows, occurrences = piece.rows(multiplicity, epoch)
    except ValueError as error:
        raise ValueError(
            f"{place.path}, row group {piece.row_group}: {error}; was a catalogue or cache written anew?"
        ) from error
    table = encoded(shard, piece.shard, piece.row_group, rows, uids, occurrences)
    if cached is None:
        return table
    cached = cached.take(pa.array(rows))
    return table.append_column("reference_image", cached["image_embedding"]).append_column(
        "reference_text", cached["text_embedding"]
    )


def encoded(
    shard: Shard,
    number: int,
    row_group: int,
    rows: NDArray[np.int64],
    uids: Sequence[str],
    occurrences: NDArray[np.int64],
) -> pa.Table:
    """Some rows of a row group of shard `number`, in the columns of tables.EXAMPLE but status.

    uids: of the whole row group.
    """
    captions, images = shard.captions(row_group), shard.images(row_group)
    high, low = tables.uid_from_hex([uids[i] for i in rows])
    picked = images.take(pa.array(rows))
    values: dict[str, Any] = {
        "uid_high": high,
        "uid_low": low,
        "occurrence": occurrences,
        "shard": np.full(len(rows), number),
        "row": rows + sum(shard.row_group_sizes[:row_group]),
        "image": picked,
        "caption": [captions[i] for i in rows],
        "content": [_content(data) for data in picked.to_pylist()],
    }
    without_status = pa.schema([field for field in tables.EXAMPLE if field.name != "status"])
    return pa.table(values).cast(without_status)


def _content(image: bytes | None) -> int:
    """A 64-bit hash of an image's bytes, signed."""
    return int.from_bytes(hashlib.blake2b(image or b"", digest_size=8).digest(), "little", signed=True)


def prepare(table: pa.Table, inputs: Inputs, pool: Executor | None = None) -> Examples:
    """Decode and tokenise encoded rows: what came from another learner, and in `late` mode all that was selected."""
    pixels, _ = inputs.view.batch(table["image"].to_pylist(), pool)
    return Examples(table, torch.from_numpy(pixels), inputs.tokens(table["caption"].to_pylist()))


def examples(table: pa.Table, image_size: int, with_reference: bool) -> Examples:
    """What a learner holds of decoded rows."""
    image, text = (
        (torch.from_numpy(blocks.unpack(table[name]).copy()) if with_reference else None)
        for name in ("reference_image", "reference_text")
    )
    return Examples(
        table.select(tables.EXAMPLE.names),
        torch.from_numpy(blocks.unpack(table["pixels"]).reshape(-1, 3, image_size, image_size).copy()),
        torch.from_numpy(blocks.unpack(table["tokens"]).copy()),
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


def prefetch(items: Iterator[Examples], depth: int = 1) -> Generator[Examples, None, None]:
    """Draw from an iterator in a thread, `depth` items ahead: the next super-batch is put together during the step.

    Where it is closed the thread ends with the item that it is at, which is waited for some seconds.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    done, closed = object(), threading.Event()

    def run() -> None:
        try:
            for item in items:
                ready.put(item)
                if closed.is_set():
                    break
            ready.put(done)
        except BaseException as error:
            ready.put(error)
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=run, daemon=True, name="super-batches")
    thread.start()
    try:
        while (item := ready.get()) is not done:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        deadline = time.monotonic() + _PATIENCE
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            thread.join(0.05)
