"""A super-batch -> the sub-batch that a step trains on: score, select, spread."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from jest_core.collectives import Learners
from jest_core.examples.super_batch import Examples, Prepare, exchange, mask_duplicates
from jest_core.models.flexible import Resolution
from jest_core.models.towers import Towers
from jest_core.run_file import Run
from jest_core.selection import Embeddings, Selection, agreement, select
from jest_core.selection.agreement import Agreement
from jest_core.selection.learnability import matched_scores
from jest_core.training import step_log
from jest_core.training.bad_pictures import BadPictures
from jest_core.training.forward import Group
from jest_core.training.mixed_resolution import low_resolution
from jest_core.training.placement import spread
from jest_core.training.step_log import StepLog


@dataclass
class Selector:
    """What one learner needs to select: its model, and the source of the reference's embeddings."""

    run: Run
    towers: Towers
    reference_scale_and_bias: tuple[float, float] | None  # of the cached embeddings; None for uniform selection
    prepare: Prepare
    group: dist.ProcessGroup | None = None
    reference: Towers | None = None  # only where the reference embeds online, instead of from the score cache
    prepare_reference: Prepare | None = None  # with the reference's view, where that differs from the learner's
    prepare_small: Prepare | None = (
        None  # at the size of the scored pixels, where data.decode is late and they are smaller
    )
    bad_pictures: BadPictures = field(default_factory=BadPictures)

    @property
    def device(self) -> torch.device:
        return self.towers.device

    @property
    def score_resolution(self) -> Resolution:
        return self.towers.resolution(self.run.selection.score_image_size, self.run.selection.score_patch_size)

    @property
    def low_resolution(self) -> Resolution:
        """The resolution of training.low_resolution; the model's own resolution without such a part."""
        low = self.run.training.low_resolution
        return self.towers.resolution(*((low.image_size, low.patch_size) if low else ()))


@dataclass
class Drawn:
    """The sub-batch of one step: this learner's share of it, and the log, which is the same on all learners."""

    groups: list[Group]  # this learner's examples, by the resolution at which they are trained
    log: StepLog
    agreement: Agreement  # of scoring at low and at full resolution
    seconds: dict[str, float]  # by part of the step


def draw(selector: Selector, super_batch: Examples, step: int) -> Drawn:
    """Score this learner's share of a super-batch, select globally, and spread the selected examples over the learners.

    In a uniform run the super-batch is the sub-batch, without its bad pictures. Collective: all learners call it with
    the same step. Raises TooManyBad where too many pictures did not decode.
    """
    seconds: dict[str, float] = {}
    learners = Learners(selector.group)
    mask = selector.run.data.mask_duplicates
    if mask != "none":
        super_batch = mask_duplicates(super_batch, mask, learners)
    bad_rows = step_log.bad_rows(super_batch, step, learners)
    selector.bad_pictures.add(bad_rows, sum(learners.counts(len(super_batch))), selector.run)
    agrees = Agreement()
    if not selector.run.selection.selects:
        groups = _whole(selector, super_batch, step, learners)
        picks, summary = step_log.of_whole(super_batch, step, learners)
    else:
        with timed(seconds, "score"):
            scored = _score(selector, super_batch, selector.score_resolution) if selector.run.uses_learner else None
        with timed(seconds, "reference"):
            reference = _reference(selector, super_batch)
        with timed(seconds, "select"):
            chosen = _select(selector, super_batch, scored, reference, step)
        with timed(seconds, "log"):
            picks, summary = step_log.of_selection(selector.run, super_batch, chosen, scored, reference, step, learners)
        if (every := selector.run.selection.agreement_every_steps) and step % every == 0:
            with timed(seconds, "agreement"):
                assert scored is not None  # criterion easy has no agreement to measure
                agrees = _agreement(selector, super_batch, scored, reference, chosen, step, learners)
        with timed(seconds, "exchange"):
            groups = _selected(selector, super_batch, chosen, step, learners)
    log = StepLog(picks, bad_rows, summary)
    return Drawn(groups, log, agrees, seconds)


def _whole(selector: Selector, super_batch: Examples, step: int, learners: Learners) -> list[Group]:
    """All valid examples of this learner, in groups by resolution."""
    examples = super_batch[torch.nonzero(super_batch.valid)[:, 0]]
    full, run = selector.towers.resolution(), selector.run
    if run.training.low_resolution is None:
        return [Group(examples, full)]
    counts = learners.counts(len(examples))
    every = learners.gather(_identities(examples), counts)
    n_low = round(run.training.low_resolution.share * len(every))
    start = sum(counts[: learners.rank])
    low = low_resolution(every[:, :2], every[:, 2], n_low, run.seed, step)[start : start + len(examples)]
    groups = [
        Group(examples[torch.nonzero(~low)[:, 0]], full),
        Group(examples[torch.nonzero(low)[:, 0]], selector.low_resolution),
    ]
    if selector.towers.sharded:  # all learners make the same number of forward passes
        return groups
    return [group for group in groups if len(group.examples)] or groups[:1]


