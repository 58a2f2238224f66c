"""Joint example selection: embeddings of a super-batch -> the sub-batch with the highest learnability (Algorithm 1).

Global over the learners of a process group: each holds its share of the embeddings, all agree on one set, and per chunk
only the newly drawn rows travel. Memory and time are linear in B.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jest_core import noise
from jest_core.collectives import Learners
from jest_core.learnability import (
    TILE,
    ConditionalScores,
    Criterion,
    Embeddings,
    Loss,
    batch_score,
    matched_losses,
    set_loss,
    signed_models,
)

__all__ = ["Embeddings", "Selection", "batch_score", "draw_top", "select"]

Method = Literal["joint", "independent"]
Draw = Literal["sample", "top_k"]


@dataclass(frozen=True)
class Selection:
    """The selected sub-batch; all but `scores` is the same on every learner."""

    indices: Int[Tensor, "b"]  # positions in the global super-batch, in the order drawn
    chunk: Int[Tensor, "b"]  # which draw each came from
    draw_score: Float[Tensor, "b"]  # its conditional score at that draw, nats
    learner_loss: Float[Tensor, "b"]  # matched-pair losses, nats; NaN where the criterion does without that model
    reference_loss: Float[Tensor, "b"]
    sub_batch_score: float  # exact score of the whole set, nats, summed over its pairs
    scores: Float[Tensor, "B"]  # this learner's slots: conditional scores at the last draw, nats
    offsets: Int[Tensor, "R"]  # learner r holds the positions offsets[r] .. offsets[r + 1]

    def local(self, rank: int) -> Int[Tensor, "k"]:
        """Positions, in learner `rank`'s own share, of the selected that it holds, in the order drawn."""
        low, high = self.offsets[rank], self.offsets[rank + 1]
        return self.indices[(self.indices >= low) & (self.indices < high)] - low


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
    uids: noise.Uids,
    occurrences: Int[Tensor, "B"] | None = None,
    seed: int,
    step: int,
    group: dist.ProcessGroup | None = None,
    valid: Bool[Tensor, "B"] | None = None,
    tile: int = TILE,
) -> Selection:
    """Select sub_batch_size distinct examples of the super-batch (Evans et al. 2024, Algorithm 1).

    The first chunk is drawn by the matched-pair scores; each later one by what a candidate adds to the examples already
    taken: its own score, plus the scores of its image with the taken texts and of its text with the taken images. These
    are sums, not means, and have no temperature. `independent` draws all at once by the matched-pair scores.

    learner, reference: (B, D) each, this learner's share; `easy` needs no learner, `hard` no reference.
    uids: (B, 2) uint64 or B hex strings; with occurrences they key the noise, fresh for every (seed, step, chunk).
    gain multiplies the scores in a draw; 1.0 is the paper. `top_k` draws without noise, ties broken by uid.
    valid: False masks a slot out. Raises ValueError, on all learners, where no such selection exists.
    """
    learners = Learners(group)
    models = signed_models(learner, reference, criterion)
    device = models[0][1].image.device
    words, times = _identities(uids, occurrences, len(models[0][1]), device)
    if valid is None:
        valid = torch.ones(len(words), dtype=torch.bool, device=device)
    _check(models, words, times, valid, sub_batch_size, n_chunks, gain, learners)
    if method == "independent":
        n_chunks = 1
    elif method != "joint":
        raise ValueError(f"method {method!r} is neither 'joint' nor 'independent'; uniform batches need no selection")

    counts = learners.counts(len(words))
    offsets = torch.tensor([0, *np.cumsum(counts)], device=device)
    conditional = ConditionalScores(models, loss, tile)
    available = valid.clone()
    indices: list[Tensor] = []
    drawn_scores: list[Tensor] = []
    taken: list[list[Embeddings]] = []
    for chunk in range(n_chunks):
        scores = conditional()
        keys = gain * scores
        if draw == "sample":
            keys = keys + noise.gumbel(words, times, seed, step, chunk)
        new = draw_top(
            keys.masked_fill(~available, -torch.inf), sub_batch_size // n_chunks, words, times, offsets, learners
        )
        mine = new[(new >= offsets[learners.rank]) & (new < offsets[learners.rank + 1])] - offsets[learners.rank]
        available[mine] = False
        indices.append(new)
        drawn_scores.append(learners.take(scores, new, offsets))
        taken.append([_take(model, new, offsets, learners) for _, model in models])
        if chunk + 1 < n_chunks:
            conditional.take(taken[-1])

    chosen = torch.cat(indices)
    own_losses = [
        learners.take(matched_losses(m, "sigmoid"), chosen, offsets)
        if m is not None
        else torch.full_like(scores[:1], torch.nan).expand(len(chosen))
        for m in (learner, reference)
    ]
    return Selection(
        indices=chosen,
        chunk=torch.arange(n_chunks, device=device).repeat_interleave(sub_batch_size // n_chunks),
        draw_score=torch.cat(drawn_scores),
        learner_loss=own_losses[0],
        reference_loss=own_losses[1],
        sub_batch_score=_score(models, taken, loss, tile, learners),
        scores=scores,
        offsets=offsets,
    )


def draw_top(
    keys: Float[Tensor, "B"],
    n: int,
    uids: Int[Tensor, "B 2"],
    occurrences: Int[Tensor, "B"],
    offsets: Int[Tensor, "R"],
    learners: Learners,
) -> Int[Tensor, "n"]:
    """Global positions of the n largest keys over all learners, largest first; equal keys are ordered by uid.

    Each learner offers its own n best, so at most n keys a learner travel.
    """
    ties = noise.hashes(uids, occurrences)
    best = _order(keys, ties)[:n]
    offered = learners.counts(len(best))
    all_keys = learners.gather(keys[best], offered)
    all_ties = learners.gather(ties[best], offered)
    positions = learners.gather(best + offsets[learners.rank], offered)
    return positions[_order(all_keys, all_ties)[:n]]


def _order(keys: Tensor, ties: Tensor) -> Tensor:
    """Indices by descending key, then ascending tie hash."""
    by_tie = torch.argsort(ties, stable=True)
    return by_tie[torch.argsort(keys[by_tie], descending=True, stable=True)]


def _take(model: Embeddings, positions: Tensor, offsets: Tensor, learners: Learners) -> Embeddings:
    image, text = (learners.take(x, positions, offsets) for x in (model.image, model.text))
    return Embeddings(image, text, model.logit_scale, model.logit_bias)


def _score(
    models: list[tuple[int, Embeddings]], taken: list[list[Embeddings]], loss: Loss, tile: int, learners: Learners
) -> float:
    """Exact score of the selected set; each learner sums its share of the rows."""
    total = torch.zeros((), dtype=torch.float64, device=taken[0][0].image.device)
    for i, (sign, model) in enumerate(models):
        image, text = (torch.cat([getattr(chunk[i], side) for chunk in taken]) for side in ("image", "text"))
        share = slice(learners.rank * len(image) // learners.size, (learners.rank + 1) * len(image) // learners.size)
        total += sign * set_loss(Embeddings(image, text, model.logit_scale, model.logit_bias), loss, share, tile)
    return float(learners.sum(total))


def _identities(uids: noise.Uids, occurrences: Tensor | None, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    words = noise.uid_words(uids).to(device)
    times = torch.zeros(len(words), dtype=torch.int64, device=device) if occurrences is None else occurrences.to(device)
    if len(words) != n or len(times) != n:
        raise ValueError(f"{n} embeddings, {len(words)} uids and {len(times)} occurrences: one of each per example")
    return words, times.to(torch.int64)


def _check(
    models: list[tuple[int, Embeddings]],
    uids: Tensor,
    occurrences: Tensor,
    valid: Tensor,
    sub_batch_size: int,
    n_chunks: int,
    gain: float,
    learners: Learners,
) -> None:
    """Refuse what cannot be selected from, on every learner alike, before the first draw."""
    if n_chunks < 1 or sub_batch_size < 1 or sub_batch_size % n_chunks:
        raise ValueError(f"sub_batch_size {sub_batch_size} is not a positive multiple of n_chunks {n_chunks}")
    if not 0 <= gain < float("inf"):
        raise ValueError(f"gain {gain} is not a finite number of at least 0")
    for _, model in models:
        if model.image.shape != model.text.shape or model.image.ndim != 2:
            raise ValueError(
                f"image {tuple(model.image.shape)} and text {tuple(model.text.shape)} embeddings are not both (B, D)"
            )
        if not (model.image.is_floating_point() and model.text.is_floating_point()):
            raise ValueError(f"embeddings are {model.image.dtype} and {model.text.dtype}, not floating point")
        if model.image.device != uids.device or model.text.device != uids.device:
            raise ValueError(
                f"embeddings lie on {model.image.device}, {model.text.device} and {uids.device}: put them on one"
            )
        if len(model) != len(uids):
            raise ValueError(f"learner and reference embeddings differ in number: {len(model)} and {len(uids)}")
    if len(valid) != len(uids):
        raise ValueError(f"valid has {len(valid)} slots, the super-batch {len(uids)}")
    bad = torch.stack([~torch.isfinite(x[valid]).all(1) for _, m in models for x in (m.image, m.text)]).any(0).sum()
    n_valid, n_bad = learners.sum(torch.stack([valid.sum(), bad])).tolist()
    if n_bad:
        raise ValueError(f"{n_bad} examples have NaN or infinite embeddings: mask them with valid, or stop the run")
    if n_valid < sub_batch_size:
        raise ValueError(f"sub_batch_size {sub_batch_size} exceeds the {n_valid} valid examples of the super-batch")
