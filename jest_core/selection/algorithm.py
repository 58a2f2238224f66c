"""Joint example selection: embeddings of a super-batch -> the sub-batch with the highest learnability (Algorithm 1).

Global over the learners of a process group: each holds its share of the embeddings, all agree on one set, and per chunk
only the newly drawn rows travel. Memory and time are linear in B.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jest_core import noise
from jest_core.choices import Criterion, Draw, Loss, Method, Precision
from jest_core.collectives import Learners
from jest_core.losses import TILE
from jest_core.selection.learnability import (
    ConditionalScores,
    Embeddings,
    batch_score,
    matched_losses,
    signed_models,
)

__all__ = ["Embeddings", "Selection", "batch_score", "draw_top", "gibbs_select", "select"]

_SMALL = 1 << 24  # multiplications of a chunk with a model, below which it is quicker to be alone


class Diverged(ValueError):
    """A model has come to numbers that mean nothing; trying once more would come to them again."""


@dataclass(frozen=True)
class Selection:
    """The selected sub-batch; all but `scores` is the same on every learner."""

    indices: Int[Tensor, " b"]  # positions in the global super-batch, in the order drawn
    chunk: Int[Tensor, " b"]  # which draw each came from
    draw_score: Float[Tensor, " b"]  # its conditional score at that draw, nats
    learner_loss: Float[Tensor, " b"]  # matched-pair losses, nats (softmax: positive terms); NaN without that model
    reference_loss: Float[Tensor, " b"]
    sub_batch_score: float  # score of the whole set, nats, summed over its pairs; as exact as `precision`
    scores: Float[Tensor, " B"]  # this learner's slots: conditional scores at the last draw, nats
    offsets: Int[Tensor, " R"]  # learner r holds the positions offsets[r] .. offsets[r + 1]

    def local(self, rank: int) -> Int[Tensor, " k"]:
        """Positions, in learner `rank`'s own share, of the selected that it holds, in the order drawn."""
        low, high = self.offsets[rank], self.offsets[rank + 1]
        return self.indices[(self.indices >= low) & (self.indices < high)] - low


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
    uids: noise.Uids,
    occurrences: Int[Tensor, " B"] | None = None,
    seed: int,
    step: int,
    group: dist.ProcessGroup | None = None,
    valid: Bool[Tensor, " B"] | None = None,
    precision: Precision = "exact",
    tile: int = TILE,
) -> Selection:
    """Select sub_batch_size distinct examples of the super-batch (Evans et al. 2024, Algorithm 1).

    The first chunk is drawn by the matched-pair scores; each later one by what a candidate adds to the examples already
    taken: its own score, plus the scores of its image with the taken texts and of its text with the taken images. These
    are sums, not means, and have no temperature. `independent` draws all at once by the matched-pair scores.

    learner, reference: (B, D) each, this learner's share; `easy` needs no learner, `hard` no reference.
    uids: (B, 2) uint64 or B hex strings; with occurrences they key the noise, fresh for every (seed, step, chunk).
    gain multiplies the scores in a draw; 1.0 is the paper. `top_k` draws without noise, ties broken by uid.
    valid: False masks a slot out.
    precision: `exact` multiplies in float32 (the CUDA kernel of the sigmoid loss in the embeddings' own type); `fast`
    in bfloat16, where the device has it. Sums are float32 within a tile and float64 beyond it in either case.
    Raises ValueError, on all learners, where no such selection exists.
    """
    learners = Learners(group)
    options: dict[str, Any] = {
        "method": method,
        "criterion": criterion,
        "loss": loss,
        "draw": draw,
        "precision": precision,
    }
    sizes = {
        "sub_batch_size": sub_batch_size,
        "n_chunks": n_chunks,
        "gain": gain,
        "seed": seed,
        "step": step,
        "tile": tile,
    }
    settings = options | sizes
    with _agreement(learners, settings):
        _check_options(options)
        _check_sizes(sub_batch_size, n_chunks, gain, tile)
        words, times, valid = _slots(learner, reference, uids, occurrences, valid)
        learner, reference = _with_numbers(learner), _with_numbers(reference)
        settings |= {"learner": _kind(learner), "reference": _kind(reference)}
        models = signed_models(learner, reference, criterion)
    if method == "independent":
        n_chunks = 1
    device, chunk_size = words.device, sub_batch_size // n_chunks
    conditional = ConditionalScores(models, loss, tile, precision)
    _check_super_batch(conditional, valid, sub_batch_size, learners)

    offsets = torch.tensor([0, *np.cumsum(learners.counts(len(words)))], device=device)
    own = range(int(offsets[learners.rank]), int(offsets[learners.rank + 1]))
    available = valid.clone()
    indices: list[Tensor] = []
    drawn_scores: list[Tensor] = []
    with _threads_for(len(words) * chunk_size * models[0][1].image.shape[1]):
        for chunk in range(n_chunks):
            scores = conditional()
            keys = gain * scores
            if draw == "sample":
                keys = keys + noise.gumbel(words, times, seed, step, chunk)
            new = draw_top(keys.masked_fill(~available, -torch.inf), chunk_size, words, times, offsets, learners)
            indices.append(new)
            drawn_scores.append(learners.take(scores, new, offsets))
            available[_held(new, own)] = False
            # after the last draw only the selected themselves need their sums: for the score of the set
            rows = slice(None) if chunk + 1 < n_chunks else _held(torch.cat(indices), own)
            conditional.take([_take(model, new, offsets, learners) for _, model in models], rows)

    chosen = torch.cat(indices)
    own_losses = [
        learners.take(matched_losses(model, loss), chosen, offsets)
        if model is not None
        else torch.full((sub_batch_size,), torch.nan, dtype=torch.float64, device=device)
        for model in (learner, reference)
    ]
    return Selection(
        indices=chosen,
        chunk=torch.arange(n_chunks, device=device).repeat_interleave(chunk_size),
        draw_score=torch.cat(drawn_scores),
        learner_loss=own_losses[0],
        reference_loss=own_losses[1],
        sub_batch_score=float(learners.sum(conditional.set_score(_held(chosen, own)))),
        scores=scores,
        offsets=offsets,
    )


