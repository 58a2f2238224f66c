import io
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from jest_core import preprocess
from jest_core.preprocess import BadImage, View, augment, normalise
from jest_core.tables import SLOT_STATUS

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def encode(picture: Image.Image, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind)
    return sink.getvalue()


def picture(width: int = 50, height: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(50, 70), (32, 32), (100, 20)])
def test_view_then_normalise_is_open_clips_transform(size: tuple[int, int]):
    image = picture(*size)
    expected = image_transform(32, is_train=False, mean=MEAN, std=STD)(image)
    pixels, status = View(32).batch([encode(image)])
    assert not status.any()
    torch.testing.assert_close(normalise(torch.from_numpy(pixels), MEAN, STD)[0].contiguous(), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats_and_modes_decode(kind: str):
    for mode in ("RGB", "L", "P"):
        data = encode(picture().convert(mode).convert("RGB" if kind == "JPEG" else mode), kind)
        assert View(16)(data).shape == (3, 16, 16)


def test_bad_bytes_are_told_by_reason_and_never_raise(monkeypatch: pytest.MonkeyPatch):
    good = encode(picture(), "JPEG")
    cases = {
        None: "missing",
        b"": "missing",
        b"not an image": "no_image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n": "no_image",  # Pillow would run Ghostscript
        good[: len(good) // 2]: "damaged",
        b"\xff\xd8\xff" + bytes(50): "no_image",
        encode(picture(), "TIFF"): "no_image",
    }
    with ThreadPoolExecutor(2) as pool:
        for pixels, status in (View(16).batch([good, *cases]), View(16).batch([good, *cases], pool)):
            assert [SLOT_STATUS[i] for i in status] == ["ok", *cases.values()]
            assert not pixels[1:].any()
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 1000)
    with pytest.raises(BadImage, match="too_large"):  # a decompression bomb
        View(16)(good)


def test_a_name_that_lies_about_the_format_does_not_matter():
    assert View(16)(encode(picture(), "PNG")).shape == (3, 16, 16)  # a .jpg that is a PNG: told by its bytes


def test_a_bomb_of_few_bytes_costs_no_memory():
    data = encode(Image.new("1", (12_000, 12_000)))  # 144 million pixels
    assert len(data) < 200_000
    tracemalloc.start()
    with pytest.raises(BadImage, match="too_large"):
        View(16)(data)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_the_reduced_view_is_nearly_the_whole_one():
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    data = encode(smooth.resize((512, 384), Image.Resampling.BICUBIC), "JPEG")
    whole, reduced = View(64)(data).astype(float), View(64, reduced=True)(data).astype(float)
    assert whole.shape == reduced.shape
    assert np.abs(whole - reduced).mean() < 1.5  # of 255
    sharp = encode(picture(30, 40), "JPEG")  # smaller than the view: nothing to reduce
    assert (View(64)(sharp) == View(64, reduced=True)(sharp)).all()


def test_augmentation_belongs_to_the_example():
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
