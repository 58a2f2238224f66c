import numpy as np
import torch

from jest_core import noise


def test_hash_does_not_depend_on_position():
    words = torch.randint(-(2**62), 2**62, (100, 2), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(100, dtype=torch.int64)
    whole = noise.hash_examples(words, times, 1, 2)
    order = torch.randperm(100)
    assert torch.equal(noise.hash_examples(words[order], times, 1, 2), whole[order])
    assert torch.equal(noise.hash_examples(words[:10], times[:10], 1, 2), whole[:10])


def test_every_key_changes_the_hash():
    words, times = torch.tensor([[1, 2]]), torch.tensor([0])
    values = {
        noise.hash_examples(words, times, 0, 0).item(),
        noise.hash_examples(words, times, 0, 1).item(),
        noise.hash_examples(words, times, 1, 0).item(),
        noise.hash_examples(words, times + 1, 0, 0).item(),
        noise.hash_examples(words.flip(1), times, 0, 0).item(),
        noise.hash_examples(words, times, 0).item(),
    }
    assert len(values) == 6


def test_uniform_and_gumbel_have_their_moments():
    n = 200_000
    words = torch.stack([torch.arange(n), torch.zeros(n, dtype=torch.int64)], 1)
    times = torch.zeros(n, dtype=torch.int64)
    u, g = noise.uniform(words, times, 7), noise.gumbel(words, times, 7)
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / n)
    assert abs(g.mean() - np.euler_gamma) < 5 * np.pi / np.sqrt(6 * n)
    assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 5 / np.sqrt(n)


def test_numpy_and_pytorch_hashes_agree_and_are_stable():
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (3, 100), endpoint=True)
    context = [0, -1, 2**63, 2**64 + 5]
    from_numpy = noise.hash_integers(np.zeros(1, np.int64), [*context, *keys])
    from_pytorch = noise.hash_integers(torch.zeros(1, dtype=torch.int64), [*context, *torch.from_numpy(keys)])
    assert from_numpy.dtype == np.int64
    assert from_numpy.tolist() == from_pytorch.tolist()
    assert len(set(from_numpy.tolist())) == 100
    assert noise.hash_integers(np.zeros(1, np.int64), [7, np.arange(2)]).tolist() == [
        -5137267319001854395,
        4414019431610648415,
    ]


def test_each_bit_of_a_key_changes_about_half_of_the_hash():
    keys = np.left_shift(np.int64(1), np.arange(64))
    bits = noise.hash_integers(np.zeros(1, np.int64), [keys]) ^ noise.hash_integers(np.zeros(1, np.int64), [0])
    flipped = [int(x & (2**64 - 1)).bit_count() for x in bits.tolist()]
    assert len(flipped) == 64
    assert 14 < min(flipped) <= max(flipped) < 50
    assert 30 < np.mean(flipped) < 34


def test_a_logical_shift_has_no_sign():
    assert noise.shift(np.array([-1, 8]), 1).tolist() == [2**63 - 1, 4]


def test_splitmix64_matches_its_published_sequence():
    """The first outputs of SplitMix64 seeded with 0, from the reference implementation's stream."""
    state, mask, outputs = 0, 2**64 - 1, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & mask
        signed = np.array([state if state < 2**63 else state - 2**64])
        outputs.append(noise._mix(signed).item() & mask)
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_permutations_are_stable_across_versions():
    assert noise.permutation(8, 3, noise.Purpose.ROWS, 0).tolist() == [2, 3, 0, 6, 4, 5, 1, 7]
    assert sorted(noise.permutation(1000, 3, 1).tolist()) == list(range(1000))
    assert noise.permutation(8, 4, noise.Purpose.ROWS, 0).tolist() != [2, 3, 0, 6, 4, 5, 1, 7]


def test_purposes_keep_the_numbers_of_earlier_versions():
    assert {purpose.name: int(purpose) for purpose in noise.Purpose} == {
        "ROW_GROUPS": 0,
        "ROWS": 1,
        "AUGMENTATION": 0x617567,
        "LOW_RESOLUTION": 0x6C6F77,
        "REFUSED": 0x726566,
        "FORWARD": 0x666F72,
    }


def test_seeds_of_forward_passes_are_stable_across_versions():
    """A run that another version began goes on with the masks of an undisturbed one."""
    assert noise.seed(0, 3, noise.Purpose.FORWARD, 0, 0) == 4186541904089367455
    assert len({noise.seed(0, step, noise.Purpose.FORWARD, rank, 0) for step in range(50) for rank in range(8)}) == 400