@torch.no_grad()
def gibbs_select(
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    sub_batch_size: int,
    n_iterations: int,
    criterion: Criterion = "learnability",
    gain: float = 1.0,
    uids: noise.Uids,
    occurrences: Int[Tensor, " B"] | None = None,
    seed: int,
    step: int,
    valid: Bool[Tensor, " B"] | None = None,
    precision: Precision = "exact",
    tile: int = TILE,
) -> tuple[Int[Tensor, " b"], Float[Tensor, " n_iterations"]]:
    """The brute-force single-site Gibbs sampler that joint selection stands in for (paper Figure 2, middle).

    Starts at a uniform set. An iteration takes one of its examples out, at random, and draws another in its place (or
    the same) from all that are not in the set, by what each would add to the rest; it costs O(B * D). Sigmoid loss, one
    learner; other arguments as in `select`. Returns the positions of the last set, and the score of the set after each
    iteration, in nats.
    """
    _check_options({"criterion": criterion, "precision": precision})
    _check_sizes(sub_batch_size, 1, gain, tile)
    if n_iterations < 0:
        raise ValueError(f"n_iterations {n_iterations} is negative")
    words, times, valid = _slots(learner, reference, uids, occurrences, valid)
    models = signed_models(_with_numbers(learner), _with_numbers(reference), criterion)
    conditional = ConditionalScores(models, "sigmoid", tile, precision)
    learners = Learners()
    _check_super_batch(conditional, valid, sub_batch_size, learners)

    offsets = torch.tensor([0, len(words)], device=words.device)
    start = noise.gumbel(words, times, seed, step, -1).masked_fill(~valid, -torch.inf)
    members = draw_top(start, sub_batch_size, words, times, offsets, learners)
    conditional.take([model[members] for _, model in models])
    score = conditional.set_score(members)
    available = valid.clone()
    available[members] = False
    nobody = torch.zeros(2, dtype=torch.int64, device=words.device)  # which site is no matter of any example
    trace = torch.empty(n_iterations, dtype=torch.float64, device=words.device)
    for iteration in range(n_iterations):
        site = noise.hashes(nobody[None], nobody[:1], seed, step, iteration, -1) % sub_batch_size
        old = members[site]
        conditional.drop([model[old] for _, model in models])
        available[old] = True
        scores = conditional()
        keys = gain * scores + noise.gumbel(words, times, seed, step, iteration)
        new = keys.masked_fill(~available, -torch.inf).argmax()[None]
        available[new] = False
        members[site] = new
        conditional.take([model[new] for _, model in models])
        score = score + (scores[new] - scores[old]).squeeze()
        trace[iteration] = score
    return members, trace


