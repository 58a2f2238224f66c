"""64 hashed bits of any number of integers, for arrays of NumPy and for tensors of PyTorch alike, with the same result.

No library's random generator takes part, so that no release of one can change a run's order or noise.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

Int64 = TypeVar("Int64", bound=Any)  # an array or a tensor of int64, on any device


def hashes(zero: Int64, keys: Iterable[Any]) -> Int64:
    """zero: an array of one 0, which says of what kind the result is; keys: Python integers, or arrays (B,)."""
    state = zero
    for key in keys:
        if isinstance(key, int):
            key = (key + 2**63) % 2**64 - 2**63  # as an int64
        state = _mix((state ^ key) - 0x61C8864680B583EB)  # plus the golden-ratio increment of SplitMix64
    return state


def shift(x: Int64, bits: int) -> Int64:
    """A logical shift to the right; int64 has only the arithmetic one."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Int64) -> Int64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    x = (x ^ shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    x = (x ^ shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ shift(x, 31)
