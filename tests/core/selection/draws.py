"""Helpers of the selection tests: small models and uids, `select` with defaults, and Algorithm 1 in a few lines."""

import math

import numpy as np
import torch
from torch.nn.functional import normalize

from jest_core import noise
from jest_core.selection import Embeddings, select


def model(n: int, width: int, seed: int, scale: float = 10.0, bias: float = -8.0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    image = normalize(torch.randn(n, width, generator=generator), dim=1)
    text = normalize(torch.randn(n, width, generator=generator) + image, dim=1)
    return Embeddings(image, text, scale, bias)


def uids(n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2**64, (n, 2), dtype=np.uint64)


def pick(learner, reference, b, **settings):
    n = len(learner if learner is not None else reference)
    defaults = {"n_chunks": 4, "uids": uids(n), "seed": 0, "step": 0}
    return select(learner, reference, sub_batch_size=b, **(defaults | settings))


def words_of(n_replicas: int, n: int) -> torch.Tensor:
    """uid words of small super-batches with the same scores and different uids: (n_replicas, n, 2)."""
    return torch.randint(-(2**63), 2**63 - 1, (n_replicas, n, 2), generator=torch.Generator().manual_seed(7))


def gumbel(words: torch.Tensor, *context: int) -> torch.Tensor:
    """Gumbel noise of each example: (n_replicas, n)."""
    flat = words.reshape(-1, 2)
    return noise.gumbel(flat, torch.zeros(len(flat), dtype=torch.int64), 0, *context).view(words.shape[:2])


def drawn_in_two_chunks(scores: torch.Tensor, words: torch.Tensor, step: int, second: int = 1) -> torch.Tensor:
    """Algorithm 1 with two chunks of one example, for all super-batches at once: (n_replicas, 2).

    second: the number of the chunk whose noise the second chunk is drawn with.
    """
    i = (scores.diagonal() + gumbel(words, step, 0)).argmax(1)
    given = torch.stack([conditional_on(scores, k) for k in range(len(scores))])
    return torch.stack([i, (given[i] + gumbel(words, step, second)).argmax(1)], 1)


def conditional_on(scores: torch.Tensor, i: int) -> torch.Tensor:
    out = scores.diagonal() + scores[i] + scores[:, i]
    out[i] = -math.inf
    return out


def shares_of(pairs: torch.Tensor, n: int) -> torch.Tensor:
    """Share of each ordered pair among all draws: (n, n)."""
    return torch.bincount(pairs[:, 0] * n + pairs[:, 1], minlength=n * n).view(n, n).double() / len(pairs)


# A test of a distribution has two halves. First, `select` draws exactly what the few lines here draw with the same
# noise, in each of N_EXACT steps: a fault that changes a share q of all draws is missed with probability (1 - q)^100,
# 0.6 % at q = 0.05. (Comparing 2,000 draws of `select` with the enumeration, as an earlier test did, detected a shift
# of one cell by 3.3 % only half of the time.) Second, N_DRAWS draws of those lines have the distribution that is
# claimed: each cell is within five standard deviations, 1.1 % at most, which chance exceeds once in a million cells.
N_EXACT, N_DRAWS = 100, 40_000


def deviation(p: torch.Tensor) -> torch.Tensor:
    return (p * (1 - p) / N_DRAWS).sqrt() + 1e-4
