"""The distribution of what `select` draws, compared with the enumeration of all draws of two."""

import torch

from jest_core.selection import Embeddings
from jest_core.selection.arguments import uid_words
from jest_core.selection.learnability import pair_scores
from tests.core.selection.draws import (
    N_DRAWS,
    N_EXACT,
    conditional_on,
    deviation,
    drawn_in_two_chunks,
    model,
    pick,
    shares_of,
    uids,
    words_of,
)


def test_distribution_of_a_small_draw_equals_enumeration():
    """Two chunks of one: P(i, j) = p_i * p(j | i), each a softmax of Algorithm 1's scores; independent draws differ."""
    learner, reference = model(4, 3, 0, scale=3.0, bias=0.0), model(4, 3, 1, scale=3.0, bias=0.0)
    scores = pair_scores(learner, reference).double()
    words = uid_words(uids(4))[None]
    for step in range(N_EXACT):
        indices = pick(learner, reference, 2, n_chunks=2, step=step).indices
        assert indices.tolist() == drawn_in_two_chunks(scores, words, step)[0].tolist()

    drawn = torch.cat([drawn_in_two_chunks(scores, words_of(N_DRAWS // 20, 4), step) for step in range(20)])
    first = torch.softmax(scores.diagonal(), 0)
    expected = torch.stack([first[i] * torch.softmax(conditional_on(scores, i), 0) for i in range(4)])
    assert ((shares_of(drawn, 4) - expected).abs() < 5 * deviation(expected)).all()
    independent = (first[:, None] * first / (1 - first[:, None])).fill_diagonal_(0.0)
    assert ((independent - expected).abs() > 10 * deviation(expected)).sum() >= 2


def test_noise_shared_by_the_chunks_would_be_another_distribution():
    """Of three examples, 0 and 1 are likely to be first. 2 fits both, so that the second draw is even. With the noise
    of the first draw, the one of 0 and 1 that lost would lose too often, as it lost because of its small noise."""
    logits = torch.tensor([[-3.0, -6.0, 1.25], [-6.0, -3.0, 1.25], [1.25, 1.25, 3.0]])
    learner = Embeddings(torch.eye(3), logits.T.contiguous(), 1.0, 0.0)
    scores = pair_scores(learner, None, "hard").double()
    words_of_uids, n_alike = uid_words(uids(3))[None], 0
    for step in range(N_EXACT):
        indices = pick(learner, None, 2, n_chunks=2, criterion="hard", step=step).indices.tolist()
        assert indices == drawn_in_two_chunks(scores, words_of_uids, step)[0].tolist()
        n_alike += indices == drawn_in_two_chunks(scores, words_of_uids, step, second=0)[0].tolist()
    assert n_alike < N_EXACT

    words = words_of(N_DRAWS // 20, 3)
    fresh, shared = (
        shares_of(torch.cat([drawn_in_two_chunks(scores, words, step, second) for step in range(20)]), 3)
        for second in (1, 0)
    )
    first = torch.softmax(scores.diagonal(), 0)
    expected = torch.stack([first[i] * torch.softmax(conditional_on(scores, i), 0) for i in range(3)])
    assert ((fresh - expected).abs() < 5 * deviation(expected)).all()
    assert ((shared - expected).abs() > 10 * deviation(expected)).any()
