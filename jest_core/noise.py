"""Random numbers that belong to examples: a counter-based hash of (seed, step, ..., uid, occurrence).

No generator state exists, so an example draws the same number wherever it is held: on any learner, in any batch layout.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from jest_core import hashing

Uids = Tensor | NDArray[np.uint64] | Sequence[str]


def uid_words(uids: Uids) -> Int[Tensor, "B 2"]:
    """The two 64-bit halves of each uid, as int64; from (B, 2) uint64, or B strings of 32 hex digits."""
    if isinstance(uids, Tensor):
        words = uids.view(torch.int64) if uids.dtype == torch.uint64 else uids
    elif isinstance(uids, np.ndarray) and uids.dtype.kind in "iu":
        words = torch.from_numpy(np.ascontiguousarray(uids).view(np.int64))
    else:
        if bad := [u for u in uids if len(u) != 32]:
            raise ValueError(f"uid {bad[0]!r} does not have 32 hex digits")
        halves = np.array([(int(u[:16], 16), int(u[16:], 16)) for u in uids], dtype=np.uint64).reshape(-1, 2)
        words = torch.from_numpy(halves.view(np.int64))
    if words.ndim != 2 or words.shape[1] != 2:
        raise ValueError(f"uids have shape {tuple(words.shape)}, not (B, 2)")
    return words


def hashes(uids: Int[Tensor, "B 2"], occurrences: Int[Tensor, " B"], *context: int) -> Int[Tensor, " B"]:
    """64 hashed bits for each example; context is what the draw is for, such as (seed, step, chunk)."""
    zero = torch.zeros(1, dtype=torch.int64, device=uids.device)
    return hashing.hashes(zero, [*context, uids[:, 0], uids[:, 1], occurrences])


def uniform(uids: Int[Tensor, "B 2"], occurrences: Int[Tensor, " B"], *context: int) -> Float[Tensor, " B"]:
    """One number in the open interval (0, 1) for each example, float64."""
    return (hashing.shift(hashes(uids, occurrences, *context), 11).double() + 0.5) * 2.0**-53


def gumbel(uids: Int[Tensor, "B 2"], occurrences: Int[Tensor, " B"], *context: int) -> Float[Tensor, " B"]:
    """Standard Gumbel noise: the n largest of scores + noise are n draws without replacement, p ~ exp(score)."""
    return -torch.log(-torch.log(uniform(uids, occurrences, *context)))
