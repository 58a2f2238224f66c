"""One step of a learner: score the super-batch, select, spread, update."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from jest_core import agreement, optim, selection, step_log
from jest_core.collectives import Learners
from jest_core.config import Run
from jest_core.examples import Examples, Prepare, exchange, mask_duplicates
from jest_core.flexible import Resolution
from jest_core.learnability import Embeddings, matched_scores
from jest_core.losses import sigmoid_loss, softmax_loss
from jest_core.selection import Selection
from jest_core.spreading import low_resolution, spread
from jest_core.towers import Towers
from jest_core.training_pass import Features, Group


@dataclass
class Learner:
    """A learner's own state: what a step changes, and what it needs to run."""

    run: Run
    towers: Towers
    optimizer: torch.optim.Optimizer
    wrapped: nn.Module  # a TrainingPass, inside DistributedDataParallel where there are several learners
    reference_scale_and_bias: tuple[float, float] | None  # of the cached embeddings; None for uniform selection
    prepare: Prepare
    group: dist.ProcessGroup | None = None
    reference: Towers | None = None  # where it scores online, instead of from the cache
    prepare_reference: Prepare | None = None  # its view, where that is not the learner's
    prepare_small: Prepare | None = None  # as pixels of a super-batch are, where `late` mode holds them smaller

    @property
    def device(self) -> torch.device:
        return self.towers.device

    @property
    def score_resolution(self) -> Resolution:
        return self.towers.resolution(self.run.selection.score_image_size, self.run.selection.score_patch_size)

    @property
    def low_resolution(self) -> Resolution:
        """Of that share of a sub-batch that is trained at it; the model's own where no other is."""
        low = self.run.training.low_resolution
        return self.towers.resolution(*((low.image_size, low.patch_size) if low else ()))


@dataclass
class StepResult:
    """What one step did, in the columns of SELECTION, BAD_ROWS and STEPS of tables; the same on every learner."""

    picks: pa.Table
    bad_rows: pa.Table
    summary: dict[str, int | float]
    optimisation: dict[str, float]  # loss, learning rate, gradient norm, logit_scale, logit_bias
    agreement: dict[str, float]  # of scoring at low and at full resolution; empty where it is not measured
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
    agrees: dict[str, float] = {}
    if learner.run.selection.method == "uniform":
        groups = _whole(learner, super_batch, step, learners)
        picks, summary = step_log.of_whole(super_batch, step, learners)
    else:
        with _timed(seconds, "score"):
            scored = _score(learner, super_batch, learner.score_resolution) if learner.run.uses_learner else None
        with _timed(seconds, "reference"):
            reference = _reference(learner, super_batch)
        with _timed(seconds, "select"):
            chosen = _select(learner, super_batch, scored, reference, step)
        with _timed(seconds, "log"):
            picks, summary = step_log.of_selection(learner.run, super_batch, chosen, scored, reference, step, learners)
        if (every := learner.run.selection.agreement_every_steps) and step % every == 0:
            with _timed(seconds, "agreement"):
                assert scored is not None  # criterion easy has no agreement to measure
                agrees = _agreement(learner, super_batch, scored, reference, chosen, step, learners)
        with _timed(seconds, "exchange"):
            groups = _selected(learner, super_batch, chosen, step, learners)
    with _timed(seconds, "train"):
        optimisation = _update(learner, groups, step)
    summary["loss"] = optimisation["loss"]
    return StepResult(picks, step_log.bad_rows(super_batch, step, learners), summary, optimisation, agrees, seconds)


def _whole(learner: Learner, super_batch: Examples, step: int, learners: Learners) -> list[Group]:
    """All sound slots of this learner, in groups by resolution."""
    sound = super_batch[torch.nonzero(super_batch.valid)[:, 0]]
    own, run = learner.towers.resolution(), learner.run
    if run.training.low_resolution is None:
        return [Group(sound, own)]
    counts = learners.counts(len(sound))
    every = learners.gather(_identities(sound), counts)
    n_low = round(run.training.low_resolution.share * len(every))
    start = sum(counts[: learners.rank])
    low = low_resolution(every[:, :2], every[:, 2], n_low, run.seed, step)[start : start + len(sound)]
    groups = [
        Group(sound[torch.nonzero(~low)[:, 0]], own),
        Group(sound[torch.nonzero(low)[:, 0]], learner.low_resolution),
    ]
    return [group for group in groups if len(group.examples)] or groups[:1]


