"""The one source of seeded numbers: a hash of integers, with the same bits in NumPy and in PyTorch.

A number belongs to a context, such as (seed, step, chunk), and to an example (uid, occurrence) or to a position. There
is no generator with a state, so an example draws the same number on any learner and in any order of a batch; and no
library's generator is used, so that no release of one can change a run. What is drawn, and by what:

    ties of equal scores; who sends a surplus example   ()                                  uid, occurrence
    selection, each chunk                               (seed, step, chunk)                 uid, occurrence
    Gibbs sampling: the first set; each iteration       (seed, step, -1 or the iteration)   uid, occurrence
    Gibbs sampling: the member that is drawn again      (seed, step, iteration, -1)         0, 0, 0
    augmentation, number i of an example                (seed, step, AUGMENTATION, i)       uid, occurrence
    examples trained at low resolution                  (seed, step, LOW_RESOLUTION)        uid, occurrence
    refused examples in the selection log               (seed, step, REFUSED)               uid, occurrence
    seed of PyTorch's generators in a forward pass      (seed, step, FORWARD, learner, number of the pass)
    order of the row groups in an epoch                 (seed, ROW_GROUPS, epoch)           position
    order of the rows in a window                       (seed, ROWS, epoch, stream, window) position

Fresh weights (`models.towers.create`), few shots (`evaluation.draw_shots`) and the uniform set of `selection.anatomy`
come from the generators of PyTorch and NumPy instead, as in open_clip and big_vision. So do the masks of dropout and
stochastic depth, which depend on what PyTorch runs on; their generators are seeded anew in each forward pass.

This module does not import PyTorch, as processes that only read examples do not need it.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # with which jaxtyping still checks shapes and element types

Int64 = TypeVar("Int64", bound=Any)  # a NumPy array or a PyTorch tensor of int64, on any device


class Purpose(IntEnum):
    """What a number is drawn for, as a part of its context."""

    ROW_GROUPS = 0
    ROWS = 1
    AUGMENTATION = 0x617567  # "aug"
    LOW_RESOLUTION = 0x6C6F77  # "low"
    REFUSED = 0x726566  # "ref"
    FORWARD = 0x666F72  # "for"


def hash_integers(zero: Int64, keys: Iterable[Any]) -> Int64:
    """64 hashed bits of each element of the keys, int64.

    zero: an array or tensor of one 0, which decides the kind and the device of the result. keys: Python integers of any
    size (taken modulo 2^64), or arrays or tensors (B,) of int64.
    """
    state = zero
    for key in keys:
        if isinstance(key, int):
            key = (key + 2**63) % 2**64 - 2**63  # as an int64
        state = _mix((state ^ key) - 0x61C8864680B583EB)  # plus the golden-ratio increment of SplitMix64
    return state


def hash_examples(uids: Int[Tensor, "B 2"], occurrences: Int[Tensor, " B"], *context: int) -> Int[Tensor, " B"]:
    """64 hashed bits of each example, int64. uids: the two halves of each, as int64."""
    zero = uids.new_zeros(1).long()
    return hash_integers(zero, [*context, uids[:, 0], uids[:, 1], occurrences])


def uniform(uids: Int[Tensor, "B 2"], occurrences: Int[Tensor, " B"], *context: int) -> Float[Tensor, " B"]:
    """One number of the open interval (0, 1) for each example, float64."""
    return (shift(hash_examples(uids, occurrences, *context), 11).double() + 0.5) * 2.0**-53


def gumbel(uids: Int[Tensor, "B 2"], occurrences: Int[Tensor, " B"], *context: int) -> Float[Tensor, " B"]:
    """Standard Gumbel noise: the n largest of scores + noise are n draws without replacement, p ~ exp(score)."""
    return -(-uniform(uids, occurrences, *context).log()).log()


def permutation(n: int, *context: int) -> NDArray[np.int64]:
    """The numbers 0 .. n - 1 in the order of their hashes."""
    positions = np.arange(n)
    keys = [*context, positions, positions, positions]  # in the places of an example's uid and occurrence
    return np.argsort(hash_integers(np.zeros(1, np.int64), keys), kind="stable")


def seed(*context: int) -> int:
    """64 hashed bits for a generator of another library, not negative."""
    return int(hash_integers(np.zeros(1, np.int64), context)[0]) % 2**63


def shift(x: Int64, bits: int) -> Int64:
    """A logical shift to the right; int64 has only the arithmetic one."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Int64) -> Int64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = (x ^ shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    x = (x ^ shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ shift(x, 31)
