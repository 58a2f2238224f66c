"""Rows gathered by global position equal those of the whole tensor, bit for bit, for any shares and dtypes."""

import pytest
import torch

from jest_core.collectives import Learners, offsets_of
from tests.processes import run_learners

SHARES = {"uneven": (5, 2), "an empty one": (0, 7), "even": (4, 3)}


def whole() -> list[torch.Tensor]:
    """Tensors of 7 rows, of several types and shapes, with values that a sum could change."""
    numbers = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    numbers[2, 1], numbers[3, 0], numbers[6, 2] = -0.0, torch.nan, torch.inf
    return [
        numbers,
        numbers.bfloat16(),
        numbers[:, 0].double(),
        torch.arange(7) - 3,
        torch.arange(7).to(torch.uint8),
        torch.arange(7) % 2 == 0,
        torch.arange(28).reshape(7, 2, 2),
    ]


def _rows(rank: int, size: int, group, shares: tuple[int, ...], positions: list[int]) -> list[torch.Tensor]:
    offsets = offsets_of(shares)
    mine = [x[offsets[rank] : offsets[rank + 1]] for x in whole()]
    return Learners(group).rows_at(mine, torch.tensor(positions, dtype=torch.int64), offsets)


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("positions", [[6, 0, 3, 2, 3], [4], []], ids=["some", "one", "none"])
def test_rows_at_global_positions_are_those_of_the_whole_tensors(shares, positions):
    for rows in run_learners(_rows, 2, shares, positions):
        for row, x in zip(rows, whole(), strict=True):
            expected = x[positions]
            assert (row.dtype, row.shape) == (expected.dtype, expected.shape)
            bits = [y.reshape(len(positions), -1).contiguous().view(torch.uint8) for y in (row, expected) if positions]
            assert not positions or torch.equal(*bits)


def test_one_process_has_all_rows():
    rows = Learners().rows_at(whole(), torch.tensor([4, 1]), torch.tensor([0, 7]))
    assert all(torch.equal(row, x[[4, 1]]) for row, x in zip(rows, whole(), strict=True))
