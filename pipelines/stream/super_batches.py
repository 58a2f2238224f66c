"""Catalogue + score cache -> each learner's share of the super-batches, in the order of jest_core.examples.order.

Ray tasks anywhere on the cluster read and decode windows (windows) ahead of the learner, which gets them in order
(read_ahead). The learner itself opens no shard.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from heapq import merge
from operator import itemgetter

import numpy as np
import pyarrow as pa
import torch

from jest_core import run_file, tables
from jest_core.examples.inputs import Inputs
from jest_core.examples.order import Window
from jest_core.examples.super_batch import Examples
from jest_core.models import configurations
from jest_core.run_file import Run

from ..base import blocks
from . import windows
from .read_ahead import Share, read_ahead
from .source import Source, streams_of


def stream(
    run: Run, source: Source, image_size: int, *, rank: int, n_learners: int, first_step: int
) -> Iterator[Examples]:
    """Learner `rank`'s share of super-batch first_step, first_step + 1, ... to the end of the run.

    Super-batch k consists of rows k m .. (k + 1) m of every stream of the order, m = B / n_streams, so that its number
    alone says where a restart goes on. A learner's share is B / n_learners consecutive slots. image_size: of the model,
    in pixels; with data.decode `late` images have selection.score_image_size instead.
    """
    m, share = run.super_batch_size // run.data.n_streams, run.super_batch_size // n_learners
    low, mine = rank * share, streams_of(run, rank, n_learners)
    buffers: dict[int, deque[pa.Table]] = {s: deque() for s in mine}
    skip = dict.fromkeys(mine, first_step * m)  # rows of a stream that come before the first super-batch
    blocks_in = _windows(run, source, mine, first_step, m, Share(rank, n_learners, run.data.read_cpus))
    pin = bool(run.training.gpus_per_learner) and torch.cuda.is_available()
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
        yield examples(table, image_size, run.reads_scores, pin=pin)


def _windows(
    run: Run, source: Source, streams: range, first_step: int, m: int, share: Share
) -> Iterator[tuple[Window, pa.Table]]:
    """Windows in the order in which super-batches first need them, each with its rows."""
    first, last = first_step * m, run.n_steps * m

    def needed(s: int) -> Iterator[tuple[tuple[int, int], Window]]:
        for window in source.order.windows(s, first):
            if window.first_row >= last:
                return
            yield (max(window.first_row, first) // m, s), window

    planned = (window for _, window in merge(*(needed(s) for s in streams), key=itemgetter(0)))

    def item(window: Window) -> windows.Item:
        return windows.item_of(source.catalogue, window)

    inputs = inputs_of(run)
    # a window of each stream, as all are used up at about the same time, and two super-batches
    most_rows = max(len(streams) * run.data.window_rows, 2 * run.super_batch_size // share.n_learners)
    settings = {"run_text": run_file.dump(run), "inputs": inputs}
    return read_ahead(planned, item, len, row_bytes(inputs), most_rows, windows.of_window, share, **settings)


def inputs_of(run: Run) -> Inputs:
    """How the windows of a run are decoded and tokenised: with data.decode `late`, at the size at which is scored."""
    inputs = configurations.inputs_of(run.model, run.data.decoder)
    if run.data.decode == "eager":
        return inputs
    assert run.selection.score_image_size is not None
    return replace(inputs, view=inputs.view.smaller(run.selection.score_image_size))


def row_bytes(inputs: Inputs) -> int:
    """Of an example that is read, roughly: its picture, encoded and decoded, and its tokens."""
    return round(sum(windows.example_bytes(inputs.view.image_size, inputs.tokenizer.context_length).values()))


def prepare(table: pa.Table, inputs: Inputs, pool: Executor | None = None) -> Examples:
    """Decode and tokenise encoded rows: those from another learner, and with data.decode `late` all selected ones.

    table: columns of tables.EXAMPLE. pool: decodes images in its threads.
    """
    pixels, _ = inputs.view.batch(table["image"].to_pylist(), pool)
    tokens = inputs.tokenizer(table["caption"].to_pylist())
    return Examples(table, torch.from_numpy(pixels), torch.from_numpy(tokens))


def examples(table: pa.Table, image_size: int, with_reference: bool, *, pin: bool = False) -> Examples:
    """Decoded rows as tensors. with_reference: the rows have cached embeddings of the reference. pin: in page-locked
    memory, which a GPU reads by itself."""
    image, text = (
        (_tensor(table[name], torch.float16, pin=pin) if with_reference else None)
        for name in ("reference_image", "reference_text")
    )
    return Examples(
        table.select(tables.EXAMPLE.names),
        _tensor(table["pixels"], torch.uint8, pin=pin).view(-1, 3, image_size, image_size),
        _tensor(table["tokens"], torch.int64, pin=pin),
        image,
        text,
    )


def _tensor(column: pa.ChunkedArray, dtype: torch.dtype, *, pin: bool) -> torch.Tensor:
    """A column of k fixed-size lists -> (k, width), each byte copied once: from Ray's object store, whose memory goes
    back to it. PyTorch keeps page-locked memory for the next super-batch."""
    parts = [blocks.unpack(chunk) for chunk in column.chunks]
    out = torch.empty((len(column), parts[0].shape[1]), dtype=dtype, pin_memory=pin)
    np.concatenate(parts, out=out.numpy())
    return out


def _pop(buffer: deque[pa.Table], n: int) -> pa.Table:
    """Remove the first n rows from a buffer of blocks, and return them."""
    out = []
    while n:
        block = buffer.popleft()
        out.append(block.slice(0, n))
        if len(block) > n:
            buffer.appendleft(block.slice(n))
        n -= len(out[-1])
    return pa.concat_tables(out)
