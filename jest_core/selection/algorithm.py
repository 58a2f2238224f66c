"""Algorithm 1 of Evans et al. 2024 (arXiv:2406.17711): a super-batch's embeddings -> the most learnable sub-batch.

Each learner of a process group has the embeddings of its share of the super-batch, and all learners select the same
set. For each chunk, only the embeddings of the newly drawn examples are sent. Memory and time are linear in B.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jest_core import noise
from jest_core.choices import Criterion, Draw, Loss, Method, Precision
from jest_core.collectives import Learners, local_positions
from jest_core.losses import TILE
from jest_core.selection.arguments import Settings, Share, Uids, check_scores, checked
from jest_core.selection.embeddings import Embeddings
from jest_core.selection.learnability import ConditionalScores, matched_losses

_SMALL = 1 << 24  # multiplications of a chunk's embeddings with a model's, below which one thread is faster than two


@dataclass(frozen=True)
class Selection:
    """The selected sub-batch. All but `scores` is the same on every learner."""

    indices: Int[Tensor, " b"]  # positions in the global super-batch, in the order drawn
    chunk: Int[Tensor, " b"]  # in which draw each was drawn, from 0
    draw_score: Float[Tensor, " b"]  # its conditional score at that draw, nats
    learner_loss: Float[Tensor, " b"]  # matched-pair losses, nats (softmax: positive terms); NaN without that model
    reference_loss: Float[Tensor, " b"]
    sub_batch_score: float  # score of the whole set, nats, summed over its pairs; as exact as `precision`
    scores: Float[Tensor, " B"]  # of this learner's slots: conditional scores at the last draw, nats
    offsets: Int[Tensor, " R"]  # learner r has the positions offsets[r] .. offsets[r + 1]

    def local(self, rank: int) -> Int[Tensor, " k"]:
        """The selected examples of learner `rank`, as positions in its share, in the order drawn."""
        return local_positions(self.indices, self.offsets, rank)


@torch.no_grad()
def select(
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    sub_batch_size: int,
    n_chunks: int = 16,
    method: Method = "joint",
    criterion: Criterion = "learnability",
    loss: Loss = "sigmoid",
    draw: Draw = "sample",
    gain: float = 1.0,
    uids: Uids,
    occurrences: Int[Tensor, " B"] | None = None,
    seed: int,
    step: int,
    group: dist.ProcessGroup | None = None,
    valid: Bool[Tensor, " B"] | None = None,
    precision: Precision = "exact",
    tile: int = TILE,
) -> Selection:
    """Select sub_batch_size distinct examples of the super-batch (Evans et al. 2024, Algorithm 1).

    The first chunk is drawn by the scores of the examples' own pairs. Each later chunk is drawn by what a candidate
    adds to the examples drawn before: its own score, plus the scores of its image with their texts and of its text with
    their images. These are sums, not means, without a temperature. `independent` draws all at once by the own scores.

    learner, reference: (B, D) each, this learner's share; the criterion `easy` needs no learner, `hard` no reference.
    uids: (B, 2) uint64 or B hex strings; with occurrences they key the noise, new for each (seed, step, chunk).
    gain multiplies the scores in a draw; 1.0 is the paper. `top_k` draws without noise; the uid decides between ties.
    valid: False for a slot that cannot be selected. tile: rows and columns of logits in memory at once.
    precision: `exact` multiplies in float32 (the CUDA kernel of the sigmoid loss in the type of the embeddings); `fast`
    in bfloat16, where the device has it. Sums are float32 within a tile and float64 beyond it in either case.
    Raises ValueError, on all learners, where no such selection exists.
    """
    settings = Settings(
        method=method,
        criterion=criterion,
        loss=loss,
        draw=draw,
        precision=precision,
        sub_batch_size=sub_batch_size,
        n_chunks=n_chunks,
        gain=gain,
        seed=seed,
        step=step,
        tile=tile,
    )
    learners = Learners(group)
    share = checked(learner, reference, settings, learners, uids=uids, occurrences=occurrences, valid=valid)
    return _algorithm_1(share, settings, learners)


def _algorithm_1(share: Share, settings: Settings, learners: Learners) -> Selection:
    """Chunk by chunk: the scores given what was drawn before, noise, the largest keys, their part in later scores.

    On a GPU the host runs ahead: a chunk takes two collectives, whose sizes do not depend on what is drawn, and the
    host reads nothing of it.
    """
    models, n_draws = share.models, settings.n_draws
    conditional = ConditionalScores(models, settings.loss, settings.tile, settings.precision)
    check_scores(conditional, share.valid, settings.sub_batch_size, learners)
    chunk_size = settings.sub_batch_size // n_draws
    ties, available = Ties.of(share.uids, share.occurrences), share.valid.clone()
    losses = [_losses(model, settings.loss, share) for model in (share.learner, share.reference)]
    chunks: list[list[Tensor]] = []  # of each: positions, scores, losses of learner and of reference
    finite = torch.ones((), dtype=torch.bool, device=share.offsets.device)
    with _threads_for(len(share) * chunk_size * share.width):
        for chunk in range(n_draws):
            scores = conditional()
            keys = settings.gain * scores
            if settings.draw == "sample":
                keys = keys + noise.gumbel(share.uids, share.occurrences, settings.seed, settings.step, chunk)
            keys = keys.masked_fill(~available, -torch.inf)
            new, drawn_keys = draw_top(keys, chunk_size, ties, share.offsets, learners)
            finite &= torch.isfinite(drawn_keys).all()
            numbers, embeddings = _rows_of(new, [scores, *losses], share, learners)
            chunks.append([new, *numbers])
            available &= ~_are_drawn(new, share, learners)
            if chunk + 1 < n_draws:
                conditional.add(embeddings)

    indices, draw_score, learner_loss, reference_loss = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    # after the last draw only the sums of the selected are needed, for the score of the set
    members = local_positions(indices, share.offsets, learners.rank)
    conditional.add(embeddings, members)
    score = learners.sum(conditional.set_score(members))
    sub_batch_score, all_finite = torch.stack([score, finite.double()]).tolist()  # the host reads both at once
    if not all_finite:
        raise ValueError(
            f"fewer than {settings.sub_batch_size} examples have a finite score left to draw by: embeddings, "
            "logit_scale or gain too large"
        )
    return Selection(
        indices=indices,
        chunk=torch.arange(n_draws, device=indices.device).repeat_interleave(chunk_size),
        draw_score=draw_score,
        learner_loss=learner_loss,
        reference_loss=reference_loss,
        sub_batch_score=sub_batch_score,
        scores=scores,
        offsets=share.offsets,
    )


@dataclass(frozen=True)
class Ties:
    """How examples with equal keys are ordered: by a hash of uid and occurrence, alike on any number of learners."""

    hashes: Int[Tensor, " B"]
    order: Int[Tensor, " B"]  # positions by ascending hash

    @classmethod
    def of(cls, uids: Int[Tensor, "B 2"], occurrences: Int[Tensor, " B"]) -> "Ties":
        hashes = noise.hash_examples(uids, occurrences)
        return cls(hashes, torch.argsort(hashes, stable=True))


def draw_top(
    keys: Float[Tensor, " B"], n: int, ties: Ties, offsets: Int[Tensor, " R"], learners: Learners
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Global positions of the n largest keys over all learners, and the keys, largest first; equal keys by their hash.

    keys: float64. Each learner sends its n largest, filled up with minus infinity where it has fewer.
    """
    if not n:
        return torch.empty(0, dtype=torch.int64, device=keys.device), keys[:0]
    best = ties.order[torch.argsort(keys[ties.order], descending=True, stable=True)[:n]]
    mine = torch.stack([keys[best].view(torch.int64), ties.hashes[best], best + offsets[learners.rank]], 1)
    if missing := n - len(best):
        nothing = torch.stack([keys.new_full((missing,), -torch.inf).view(torch.int64), *best.new_zeros(2, missing)], 1)
        mine = torch.cat([mine, nothing])
    bits, hashes, positions = learners.gather_equal(mine).unbind(1)
    every = bits.contiguous().view(torch.float64)
    by_hash = torch.argsort(hashes, stable=True)
    winners = by_hash[torch.argsort(every[by_hash], descending=True, stable=True)[:n]]
    return positions[winners], every[winners]


