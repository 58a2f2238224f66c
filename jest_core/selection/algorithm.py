"""Algorithm 1 of Evans et al. 2024 (arXiv:2406.17711): a super-batch's embeddings -> the most learnable sub-batch.

Each learner of a process group has the embeddings of its share of the super-batch, and all learners select the same
set. For each chunk, only the embeddings of the newly drawn examples are sent. Memory and time are linear in B.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jest_core import noise
from jest_core.choices import Criterion, Draw, Loss, Method, Precision
from jest_core.collectives import Learners, local_positions, offsets_of
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
    """Chunk by chunk: the scores given what was drawn before, noise, the largest keys, their part in later scores."""
    models, n_draws = share.models, settings.n_draws
    conditional = ConditionalScores(models, settings.loss, settings.tile, settings.precision)
    check_scores(conditional, share.valid, settings.sub_batch_size, learners)
    offsets = offsets_of(learners.counts(len(share))).to(share.uids.device)
    available, chunk_size = share.valid.clone(), settings.sub_batch_size // n_draws
    drawn: list[Tensor] = []
    draw_scores: list[Tensor] = []
    with _threads_for(len(share) * chunk_size * share.width):
        for chunk in range(n_draws):
            scores = conditional()
            keys = settings.gain * scores
            if settings.draw == "sample":
                keys = keys + noise.gumbel(share.uids, share.occurrences, settings.seed, settings.step, chunk)
            keys = keys.masked_fill(~available, -torch.inf)
            new = draw_top(keys, chunk_size, share.uids, share.occurrences, offsets, learners)
            drawn.append(new)
            draw_scores.append(learners.rows_at(scores, new, offsets))
            available[local_positions(new, offsets, learners.rank)] = False
            # after the last draw only the sums of the selected are needed, for the score of the set
            last = chunk + 1 == n_draws
            rows = local_positions(torch.cat(drawn), offsets, learners.rank) if last else slice(None)
            conditional.add([_embeddings_at(model, new, offsets, learners) for _, model in models], rows)

    indices = torch.cat(drawn)
    members = local_positions(indices, offsets, learners.rank)
    return Selection(
        indices=indices,
        chunk=torch.arange(n_draws, device=offsets.device).repeat_interleave(chunk_size),
        draw_score=torch.cat(draw_scores),
        learner_loss=_losses_at(share.learner, settings.loss, indices, offsets, learners),
        reference_loss=_losses_at(share.reference, settings.loss, indices, offsets, learners),
        sub_batch_score=float(learners.sum(conditional.set_score(members))),
        scores=scores,
        offsets=offsets,
    )


def draw_top(
    keys: Float[Tensor, " B"],
    n: int,
    uids: Int[Tensor, "B 2"],
    occurrences: Int[Tensor, " B"],
    offsets: Int[Tensor, " R"],
    learners: Learners,
) -> Int[Tensor, " n"]:
    """Global positions of the n largest keys over all learners, largest first; equal keys are ordered by uid.

    Each learner sends its n largest, so at most n keys a learner are sent. Raises ValueError, on all learners, where
    fewer than n keys are finite.
    """
    if not n:
        return torch.empty(0, dtype=torch.int64, device=keys.device)
    best = torch.nonzero(keys >= torch.topk(keys, min(n, len(keys))).values[-1:])[:, 0]
    ties = noise.hash_examples(uids[best], occurrences[best])
    order = _order(keys[best], ties)[:n]
    counts = offsets.diff().clamp(max=n).tolist()
    all_keys, all_ties = learners.gather(keys[best[order]], counts), learners.gather(ties[order], counts)
    positions = learners.gather(best[order] + offsets[learners.rank], counts)
    winners = _order(all_keys, all_ties)[:n]
    if not torch.isfinite(all_keys[winners]).all():
        raise ValueError(
            f"fewer than {n} examples have a finite score left to draw by: embeddings, logit_scale or gain too large"
        )
    return positions[winners]


def _order(keys: Tensor, ties: Tensor) -> Tensor:
    """Indices by descending key, then ascending tie hash."""
    by_tie = torch.argsort(ties, stable=True)
    return by_tie[torch.argsort(keys[by_tie], descending=True, stable=True)]


def _embeddings_at(model: Embeddings, positions: Tensor, offsets: Tensor, learners: Learners) -> Embeddings:
    """A model's embeddings of these global positions, on all learners."""
    image, text = (learners.rows_at(x, positions, offsets) for x in (model.image, model.text))
    return Embeddings(image, text, model.logit_scale, model.logit_bias)


def _losses_at(
    model: Embeddings | None, loss: Loss, positions: Tensor, offsets: Tensor, learners: Learners
) -> Float[Tensor, " b"]:
    """A model's matched-pair losses of these global positions, on all learners; NaN without the model."""
    if model is None:
        return torch.full((len(positions),), torch.nan, dtype=torch.float64, device=positions.device)
    return learners.rows_at(matched_losses(model, loss), positions, offsets)


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