def _selected(
    selector: Selector, super_batch: Examples, chosen: Selection, step: int, learners: Learners
) -> list[Group]:
    """This learner's share of the selected examples, in groups by resolution, each equally large on all learners."""
    run, offsets, indices = selector.run, chosen.offsets.cpu(), chosen.indices.cpu()
    (identities,) = learners.rows_at([_identities(super_batch)], indices, offsets)
    low = low_resolution(identities[:, :2], identities[:, 2], run.n_low_resolution, run.seed, step)
    groups = []
    for mine, resolution in ((~low, selector.towers.resolution()), (low, selector.low_resolution)):
        if not mine.any():
            continue
        moves = spread(indices[mine], identities[mine, :2], identities[mine, 2], offsets, learners.rank)
        prepare, again = selector.prepare, run.data.decode == "late"
        if selector.prepare_small is not None and resolution.image_size == run.selection.score_image_size:
            prepare, again = selector.prepare_small, False
        groups.append(Group(exchange(super_batch, moves, prepare, learners, decode_all=again), resolution))
    return groups


def _identities(examples: Examples) -> Tensor:
    """uid and occurrence of each example, (B, 3)."""
    return torch.cat([examples.uids, examples.column("occurrence")[:, None]], 1)


def _score(selector: Selector, examples: Examples, resolution: Resolution) -> Embeddings:
    config = selector.run
    return selector.towers.embed(
        examples.pixels,
        examples.tokens,
        batch_size=config.training.score_batch_size,
        resolution=resolution,
        precision=config.selection.score_precision,
    )


def _agreement(
    selector: Selector,
    super_batch: Examples,
    scored: Embeddings,
    reference: Embeddings | None,
    chosen: Selection,
    step: int,
    learners: Learners,
) -> Agreement:
    """The step's selection compared with the one by scores at the model's own resolution."""
    whole = super_batch
    if selector.run.data.decode == "late":
        whole = selector.prepare(super_batch.rows)
    full = _score(selector, whole, selector.towers.resolution())
    other = _select(selector, super_batch, full, reference, step)
    run = selector.run.selection
    scores = [matched_scores(x, reference, run.criterion, run.loss) for x in (scored, full)]
    rows = super_batch.valid
    counts = learners.counts(int(rows.sum()))
    low_scores, full_scores = (learners.gather(x.cpu()[rows], counts) for x in scores)
    return agreement.compare(low_scores, full_scores, chosen.indices.cpu(), other.indices.cpu())


def _reference(selector: Selector, super_batch: Examples) -> Embeddings | None:
    """The reference's embeddings of the super-batch, cached or computed; None where the criterion does not use them."""
    if selector.reference is not None:
        seen = super_batch if selector.prepare_reference is None else selector.prepare_reference(super_batch.rows)
        spec, scale_and_bias = selector.run.reference, selector.reference_scale_and_bias
        assert spec is not None
        assert scale_and_bias is not None
        embeddings = selector.reference.embed(
            seen.pixels,
            seen.tokens,
            batch_size=selector.run.training.score_batch_size,
            resolution=selector.reference.resolution(spec.score_image_size, spec.score_patch_size),
            precision=spec.precision,
        )
        return Embeddings(embeddings.image, embeddings.text, *scale_and_bias)
    if (
        super_batch.reference_image is None
        or super_batch.reference_text is None
        or selector.reference_scale_and_bias is None
    ):
        return None
    image, text = super_batch.reference_image.to(selector.device), super_batch.reference_text.to(selector.device)
    return Embeddings(image, text, *selector.reference_scale_and_bias)


def _select(
    selector: Selector,
    super_batch: Examples,
    scored: Embeddings | None,
    reference: Embeddings | None,
    step: int,
) -> Selection:
    config, device = selector.run.selection, selector.device
    return select(
        scored,
        reference,
        sub_batch_size=selector.run.sub_batch_size,
        n_chunks=config.n_chunks,
        method=config.method,
        criterion=config.criterion,
        loss=config.loss,
        draw=config.draw,
        gain=config.gain,
        uids=super_batch.uids,
        occurrences=super_batch.column("occurrence"),
        seed=selector.run.seed,
        step=step,
        group=selector.group,
        valid=super_batch.valid.to(device),
        precision=config.precision,
    )


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Store under `name` how long the block took, with all its work on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start
