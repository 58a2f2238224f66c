from itertools import combinations

import pytest
import torch

from jest_core import noise
from jest_core.selection import batch_score, gibbs_select
from jest_core.selection.arguments import uid_words
from jest_core.selection.learnability import pair_scores
from tests.core.selection.draws import (
    N_DRAWS,
    conditional_on,
    deviation,
    gumbel,
    model,
    pick,
    shares_of,
    uids,
    words_of,
)
from tests.synthetic import structured_models
from tests.synthetic import uids as synthetic_uids


def test_joint_draw_reaches_the_gibbs_plateau():
    """Figure 2: after 16 chunks at least 0.95 of what many single-site iterations reach, and rising with them.

    Measured above a uniform set's score, which is stricter than the ratio of scores. After six sweeps of single sites
    the score rises no more, at this size as at twice it. The standard error of the mean of eight draws is 0.5 %.
    """
    n, b = 256, 64
    learner, reference = structured_models(n, 32)
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randperm(n, generator=generator)[:b] for _ in range(30)]
    uniform = torch.stack([batch_score(learner, reference, members) for members in sets]).mean().item()
    members, trace = gibbs_select(
        learner, reference, sub_batch_size=b, n_iterations=8 * b, uids=synthetic_uids(n), seed=0, step=0
    )
    assert len(set(members.tolist())) == b
    assert trace[-1].item() == pytest.approx(batch_score(learner, reference, members).item(), rel=1e-5)
    before, plateau = (trace[part].mean().item() - uniform for part in (slice(5 * b, 6 * b), slice(6 * b, 8 * b)))
    assert before == pytest.approx(plateau, rel=0.02)
    reached = []
    for n_chunks in (1, 4, 16):
        scores = [
            pick(learner, reference, b, n_chunks=n_chunks, step=step, uids=synthetic_uids(n)).sub_batch_score
            for step in range(8)
        ]
        reached.append((sum(scores) / len(scores) - uniform) / plateau)
    assert reached[0] < reached[1] < reached[2]
    assert reached[2] >= 0.95


def gibbs_pairs(scores: torch.Tensor, words: torch.Tensor, step: int, n_iterations: int) -> torch.Tensor:
    """The Gibbs sampler of Figure 2 for sets of two, for all super-batches at once: (n_replicas, 2)."""
    members = gumbel(words, step, -1).topk(2).indices
    given = torch.stack([conditional_on(scores, k) for k in range(len(scores))])
    no_uid = torch.zeros(1, 2, dtype=torch.int64)
    for i in range(n_iterations):
        site = int(noise.hash_examples(no_uid, no_uid[0, :1], 0, step, i, -1) % 2)
        members[:, site] = (given[members[:, 1 - site]] + gumbel(words, step, i)).argmax(1)
    return members


def test_gibbs_sampling_is_stationary_at_the_set_scores():
    """Sets of two of four: after many sweeps, a set's share of the chains is proportional to exp(score).

    Sets drawn by their matched pairs alone have another distribution. As for `select`, 30 chains of 8 iterations equal
    those of the lines above exactly, and many chains of those lines have the distribution.
    """
    learner, reference = model(4, 3, 0, scale=3.0, bias=0.0), model(4, 3, 1, scale=3.0, bias=0.0)
    pair_matrix = pair_scores(learner, reference).double()
    words = uid_words(uids(4))[None]
    options = {"sub_batch_size": 2, "n_iterations": 8, "uids": uids(4), "seed": 0}
    for step in range(30):
        members, _ = gibbs_select(learner, reference, step=step, **options)
        assert members.tolist() == gibbs_pairs(pair_matrix, words, step, 8)[0].tolist()

    members = torch.cat([gibbs_pairs(pair_matrix, words_of(N_DRAWS // 40, 4), step, 20) for step in range(40)])
    shares = shares_of(members.sort(1).values, 4)
    pairs = torch.tensor(list(combinations(range(4), 2)))
    scores = torch.stack([batch_score(learner, reference, pair) for pair in pairs])
    expected = torch.softmax(scores.double(), 0)
    assert ((shares[pairs[:, 0], pairs[:, 1]] - expected).abs() < 5 * deviation(expected)).all()
    matched = pair_matrix.diagonal()
    independent = torch.softmax(matched[pairs].sum(1), 0)
    assert ((independent - expected).abs() > 10 * deviation(expected)).any()