def draw_top(
    keys: Float[Tensor, " B"],
    n: int,
    uids: Int[Tensor, "B 2"],
    occurrences: Int[Tensor, " B"],
    offsets: Int[Tensor, " R"],
    learners: Learners,
) -> Int[Tensor, " n"]:
    """Global positions of the n largest keys over all learners, largest first; equal keys are ordered by uid.

    Each learner offers its own n best, so at most n keys a learner travel. Raises ValueError, on all learners, where
    fewer than n keys are finite.
    """
    if not n:
        return torch.empty(0, dtype=torch.int64, device=keys.device)
    best = torch.nonzero(keys >= torch.topk(keys, min(n, len(keys))).values[-1:])[:, 0]
    ties = noise.hashes(uids[best], occurrences[best])
    order = _order(keys[best], ties)[:n]
    offered = offsets.diff().clamp(max=n).tolist()
    all_keys, all_ties = learners.gather(keys[best[order]], offered), learners.gather(ties[order], offered)
    positions = learners.gather(best[order] + offsets[learners.rank], offered)
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


def _held(positions: Tensor, own: range) -> Tensor:
    """Of global positions, those that this learner holds, in its own share."""
    return positions[(positions >= own.start) & (positions < own.stop)] - own.start


def _take(model: Embeddings, positions: Tensor, offsets: Tensor, learners: Learners) -> Embeddings:
    image, text = (learners.take(x, positions, offsets) for x in (model.image, model.text))
    return Embeddings(image, text, model.logit_scale, model.logit_bias)


@contextmanager
def _threads_for(products: int) -> Iterator[None]:
    """One thread for a small chunk's products. Two are hardly faster at that, and each of its many short operations
    waits for the slower of them: three times as long where readers want the same cores."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(n_threads if products > _SMALL else 1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


@contextmanager
def _agreement(learners: Learners, settings: dict[str, Any]) -> Iterator[None]:
    """What one learner refuses, all refuse, and so they do where settings differ: nobody waits for one that has left.

    Settings are read when the block is through: it may add to them.
    """
    raised, problem = None, ""
    try:
        yield
    except Exception as error:
        raised, problem = error, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    message = json.dumps([problem, settings], default=repr).encode()
    told = [json.loads(theirs) for theirs in learners.exchange([message] * learners.size)]
    if raised is not None and (learners.size == 1 or not isinstance(raised, ValueError)):
        raise raised
    for rank, (problem, theirs) in enumerate(told):
        if problem:
            raise ValueError(f"learner {rank}: {problem}") from raised
        for name, value in theirs.items():
            if value != (first := told[0][1][name]):
                raise ValueError(f"{name} is {first!r} on learner 0 and {value!r} on learner {rank}")


def _with_numbers(model: Embeddings | None) -> Embeddings | None:
    """logit_scale and logit_bias as numbers: read from the device once."""
    return model and replace(model, logit_scale=float(model.logit_scale), logit_bias=float(model.logit_bias))


def _kind(model: Embeddings | None) -> list[Any] | None:
    """What the learners' shares of one model have in common."""
    if model is None:
        return None
    widths = [x.shape[1] for x in (model.image, model.text)]
    return [str(model.image.dtype), str(model.text.dtype), *widths, model.logit_scale, model.logit_bias]


