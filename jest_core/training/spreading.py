"""Which learner trains on which selected example: an even share each, moving as few as possible; and at which
resolution."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from jest_core import noise

_LOW_RESOLUTION = 0x6C6F77  # context of the keyed noise: "low"


def low_resolution(
    uids: Int[Tensor, "b 2"], occurrences: Int[Tensor, " b"], n: int, seed: int, step: int
) -> Bool[Tensor, " b"]:
    """Which n examples of a sub-batch are trained at low resolution: at random, anew in each step."""
    order = torch.argsort(noise.hashes(uids, occurrences, seed, step, _LOW_RESOLUTION), stable=True)
    chosen = torch.zeros(len(uids), dtype=torch.bool)
    chosen[order[:n]] = True
    return chosen


def spread(
    indices: Int[Tensor, " b"],
    uids: Int[Tensor, "b 2"],
    occurrences: Int[Tensor, " b"],
    offsets: Int[Tensor, " R"],
    rank: int,
) -> list[Int[Tensor, " k"]]:
    """For learner `rank`, positions in its own share to send to each learner; its own entry is what it keeps.

    Every learner keeps its selected examples up to the quota b / n_learners; the surplus, in the order of a hash of the
    uids, fills the learners that have fewer, in rank order. All learners compute the same plan.
    """
    n_learners = len(offsets) - 1
    quota = len(indices) // n_learners
    if quota * n_learners != len(indices):
        raise ValueError(f"a sub-batch of {len(indices)} does not divide by {n_learners} learners")
    order = torch.argsort(noise.hashes(uids, occurrences), stable=True)
    indices = indices[order]
    owner = torch.bucketize(indices, offsets[1:], right=True)
    held = [indices[owner == r] for r in range(n_learners)]
    surplus = torch.cat([h[quota:] for h in held])
    target = torch.cat([torch.full((max(0, quota - len(h)),), r) for r, h in enumerate(held)])
    low, high = offsets[rank], offsets[rank + 1]
    mine = (surplus >= low) & (surplus < high)
    return [
        (held[rank][:quota] if r == rank else surplus[mine & (target.to(surplus.device) == r)]) - low
        for r in range(n_learners)
    ]
