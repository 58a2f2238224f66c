import torch

from jest_core.examples.preprocess import augment


def test_augmentation_depends_on_the_example_and_the_step_alone():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    uids, times = torch.randint(0, 2**62, (8, 2), generator=generator), torch.zeros(8, dtype=torch.int64)
    settings = {"shift_pixels": 3, "colour": 0.2, "seed": 0}
    whole = augment(pixels, uids, times, step=1, **settings)
    torch.testing.assert_close(augment(pixels[3:5], uids[3:5], times[:2], step=1, **settings), whole[3:5])
    assert not torch.equal(augment(pixels, uids, times, step=2, **settings), whole)
    assert whole.min() >= 0
    assert whole.max() <= 255


def test_shift_moves_the_picture_and_repeats_its_edge():
    pixels = torch.arange(16, dtype=torch.uint8).expand(64, 3, 16, 16).contiguous()  # value = column
    uids = torch.arange(128).view(64, 2)
    out = augment(pixels, uids, torch.zeros(64, dtype=torch.int64), shift_pixels=3, colour=0.0, seed=0, step=0)
    shifts = out[:, 0, 8, 8] - 8
    assert set(shifts.tolist()) == {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
    for row, shift in zip(out[:, 0, 0], shifts, strict=True):
        assert row.tolist() == [min(15, max(0, c + shift)) for c in range(16)]


def test_no_augmentation_changes_nothing():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    out = augment(
        pixels,
        torch.zeros(2, 2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        shift_pixels=0,
        colour=0.0,
        seed=0,
        step=0,
    )
    assert torch.equal(out, pixels.float())
