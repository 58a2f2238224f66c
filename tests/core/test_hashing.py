import numpy as np
import torch

from jest_core import hashing


def test_numpy_and_pytorch_agree_and_both_give_what_they_always_gave():
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (3, 100), endpoint=True)
    context = [0, -1, 2**63, 2**64 + 5]
    ours = hashing.hashes(np.zeros(1, np.int64), [*context, *keys])
    theirs = hashing.hashes(torch.zeros(1, dtype=torch.int64), [*context, *torch.from_numpy(keys)])
    assert ours.dtype == np.int64
    assert ours.tolist() == theirs.tolist()
    assert len(set(ours.tolist())) == 100
    assert hashing.hashes(np.zeros(1, np.int64), [7, np.arange(2)]).tolist() == [
        -5137267319001854395,
        4414019431610648415,
    ]


def test_each_bit_of_a_key_changes_about_half_of_the_hash():
    keys = np.left_shift(np.int64(1), np.arange(64))
    bits = hashing.hashes(np.zeros(1, np.int64), [keys]) ^ hashing.hashes(np.zeros(1, np.int64), [0])
    flipped = [int(x & (2**64 - 1)).bit_count() for x in bits.tolist()]
    assert len(flipped) == 64
    assert 14 < min(flipped) <= max(flipped) < 50
    assert 30 < np.mean(flipped) < 34


def test_a_logical_shift_has_no_sign():
    assert hashing.shift(np.array([-1, 8]), 1).tolist() == [2**63 - 1, 4]


def test_splitmix64_matches_its_published_sequence():
    """The first outputs of SplitMix64 seeded with 0, from the reference implementation's stream."""
    state, mask, found = 0, 2**64 - 1, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & mask
        signed = np.array([state if state < 2**63 else state - 2**64])
        found.append(hashing._mix(signed).item() & mask)
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
