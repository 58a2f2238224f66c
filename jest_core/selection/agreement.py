"""Selection by scores at low resolution compared with selection by scores at full resolution (FlexiJEST)."""

from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Agreement(TypedDict, total=False):
    """Empty where it was not measured."""

    score_spearman: float  # rank correlation of the scores of matched pairs, -1..1
    selection_overlap: float  # share of one selection that is in the other, 0..1; b / B for two uniform ones


def compare(
    low_scores: Float[Tensor, " B"],
    full_scores: Float[Tensor, " B"],
    low_indices: Int[Tensor, " b"],
    full_indices: Int[Tensor, " b"],
) -> Agreement:
    """Scores of the matched pairs at both resolutions, and the positions of both selections -> how far they agree."""
    return {
        "score_spearman": spearman(low_scores, full_scores),
        "selection_overlap": torch.isin(low_indices, full_indices).double().mean().item(),
    }


def spearman(x: Float[Tensor, " B"], y: Float[Tensor, " B"]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, in which equal values share the mean of theirs."""
    return float(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1])


def _ranks(x: Tensor) -> Float[Tensor, " B"]:
    _, value, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2)[value].double()
