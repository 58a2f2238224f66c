"""A run's selection log -> each learner's share of its sub-batches, step by step: what `jest train --replay` trains on.

Nothing is scored. The log has the shard and the row of each selected example, so that neither the order nor a score
cache is needed: only the catalogue in which the shards have these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jest_core import run_file
from jest_core.examples.inputs import Inputs
from jest_core.run_file import Run

from ..base import storage
from ..data import local_cache
from ..data.catalogue import held_catalogue
from ..data.places import Place
from ..data.rows import decoded, encoded, parsed, tokenised
from ..stream.read_ahead import Share, read_ahead
from . import selection_log

if TYPE_CHECKING:
    from jest_core.examples.super_batch import Examples


@dataclass(frozen=True)
class Steps:
    """Consecutive steps of one part of a log, in which each step is a row group."""

    part: str
    row_groups: range


def refuse(run: Run) -> None:
    """Raises ValueError where the log's sub-batches have another size than the run's, or are fewer."""
    assert run.data.replay is not None
    directory = run.path(run.data.replay)
    logged = run_file.load(
        storage.read_bytes(f"{directory}/run.yaml").decode(), source=f"{directory}/run.yaml", saved=True
    )
    if logged.sub_batch_size != run.sub_batch_size:
        raise ValueError(
            f"data.replay {run.data.replay} selected {logged.sub_batch_size} a step, and training.sub_batch_size is "
            f"{run.sub_batch_size}: make them the same"
        )
    n_steps = sum(last + 1 - first for _, first, last in selection_log.parts(directory))
    if n_steps < run.n_steps:
        raise ValueError(
            f"data.replay {run.data.replay} has {n_steps} committed steps, and the run wants {run.n_steps}: set "
            f"training.examples_trained to at most {n_steps * run.sub_batch_size}"
        )


def stream(run: Run, image_size: int, *, rank: int, n_learners: int, first_step: int) -> Iterator[Examples]:
    """Learner `rank`'s share of the sub-batches of steps first_step, first_step + 1, ... to the end of the run."""
    from jest_core.models import (  # here: the tasks, whose functions are in this module, do without PyTorch
        configurations,
    )

    from ..stream import super_batches

    share, inputs = run.sub_batch_size // n_learners, configurations.inputs_of(run.model, run.data.decoder)

    def item(steps: Steps) -> dict[str, Any]:
        return {"steps": steps, "first": rank * share, "share": share}

    def n_rows(steps: Steps) -> int:
        return len(steps.row_groups) * share

    planned = _plan(run, first_step, max(1, run.data.window_rows // share))
    room = Share(rank, n_learners, run.data.read_cpus)
    settings = {"run_text": run_file.dump(run), "inputs": inputs}
    row_bytes, most_rows = super_batches.row_bytes(inputs), 4 * max(share, run.data.window_rows)
    for _, table in read_ahead(planned, item, n_rows, row_bytes, most_rows, _read, room, **settings):
        for start in range(0, len(table), share):
            yield super_batches.examples(table.slice(start, share), image_size, with_reference=False)


def _plan(run: Run, first_step: int, at_once: int) -> Iterator[Steps]:
    """At most `at_once` steps for each task, from first_step to the end of the run."""
    assert run.data.replay is not None
    directory = run.path(run.data.replay)
    for name, first, last in selection_log.parts(directory):
        wanted = range(max(first, first_step), min(last + 1, run.n_steps))
        for start in range(wanted.start, wanted.stop, at_once):
            groups = range(start - first, min(start + at_once, wanted.stop) - first)
            yield Steps(f"{directory}/selection/{name}", groups)


def _read(item: dict[str, Any], run_text: str, inputs: Inputs) -> pa.Table:
    """The rows of a few steps, decoded images and tokens. Those of a step are in the order of the shards, so that
    learners share few row groups."""
    run, steps, first, share = parsed(run_text), item["steps"], item["first"], item["share"]
    log = storage.open_parquet(steps.part)
    rows = pa.concat_tables(_selected(log.read_row_group(i), run, steps).slice(first, share) for i in steps.row_groups)
    catalogue = held_catalogue(run.path(run.data.catalogue))
    shards = rows["shard"].to_numpy()
    tables, order = [], []
    for number in np.unique(shards):
        at = np.flatnonzero(shards == number)
        for positions, table in _read_shard(run, catalogue.place(int(number)), rows.take(pa.array(at))):
            order.append(at[positions])
            tables.append(table)
    back = np.argsort(np.concatenate(order))
    return decoded(tokenised(pa.concat_tables(tables).take(pa.array(back)), inputs.tokenizer), inputs.view)


def _selected(rows: pa.Table, run: Run, steps: Steps) -> pa.Table:
    rows = rows.filter(rows["selected"])
    if len(rows) != run.sub_batch_size or len(pc.unique(rows["step"])) != 1:
        raise ValueError(
            f"{steps.part} has a row group with {len(rows)} selected examples of {len(pc.unique(rows['step']))} steps, "
            f"not {run.sub_batch_size} of one: another version of jest wrote it, or a uniform run with bad rows"
        )
    return rows.sort_by([("shard", "ascending"), ("row", "ascending"), ("occurrence", "ascending")])


@storage.retried
def _read_shard(run: Run, place: Place, rows: pa.Table) -> list[tuple[NDArray[np.int64], pa.Table]]:
    """Rows of one shard by row group: their positions among `rows`, and what they hold."""
    shard = place.open(run.data.columns, local_cache.of(run))
    ends = np.cumsum(shard.row_group_sizes)
    row = rows["row"].to_numpy().astype(np.int64)
    groups = np.searchsorted(ends, row, side="right")
    out = []
    for group in np.unique(groups):
        positions = np.flatnonzero(groups == group)
        in_group = row[positions] - (ends[group] - shard.row_group_sizes[group])
        uids, _ = place.aligned(shard, int(group))
        if [uids[i] for i in in_group] != rows["uid"].take(pa.array(positions)).to_pylist():
            raise ValueError(
                f"{place.path}, row group {group}: other uids than in the log of {run.data.replay}; replay with the "
                "catalogue that it was made with"
            )
        occurrences = rows["occurrence"].to_numpy()[positions]
        by_content = run.data.mask_duplicates == "image"
        out.append((positions, encoded(shard, place.number, int(group), in_group, uids, occurrences, by_content)))
    return out
