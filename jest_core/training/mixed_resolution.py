"""FlexiJEST: which examples of a sub-batch are trained at low resolution."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from jest_core import noise
from jest_core.noise import Purpose


def low_resolution(
    uids: Int[Tensor, "b 2"], occurrences: Int[Tensor, " b"], n: int, seed: int, step: int
) -> Bool[Tensor, " b"]:
    """Which n examples of a sub-batch are trained at low resolution: at random, and new in each step."""
    order = torch.argsort(noise.hash_examples(uids, occurrences, seed, step, Purpose.LOW_RESOLUTION), stable=True)
    chosen = torch.zeros(len(uids), dtype=torch.bool)
    chosen[order[:n]] = True
    return chosen