def _selected(learner: Learner, super_batch: Examples, chosen: Selection, step: int, learners: Learners) -> list[Group]:
    """This learner's share of the selected, in groups by resolution: of each group every learner has as many."""
    run, offsets, indices = learner.run, chosen.offsets.cpu(), chosen.indices.cpu()
    identities = learners.take(_identities(super_batch), indices, offsets)
    low = low_resolution(identities[:, :2], identities[:, 2], run.n_low_resolution, run.seed, step)
    groups = []
    for mine, resolution in ((~low, learner.towers.resolution()), (low, learner.low_resolution)):
        if not mine.any():
            continue
        moves = spread(indices[mine], identities[mine, :2], identities[mine, 2], offsets, learners.rank)
        prepare, again = learner.prepare, run.data.decode == "late"
        if learner.prepare_small is not None and resolution.image_size == run.selection.score_image_size:
            prepare, again = learner.prepare_small, False
        groups.append(Group(exchange(super_batch, moves, prepare, learners, decode_all=again), resolution))
    return groups


def _identities(examples: Examples) -> Tensor:
    """uid and occurrence of each example, (B, 3)."""
    return torch.cat([examples.uids, examples.column("occurrence")[:, None]], 1)


def _score(learner: Learner, examples: Examples, resolution: Resolution) -> Embeddings:
    config = learner.run
    return learner.towers.embed(
        examples.pixels,
        examples.tokens,
        batch_size=config.training.score_batch_size,
        resolution=resolution,
        precision=config.selection.score_precision,
    )


def _agreement(
    learner: Learner,
    super_batch: Examples,
    scored: Embeddings,
    reference: Embeddings | None,
    chosen: Selection,
    step: int,
    learners: Learners,
) -> dict[str, float]:
    """The step's selection against the one that scoring at the model's own resolution would have made."""
    whole = super_batch
    if learner.run.data.decode == "late":
        whole = learner.prepare(super_batch.rows)
    full = _score(learner, whole, learner.towers.resolution())
    other = _select(learner, super_batch, full, reference, step)
    run = learner.run.selection
    scores = [matched_scores(x, reference, run.criterion, run.loss) for x in (scored, full)]
    rows = super_batch.valid
    counts = learners.counts(int(rows.sum()))
    low_scores, full_scores = (learners.gather(x.cpu()[rows], counts) for x in scores)
    return agreement.compare(low_scores, full_scores, chosen.indices.cpu(), other.indices.cpu())


def _reference(learner: Learner, super_batch: Examples) -> Embeddings | None:
    """The reference's embeddings of the super-batch, cached or computed; none for the hard-learner criterion."""
    if learner.reference is not None:
        seen = super_batch if learner.prepare_reference is None else learner.prepare_reference(super_batch.rows)
        spec, scale_and_bias = learner.run.reference, learner.reference_scale_and_bias
        assert spec is not None
        assert scale_and_bias is not None
        found = learner.reference.embed(
            seen.pixels,
            seen.tokens,
            batch_size=learner.run.training.score_batch_size,
            resolution=learner.reference.resolution(spec.score_image_size, spec.score_patch_size),
            precision=spec.precision,
        )
        return Embeddings(found.image, found.text, *scale_and_bias)
    if (
        super_batch.reference_image is None
        or super_batch.reference_text is None
        or learner.reference_scale_and_bias is None
    ):
        return None
    image, text = super_batch.reference_image.to(learner.device), super_batch.reference_text.to(learner.device)
    return Embeddings(image, text, *learner.reference_scale_and_bias)


def _select(
    learner: Learner,
    super_batch: Examples,
    scored: Embeddings | None,
    reference: Embeddings | None,
    step: int,
) -> Selection:
    config, device = learner.run.selection, learner.device
    return selection.select(
        scored,
        reference,
        sub_batch_size=learner.run.sub_batch_size,
        n_chunks=config.n_chunks,
        method="independent" if config.method == "independent" else "joint",
        criterion=config.criterion,
        loss=config.loss,
        draw=config.draw,
        gain=config.gain,
        uids=super_batch.uids,
        occurrences=super_batch.column("occurrence"),
        seed=learner.run.seed,
        step=step,
        group=learner.group,
        valid=super_batch.valid.to(device),
        precision=config.precision,
    )


def _update(learner: Learner, groups: list[Group], step: int) -> dict[str, float]:
    """Forward, loss over all learners' shares, backward, AdamW."""
    config = learner.run.training
    rate = optim.learning_rate(
        step,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        n_steps=learner.run.n_steps,
        schedule=config.schedule,
    )
    for parameters in learner.optimizer.param_groups:
        parameters["lr"] = rate
    learner.wrapped.train()
    out: Features = learner.wrapped(groups, step)
    if config.loss == "sigmoid":
        assert out.logit_bias is not None
        loss = sigmoid_loss(*out[:3], out.logit_bias, tile=config.loss_tile, group=learner.group)
    else:
        loss = softmax_loss(*out[:3], tile=config.loss_tile, group=learner.group)
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


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start
