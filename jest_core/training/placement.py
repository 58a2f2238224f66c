"""Which learner trains on which selected example.

Each learner trains on equally many examples, and as few as possible are sent from one learner to another.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from jest_core import noise


def spread(
    indices: Int[Tensor, " b"],
    uids: Int[Tensor, "b 2"],
    occurrences: Int[Tensor, " b"],
    offsets: Int[Tensor, " R"],
    rank: int,
) -> list[Int[Tensor, " k"]]:
    """For learner `rank`: positions in its share to send to each learner; the entry at `rank` is what it keeps.

    Each learner keeps its selected examples up to the quota b / n_learners. The surplus, in the order of a hash of the
    uids, goes to the learners that have fewer, in rank order. All learners compute the same plan. Raises ValueError
    where b is not a multiple of n_learners.
    """
    n_learners = len(offsets) - 1
    quota = len(indices) // n_learners
    if quota * n_learners != len(indices):
        raise ValueError(f"a sub-batch of {len(indices)} does not divide by {n_learners} learners")
    order = torch.argsort(noise.hash_examples(uids, occurrences), stable=True)
    indices = indices[order]
    owner = torch.bucketize(indices, offsets[1:], right=True)
    selected = [indices[owner == r] for r in range(n_learners)]
    surplus = torch.cat([some[quota:] for some in selected])
    target = torch.cat([torch.full((max(0, quota - len(some)),), r) for r, some in enumerate(selected)])
    low, high = offsets[rank], offsets[rank + 1]
    mine = (surplus >= low) & (surplus < high)
    return [
        (selected[rank][:quota] if r == rank else surplus[mine & (target.to(surplus.device) == r)]) - low
        for r in range(n_learners)
    ]
