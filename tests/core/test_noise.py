import numpy as np
import torch

from jest_core import noise


def test_hash_does_not_depend_on_place():
    words = torch.randint(-(2**62), 2**62, (100, 2), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(100, dtype=torch.int64)
    whole = noise.hashes(words, times, 1, 2)
    order = torch.randperm(100)
    assert torch.equal(noise.hashes(words[order], times, 1, 2), whole[order])
    assert torch.equal(noise.hashes(words[:10], times[:10], 1, 2), whole[:10])


def test_every_key_matters():
    words, times = torch.tensor([[1, 2]]), torch.tensor([0])
    values = {
        noise.hashes(words, times, 0, 0).item(),
        noise.hashes(words, times, 0, 1).item(),
        noise.hashes(words, times, 1, 0).item(),
        noise.hashes(words, times + 1, 0, 0).item(),
        noise.hashes(words.flip(1), times, 0, 0).item(),
        noise.hashes(words, times, 0).item(),
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


def test_uid_forms_agree():
    hexes = ["0123456789abcdef" * 2, "f" * 32]
    words = noise.uid_words(hexes)
    array = np.array([[0x0123456789ABCDEF] * 2, [2**64 - 1] * 2], dtype=np.uint64)
    assert torch.equal(words, noise.uid_words(array))
    assert torch.equal(words, noise.uid_words(torch.from_numpy(array)))
