import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from jest_core.selection.agreement import compare, spearman


def test_rank_correlation_equals_scipys_with_and_without_ties():
    x, y = torch.randn(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x + y
    assert spearman(x, y) == pytest.approx(spearmanr(x.numpy(), y.numpy()).statistic)
    tied, other = (x * 2).round(), (y * 2).round()
    assert len(np.unique(tied)) < 20
    assert spearman(tied, other) == pytest.approx(spearmanr(tied.numpy(), other.numpy()).statistic)


def test_overlap_is_the_share_of_common_examples():
    scores = torch.arange(10.0)
    agreement = compare(scores, scores**3, torch.tensor([9, 8, 7, 6]), torch.tensor([6, 9, 1, 2]))
    assert agreement == {"score_spearman": pytest.approx(1.0), "selection_overlap": 0.5}
    assert compare(scores, -scores, torch.tensor([0]), torch.tensor([1]))["score_spearman"] == pytest.approx(-1.0)
