import pytest
import torch

from jest_core.selection.algorithm import select
from jest_core.selection.anatomy import dissect
from jest_core.selection.learnability import pair_scores
from tests.synthetic import structured_models, uids


def test_dissected_parts_match_the_dense_score_matrix():
    learner, reference = structured_models(320, 16, seed=3)
    options = {"sub_batch_size": 64, "n_chunks": 4, "uids": uids(320), "seed": 1}
    anatomy = dissect(learner, reference, **options, step=2)
    matrix = pair_scores(learner, reference).double()
    chosen = select(learner, reference, **options, step=2)
    drawn = chosen.indices[chosen.chunk < 3]
    left = torch.tensor([i for i in range(320) if i not in set(drawn.tolist())])
    sums = (matrix[left][:, drawn] + matrix[drawn][:, left].T).sum(1)
    matched = matrix.diagonal()[left]
    assert anatomy.off_diagonal_share == pytest.approx(float(sums.var() / (sums.var() + matched.var())), rel=1e-4)
    assert anatomy.off_diagonal_deviation == pytest.approx(float(sums.std()), rel=1e-4)
    assert anatomy.joint == pytest.approx(float(matrix[chosen.indices][:, chosen.indices].sum() / 64), rel=1e-4)
    assert anatomy.joint > max(anatomy.independent, anatomy.uniform)
    assert 64 / 320 < anatomy.overlap < 1


def test_one_chunk_equals_independent_selection():
    learner, reference = structured_models(100, 8)
    options = {"uids": uids(100), "seed": 0, "step": 0}
    anatomy = dissect(learner, reference, sub_batch_size=20, n_chunks=1, **options)
    assert (anatomy.overlap, anatomy.off_diagonal_share) == (1, 0)
    assert anatomy.joint == anatomy.independent


def test_the_off_diagonal_share_grows_with_the_sub_batch():
    learner, reference = structured_models(2_000, 16, seed=1)
    shares = []
    for b in (16, 64, 400):
        part = slice(0, 5 * b)
        ids = uids(5 * b)
        options = {"sub_batch_size": b, "n_chunks": 4, "uids": ids, "seed": 0, "step": 0}
        shares.append(dissect(learner[part], reference[part], **options).off_diagonal_share)
    assert shares == sorted(shares)
