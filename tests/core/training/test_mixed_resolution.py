import torch

from jest_core.training.mixed_resolution import low_resolution


def test_low_resolution_draws_an_exact_share_per_step_whatever_the_order():
    uids = torch.randint(-(2**62), 2**62, (1000, 2), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(1000, dtype=torch.int64)
    first, second = (low_resolution(uids, times, 500, 0, step) for step in (0, 1))
    assert first.sum() == second.sum() == 500
    assert 200 < (first & second).sum() < 300  # half of a half
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(low_resolution(uids[order], times, 500, 0, 0), first[order])
    assert not torch.equal(low_resolution(uids, times, 500, 1, 0), first)
    assert low_resolution(uids, times, 0, 0, 0).sum() == 0