def _check_options(options: Mapping[str, str]) -> None:
    choices = {"method": Method, "criterion": Criterion, "loss": Loss, "draw": Draw, "precision": Precision}
    for name, value in options.items():
        if value not in get_args(choices[name]):
            why = "; uniform batches need no selection" if value == "uniform" else ""
            raise ValueError(f"{name} {value!r} is none of {', '.join(get_args(choices[name]))}{why}")


def _check_sizes(sub_batch_size: int, n_chunks: int, gain: float, tile: int) -> None:
    if not isinstance(sub_batch_size, int) or not isinstance(n_chunks, int):
        raise ValueError(f"sub_batch_size {sub_batch_size!r} and n_chunks {n_chunks!r} are not both whole numbers")
    if n_chunks < 1 or sub_batch_size < 1 or sub_batch_size % n_chunks:
        raise ValueError(f"sub_batch_size {sub_batch_size} is not a positive multiple of n_chunks {n_chunks}")
    if not 0 <= gain < float("inf"):
        raise ValueError(f"gain {gain} is not a finite number of at least 0")
    if tile < 1:
        raise ValueError(f"tile {tile} is not a positive number of rows")


def _slots(
    learner: Embeddings | None,
    reference: Embeddings | None,
    uids: noise.Uids,
    occurrences: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """uid words, occurrences and validity of each slot, on the embeddings' device; refuses shares that do not fit."""
    models = [model for model in (learner, reference) if model is not None]
    if not models:
        raise ValueError("neither the learner's nor the reference's embeddings are given")
    device = models[0].image.device
    for model in models:
        image, text = model.image, model.text
        if image.shape != text.shape or image.ndim != 2 or not image.shape[1]:
            raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} embeddings are not both (B, D)")
        if {image.dtype, text.dtype} - {torch.float16, torch.bfloat16, torch.float32}:
            raise ValueError(
                f"embeddings are {image.dtype} and {text.dtype}, not floating point of 16 or 32 bits; convert them"
            )
        if image.device != device or text.device != device:
            raise ValueError(f"embeddings lie on {device}, {image.device} and {text.device}: put them on one device")
        if len(model) != len(models[0]):
            raise ValueError(f"learner and reference embeddings differ in number: {len(models[0])} and {len(model)}")
    words = noise.uid_words(uids).to(device)
    times = torch.zeros(len(words), dtype=torch.int64) if occurrences is None else occurrences
    valid = torch.ones(len(words), dtype=torch.bool) if valid is None else valid
    n = len(models[0])
    if len(words) != n or times.shape != (n,) or valid.shape != (n,):
        raise ValueError(
            f"{n} embeddings, {len(words)} uids, {tuple(times.shape)} occurrences and {tuple(valid.shape)} valid flags:"
            " one of each per example"
        )
    if times.is_floating_point() or valid.dtype != torch.bool:
        raise ValueError(f"occurrences are {times.dtype} and valid is {valid.dtype}, not integers and booleans")
    return words, times.to(device, torch.int64), valid.to(device)


def _check_super_batch(conditional: ConditionalScores, valid: Tensor, sub_batch_size: int, learners: Learners) -> None:
    """Refuse, over all learners, what is not finite or not enough; a logit is finite where its embeddings are."""
    n_bad = (valid & ~torch.isfinite(conditional.matched)).sum()
    n_valid, n_bad = learners.sum(torch.stack([valid.sum(), n_bad])).tolist()
    if n_bad:
        raise Diverged(
            f"{n_bad} examples have NaN or infinite embeddings or logits: mask them with valid, or stop the run"
        )
    if n_valid < sub_batch_size:
        raise ValueError(f"sub_batch_size {sub_batch_size} exceeds the {n_valid} valid examples of the super-batch")
