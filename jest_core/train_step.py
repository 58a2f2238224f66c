"""One step of a learner: score the super-batch, select, spread, update."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jest_core import noise, optim, selection, tables
from jest_core.choices import ForwardPrecision
from jest_core.collectives import Learners
from jest_core.config import Run
from jest_core.examples import Examples, Prepare, exchange, mask_duplicates
from jest_core.learnability import Embeddings, matched_losses
from jest_core.losses import sigmoid_loss, softmax_loss
from jest_core.preprocess import augment
from jest_core.selection import Selection
from jest_core.spreading import spread
from jest_core.towers import Towers

_REFUSED = 0x726566  # context of the keyed noise: "ref"


@dataclass
class Learner:
    """A learner's own state: what a step changes, and what it needs to run."""

    run: Run
    towers: Towers
    optimizer: torch.optim.Optimizer
    wrapped: nn.Module  # the towers' model, inside DistributedDataParallel where there are several learners
    reference_scale_and_bias: tuple[float, float] | None  # of the cached embeddings; None for uniform selection
    prepare: Prepare
    group: dist.ProcessGroup | None = None
    reference: Towers | None = None  # where it scores online, instead of from the cache
    prepare_reference: Prepare | None = None  # its view, where that is not the learner's

    @property
    def device(self) -> torch.device:
        return next(self.towers.model.parameters()).device


@dataclass
class StepResult:
    """What one step did, in the columns of SELECTION, BAD_ROWS and STEPS of tables; the same on every learner."""

    picks: pa.Table
    bad_rows: pa.Table
    summary: dict[str, int | float]
    optimisation: dict[str, float]  # loss, learning rate, gradient norm, logit_scale, logit_bias
    seconds: dict[str, float] = field(default_factory=dict)


def train_step(learner: Learner, super_batch: Examples, step: int) -> StepResult:
    """Score this learner's share of a super-batch, select globally, and update on the sub-batch (Algorithm 1).

    A super-batch of a `uniform` run is trained on as it is. Collective: all learners call it with the same step.
    """
    seconds: dict[str, float] = {}
    learners = Learners(learner.group)
    mask = learner.run.data.mask_duplicates
    if mask != "none":
        super_batch = mask_duplicates(super_batch, mask, learners)
    uids, occurrences = super_batch.uids, super_batch.column("occurrence")
    if learner.run.selection.method == "uniform":
        sub_batch = super_batch[torch.nonzero(super_batch.valid)[:, 0]]
        picks, summary = _uniform_log(super_batch, step, learners)
    else:
        with _timed(seconds, "score"):
            scored = learner.towers.embed(
                super_batch.pixels,
                super_batch.tokens,
                batch_size=learner.run.training.score_batch_size,
                image_size=learner.run.selection.image_size,
            )
        with _timed(seconds, "reference"):
            reference = _reference(learner, super_batch)
        with _timed(seconds, "select"):
            chosen = _select(learner, super_batch, scored, reference, uids, occurrences, step)
        with _timed(seconds, "log"):
            picks, summary = _selection_log(learner.run, super_batch, chosen, scored, reference, step, learners)
        with _timed(seconds, "exchange"):
            identities = learners.take(
                torch.cat([uids, occurrences[:, None]], 1), chosen.indices.cpu(), chosen.offsets.cpu()
            )
            moves = spread(
                chosen.indices.cpu(), identities[:, :2], identities[:, 2], chosen.offsets.cpu(), learners.rank
            )
            late = learner.run.data.decode == "late"
            sub_batch = exchange(super_batch, moves, learner.prepare, learners, decode_all=late)
    with _timed(seconds, "train"):
        optimisation = _update(learner, sub_batch, step)
    summary["loss"] = optimisation["loss"]
    return StepResult(picks, _bad_rows(super_batch, step, learners), summary, optimisation, seconds)


def _reference(learner: Learner, super_batch: Examples) -> Embeddings | None:
    """The reference's embeddings of the super-batch, cached or computed; none for the hard-learner criterion."""
    if learner.reference is not None:
        seen = super_batch if learner.prepare_reference is None else learner.prepare_reference(super_batch.rows)
        size, scale_and_bias = learner.run.training.score_batch_size, learner.reference_scale_and_bias
        assert scale_and_bias is not None
        found = learner.reference.embed(seen.pixels, seen.tokens, batch_size=size, precision=_precision(learner.run))
        return Embeddings(found.image, found.text, *scale_and_bias)
    if (
        super_batch.reference_image is None
        or super_batch.reference_text is None
        or learner.reference_scale_and_bias is None
    ):
        return None
    image, text = super_batch.reference_image.to(learner.device), super_batch.reference_text.to(learner.device)
    return Embeddings(image, text, *learner.reference_scale_and_bias)


def _precision(run: Run) -> ForwardPrecision:
    return "fp32" if run.reference is None else run.reference.precision


def _select(
    learner: Learner,
    super_batch: Examples,
    scored: Embeddings,
    reference: Embeddings | None,
    uids: Tensor,
    occurrences: Tensor,
    step: int,
) -> Selection:
    config, device = learner.run.selection, learner.device
    return selection.select(
        None if config.criterion == "easy" else scored,
        reference,
        sub_batch_size=learner.run.sub_batch_size,
        n_chunks=config.n_chunks,
        method="independent" if config.method == "independent" else "joint",
        criterion=config.criterion,
        loss=config.loss,
        draw=config.draw,
        gain=config.gain,
        uids=uids,
        occurrences=occurrences,
        seed=learner.run.seed,
        step=step,
        group=learner.group,
        valid=super_batch.valid.to(device),
        precision=config.precision,
    )


