"""How far scoring at low resolution agrees with scoring at full resolution."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def compare(
    low_scores: Float[Tensor, " B"],
    full_scores: Float[Tensor, " B"],
    low_indices: Int[Tensor, " b"],
    full_indices: Int[Tensor, " b"],
) -> dict[str, float]:
    """score_spearman: rank correlation of the matched-pair scores, -1..1. selection_overlap: share of one selection
    that is in the other, 0..1; two uniform ones share b / B."""
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
