"""What a step offered, drew and refused, as rows of the selection log; the same on every learner."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from jest_core import noise, tables
from jest_core.collectives import Learners
from jest_core.examples.super_batch import Examples
from jest_core.run_file import Run
from jest_core.selection import algorithm
from jest_core.selection.algorithm import Selection
from jest_core.selection.learnability import Embeddings, matched_losses, matched_scores
from jest_core.tables import SlotStatus

_REFUSED = 0x726566  # context of the keyed noise: "ref"


@dataclass
class StepLog:
    """One step, in the columns of SELECTION, BAD_ROWS and STEPS of tables; the same on every learner."""

    picks: pa.Table
    bad_rows: pa.Table
    summary: dict[str, int | float]


def of_selection(
    run: Run,
    super_batch: Examples,
    chosen: Selection,
    scored: Embeddings | None,
    reference: Embeddings | None,
    step: int,
    learners: Learners,
) -> tuple[pa.Table, dict[str, int | float]]:
    """Rows of the selected in the order drawn, then of a keyed sample of the refused; and the step's summary."""
    uids, occurrences, offsets = super_batch.uids, super_batch.column("occurrence"), chosen.offsets.cpu()
    missing = torch.full((len(super_batch),), torch.nan, dtype=torch.float64)
    learner_loss = missing if scored is None else matched_losses(scored, run.selection.loss).cpu()
    reference_loss = missing if reference is None else matched_losses(reference, run.selection.loss).cpu()
    mine = chosen.local(learners.rank).cpu()
    refused_keys = noise.gumbel(uids, occurrences, run.seed, step, _REFUSED).masked_fill(~super_batch.valid, -torch.inf)
    refused_keys[mine] = -torch.inf
    n_valid = int(learners.sum(super_batch.valid.sum()))
    n_refused = min(run.training.n_refused_logged, n_valid - len(chosen.indices))
    refused = algorithm.draw_top(refused_keys, n_refused, uids, occurrences, offsets, learners)

    positions = torch.cat([chosen.indices.cpu(), refused])
    columns = _identity_columns(super_batch, positions, offsets, learners) | {
        "chunk": torch.cat([chosen.chunk.cpu(), torch.full((n_refused,), -1)]).numpy(),
        "learner_loss": learners.take(learner_loss, positions, offsets).numpy(),
        "reference_loss": learners.take(reference_loss, positions, offsets).numpy(),
        "draw_score": torch.cat(
            [chosen.draw_score.cpu(), learners.take(chosen.scores.cpu(), refused, offsets)]
        ).numpy(),
        "selected": np.arange(len(positions)) < len(chosen.indices),
    }
    own = matched_scores(scored, reference, run.selection.criterion, run.selection.loss).cpu()
    summary = _summary(step, super_batch, len(chosen.indices), learners)
    summary["super_batch_matched_score"] = float(learners.sum(own[super_batch.valid].sum())) / n_valid
    summary["sub_batch_matched_score"] = learners.take(own, chosen.indices.cpu(), offsets).mean().item()
    summary["sub_batch_score"] = chosen.sub_batch_score / len(chosen.indices)
    return _picks(step, columns), summary


def of_whole(super_batch: Examples, step: int, learners: Learners) -> tuple[pa.Table, dict[str, int | float]]:
    """Rows of all sound slots, which a uniform step trains on; and the step's summary."""
    counts = learners.counts(len(super_batch))
    offsets = torch.tensor([0, *np.cumsum(counts)])
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


def _identity_columns(
    super_batch: Examples, positions: Tensor, offsets: Tensor, learners: Learners
) -> dict[str, np.ndarray | list[str]]:
    names = ("uid_high", "uid_low", "occurrence", "shard", "row")
    held = torch.stack([super_batch.column(name) for name in names], 1)
    high, low, occurrence, shard, row = learners.take(held, positions, offsets).T.numpy()
    uid = tables.uid_to_hex(high.astype(np.uint64), low.astype(np.uint64))
    return {"position": positions.numpy(), "uid": uid, "occurrence": occurrence, "shard": shard, "row": row}


def _picks(step: int, columns: dict[str, np.ndarray | list[str]]) -> pa.Table:
    columns = columns | {"step": np.full(len(columns["uid"]), step)}
    return pa.table({f.name: pa.array(columns[f.name]).cast(f.type) for f in tables.SELECTION}, schema=tables.SELECTION)


def bad_rows(super_batch: Examples, step: int, learners: Learners) -> pa.Table:
    """Rows of the slots whose image did not decode."""
    counts = learners.counts(len(super_batch))
    status = learners.gather(super_batch.column("status").to(torch.uint8), counts)
    positions = torch.nonzero((status != SlotStatus.OK) & (status != SlotStatus.DUPLICATE))[:, 0]
    columns: dict[str, Any] = _identity_columns(super_batch, positions, torch.tensor([0, *np.cumsum(counts)]), learners)
    columns |= {
        "step": np.full(len(positions), step),
        "reason": tables.status_labels(status[positions].tolist()),
    }
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in tables.BAD_ROWS})


def _summary(step: int, super_batch: Examples, n_selected: int, learners: Learners) -> dict[str, int | float]:
    n_valid = int(learners.sum(super_batch.valid.sum()))
    n_slots = sum(learners.counts(len(super_batch)))
    n_duplicates = int(learners.sum((super_batch.column("status") == SlotStatus.DUPLICATE).sum()))
    missing: dict[str, int | float] = {f.name: float("nan") for f in tables.STEPS}
    return missing | {
        "step": step,
        "n_offered": n_valid,
        "n_selected": n_selected,
        "n_bad": n_slots - n_valid - n_duplicates,
        "n_duplicates": n_duplicates,
    }