def _update(learner: Learner, sub_batch: Examples, step: int) -> dict[str, float]:
    """Forward, loss over all learners' shares, backward, AdamW."""
    config, device = learner.run.training, learner.device
    rate = optim.learning_rate(
        step,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        n_steps=learner.run.n_steps,
        schedule=config.schedule,
    )
    for parameters in learner.optimizer.param_groups:
        parameters["lr"] = rate
    pixels = augment(
        sub_batch.pixels.to(device),
        sub_batch.uids.to(device),
        sub_batch.column("occurrence").to(device),
        shift_pixels=config.augmentation.shift_pixels,
        colour=config.augmentation.colour,
        seed=learner.run.seed,
        step=step,
    )
    learner.wrapped.train()
    out = learner.wrapped(learner.towers.normalise(pixels), sub_batch.tokens.to(device))
    features = out["image_features"], out["text_features"], out["logit_scale"]
    if config.loss == "sigmoid":
        loss = sigmoid_loss(*features, out["logit_bias"], tile=config.loss_tile, group=learner.group)
    else:
        loss = softmax_loss(*features, tile=config.loss_tile, group=learner.group)
    learner.optimizer.zero_grad(set_to_none=True)
    n_learners = Learners(learner.group).size
    (loss * n_learners).backward()  # DistributedDataParallel averages the learners' gradients; their sum is wanted
    norm = nn.utils.clip_grad_norm_(learner.towers.model.parameters(), config.gradient_clip)
    learner.optimizer.step()
    scale, bias = learner.towers.scale_and_bias()
    return {
        "loss": loss.item(),
        "learning_rate": rate,
        "gradient_norm": norm.item(),
        "logit_scale": scale,
        "logit_bias": bias,
    }


def _selection_log(
    run: Run,
    super_batch: Examples,
    chosen: Selection,
    scored: Embeddings,
    reference: Embeddings | None,
    step: int,
    learners: Learners,
) -> tuple[pa.Table, dict[str, int | float]]:
    """Rows of the selected in the order drawn, then of a keyed sample of the refused; and the step's summary."""
    uids, occurrences, offsets = super_batch.uids, super_batch.column("occurrence"), chosen.offsets.cpu()
    missing = torch.full((len(super_batch),), torch.nan, dtype=torch.float64)
    learner_loss = matched_losses(scored, run.selection.loss).cpu()
    reference_loss = missing if reference is None else matched_losses(reference, run.selection.loss).cpu()
    mine = chosen.local(learners.rank).cpu()
    refused_keys = noise.gumbel(uids, occurrences, run.seed, step, _REFUSED).masked_fill(~super_batch.valid, -torch.inf)
    refused_keys[mine] = -torch.inf
    n_valid = int(learners.sum(super_batch.valid.sum()))
    n_refused = min(run.training.n_refused_logged, n_valid - len(chosen.indices))
    refused = selection.draw_top(refused_keys, n_refused, uids, occurrences, offsets, learners)

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
    own = {"learnability": learner_loss - reference_loss, "hard": learner_loss, "easy": -reference_loss}[
        run.selection.criterion
    ]
    summary = _summary(step, super_batch, len(chosen.indices), learners)
    summary["super_batch_matched_score"] = float(learners.sum(own[super_batch.valid].sum())) / n_valid
    summary["sub_batch_matched_score"] = learners.take(own, chosen.indices.cpu(), offsets).mean().item()
    summary["sub_batch_score"] = chosen.sub_batch_score / len(chosen.indices)
    return _picks(step, columns), summary


def _uniform_log(super_batch: Examples, step: int, learners: Learners) -> tuple[pa.Table, dict[str, int | float]]:
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


def _bad_rows(super_batch: Examples, step: int, learners: Learners) -> pa.Table:
    counts = learners.counts(len(super_batch))
    status = learners.gather(super_batch.column("status").to(torch.uint8), counts)
    positions = torch.nonzero((status != 0) & (status != tables.DUPLICATE))[:, 0]
    columns: dict[str, Any] = _identity_columns(super_batch, positions, torch.tensor([0, *np.cumsum(counts)]), learners)
    columns |= {
        "step": np.full(len(positions), step),
        "reason": [tables.SLOT_STATUS[i] for i in status[positions].tolist()],
    }
    return pa.table({f.name: pa.array(columns[f.name], f.type) for f in tables.BAD_ROWS})


def _summary(step: int, super_batch: Examples, n_selected: int, learners: Learners) -> dict[str, int | float]:
    n_valid = int(learners.sum(super_batch.valid.sum()))
    n_slots = sum(learners.counts(len(super_batch)))
    n_duplicates = int(learners.sum((super_batch.column("status") == tables.DUPLICATE).sum()))
    missing: dict[str, int | float] = {f.name: float("nan") for f in tables.STEPS}
    return missing | {
        "step": step,
        "n_offered": n_valid,
        "n_selected": n_selected,
        "n_bad": n_slots - n_valid - n_duplicates,
        "n_duplicates": n_duplicates,
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start
