"""What a step offered, selected and refused, as rows of the selection log; the same on every learner."""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from jest_core import noise, tables
from jest_core.collectives import Learners, offsets_of
from jest_core.examples.super_batch import Examples
from jest_core.noise import Purpose
from jest_core.run_file import Run
from jest_core.selection import Embeddings, Selection
from jest_core.selection.algorithm import Ties, draw_top
from jest_core.selection.learnability import matched_losses, matched_scores
from jest_core.tables import SlotStatus

Columns: TypeAlias = dict[str, NDArray[Any] | list[str]]  # by name, of equal lengths


class Summary(TypedDict):
    """A row of tables.STEPS; NaN for what does not apply."""

    step: int
    n_offered: int
    n_selected: int
    n_bad: int
    n_duplicates: int
    super_batch_matched_score: float
    sub_batch_matched_score: float
    sub_batch_score: float
    loss: float


@dataclass
class StepLog:
    """One step, in the columns of SELECTION, BAD_ROWS and STEPS of tables; the same on every learner."""

    picks: pa.Table
    bad_rows: pa.Table
    summary: Summary


def of_selection(
    run: Run,
    super_batch: Examples,
    chosen: Selection,
    scored: Embeddings | None,
    reference: Embeddings | None,
    step: int,
    learners: Learners,
) -> tuple[pa.Table, Summary]:
    """Rows of the selected examples in the order drawn, then of a random sample of the refused; the step's summary."""
    uids, occurrences, offsets = super_batch.uids, super_batch.column("occurrence"), chosen.offsets.cpu()
    missing = torch.full((len(super_batch),), torch.nan, dtype=torch.float64)
    learner_loss = missing if scored is None else matched_losses(scored, run.selection.loss).cpu()
    reference_loss = missing if reference is None else matched_losses(reference, run.selection.loss).cpu()
    mine = chosen.local(learners.rank).cpu()
    refused_keys = noise.gumbel(uids, occurrences, run.seed, step, Purpose.REFUSED).masked_fill(
        ~super_batch.valid, -torch.inf
    )
    refused_keys[mine] = -torch.inf
    n_valid = int(learners.sum(super_batch.valid.sum()))
    n_refused = min(run.training.n_refused_logged, n_valid - len(chosen.indices))
    refused, _ = draw_top(refused_keys, n_refused, Ties.of(uids, occurrences), offsets, learners)

    positions = torch.cat([chosen.indices.cpu(), refused])
    matched = matched_scores(scored, reference, run.selection.criterion, run.selection.loss).cpu()
    shares = [learner_loss, reference_loss, chosen.scores.cpu(), matched]
    learner_losses, reference_losses, last_scores, matched_of_logged = learners.rows_at(shares, positions, offsets)
    columns = _identity_columns(super_batch, positions, offsets, learners) | {
        "chunk": torch.cat([chosen.chunk.cpu(), torch.full((n_refused,), -1)]).numpy(),
        "learner_loss": learner_losses.numpy(),
        "reference_loss": reference_losses.numpy(),
        "draw_score": torch.cat([chosen.draw_score.cpu(), last_scores[len(chosen.indices) :]]).numpy(),
        "selected": np.arange(len(positions)) < len(chosen.indices),
    }
    summary = _summary(step, super_batch, len(chosen.indices), learners)
    summary["super_batch_matched_score"] = float(learners.sum(matched[super_batch.valid].sum())) / n_valid
    summary["sub_batch_matched_score"] = matched_of_logged[: len(chosen.indices)].mean().item()
    summary["sub_batch_score"] = chosen.sub_batch_score / len(chosen.indices)
    return _picks(step, columns), summary


def of_whole(super_batch: Examples, step: int, learners: Learners) -> tuple[pa.Table, Summary]:
    """Rows of all valid slots, which a uniform step trains on; and the step's summary."""
    counts = learners.counts(len(super_batch))
    offsets = offsets_of(counts)
    valid = learners.gather(super_batch.valid.to(torch.uint8), counts)
    positions = torch.nonzero(valid)[:, 0]
    nothing = np.full(len(positions), np.nan)
    columns = _identity_columns(super_batch, positions, offsets, learners) | {
        "chunk": np.zeros(len(positions)),
        "learner_loss": nothing,
        "reference_loss": nothing,
        "draw_score": nothing,
        "selected": np.ones(len(positions), dtype=bool),
    }
    return _picks(step, columns), _summary(step, super_batch, len(positions), learners)


def _identity_columns(super_batch: Examples, positions: Tensor, offsets: Tensor, learners: Learners) -> Columns:
    names = ("uid_high", "uid_low", "occurrence", "shard", "row")
    local = torch.stack([super_batch.column(name) for name in names], 1)
    (rows,) = learners.rows_at([local], positions, offsets)
    high, low, occurrence, shard, row = rows.T.numpy()
    uid = tables.uid_to_hex(high.astype(np.uint64), low.astype(np.uint64))
    return {"position": positions.numpy(), "uid": uid, "occurrence": occurrence, "shard": shard, "row": row}


def _picks(step: int, columns: Columns) -> pa.Table:
    columns = columns | {"step": np.full(len(columns["uid"]), step)}
    return pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in tables.SELECTION}, schema=tables.SELECTION)


def bad_rows(super_batch: Examples, step: int, learners: Learners) -> pa.Table:
    """Rows of the slots whose image did not decode."""
    counts = learners.counts(len(super_batch))
    status = learners.gather(super_batch.column("status").to(torch.uint8), counts)
    positions = torch.nonzero((status != SlotStatus.OK) & (status != SlotStatus.DUPLICATE))[:, 0]
    columns = _identity_columns(super_batch, positions, offsets_of(counts), learners)
    columns |= {
        "step": np.full(len(positions), step),
        "reason": tables.status_labels(status[positions].tolist()),
    }
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in tables.BAD_ROWS})


def _summary(step: int, super_batch: Examples, n_selected: int, learners: Learners) -> Summary:
    n_valid = int(learners.sum(super_batch.valid.sum()))
    n_slots = sum(learners.counts(len(super_batch)))
    n_duplicates = int(learners.sum((super_batch.column("status") == SlotStatus.DUPLICATE).sum()))
    return Summary(
        step=step,
        n_offered=n_valid,
        n_selected=n_selected,
        n_bad=n_slots - n_valid - n_duplicates,
        n_duplicates=n_duplicates,
        super_batch_matched_score=math.nan,
        sub_batch_matched_score=math.nan,
        sub_batch_score=math.nan,
        loss=math.nan,
    )