def _are_drawn(positions: Tensor, share: Share, learners: Learners) -> Bool[Tensor, " B"]:
    """Which of this learner's examples are at these global positions."""
    flags = torch.zeros(len(share) + 1, dtype=torch.bool, device=positions.device)  # the last: all of other learners
    local = positions - share.offsets[learners.rank]
    flags[torch.where((local >= 0) & (local < len(share)), local, len(share))] = True
    return flags[:-1]


def _rows_of(
    positions: Tensor, columns: Sequence[Tensor], share: Share, learners: Learners
) -> tuple[list[Tensor], list[Embeddings]]:
    """The values of `columns` and each model's embeddings at these global positions, on all learners."""
    sides = [side for _, model in share.models for side in (model.image, model.text)]
    rows = learners.rows_at([*columns, *sides], positions, share.offsets)
    pairs = zip(rows[len(columns) :: 2], rows[len(columns) + 1 :: 2], share.models, strict=True)
    embeddings = [Embeddings(image, text, model.logit_scale, model.logit_bias) for image, text, (_, model) in pairs]
    return rows[: len(columns)], embeddings


def _losses(model: Embeddings | None, loss: Loss, share: Share) -> Float[Tensor, " B"]:
    """A model's matched-pair losses of this learner's examples; NaN without the model."""
    if model is None:
        return torch.full((len(share),), torch.nan, dtype=torch.float64, device=share.offsets.device)
    return matched_losses(model, loss)


@contextmanager
def _threads_for(n_products: int) -> Iterator[None]:
    """One thread for the products of a small chunk. Two threads are hardly faster at that, and each of its many short
    operations waits for the slower one: three times as long where other processes need the same cores."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(n_threads if n_products > _SMALL else 1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
