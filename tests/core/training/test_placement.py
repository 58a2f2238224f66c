import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jest_core.training.placement import spread


@settings(max_examples=60, deadline=None)
@given(shares=st.lists(st.integers(0, 20), min_size=1, max_size=5), quota=st.integers(1, 8), seed=st.integers(0, 5))
def test_every_learner_ends_with_its_quota_and_only_the_surplus_moves(shares, quota, seed):
    b, total = quota * len(shares), sum(shares)
    if b > total:
        return
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.cumsum(torch.tensor([0, *shares]), 0)
    indices = torch.randperm(total, generator=generator)[:b]
    uids = torch.randint(-(2**62), 2**62, (b, 2), generator=generator)
    plans = [spread(indices, uids, torch.zeros(b, dtype=torch.int64), offsets, rank) for rank in range(len(shares))]
    received = [
        torch.cat([plans[sender][r] + offsets[sender] for sender in range(len(shares))]) for r in range(len(shares))
    ]
    assert all(len(x) == quota for x in received)
    assert sorted(torch.cat(received).tolist()) == sorted(indices.tolist())
    n_drawn = [((indices >= offsets[r]) & (indices < offsets[r + 1])).sum().item() for r in range(len(shares))]
    moved = sum(len(plans[r][to]) for r in range(len(shares)) for to in range(len(shares)) if to != r)
    assert moved == sum(max(0, n - quota) for n in n_drawn)
