import io
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image

from jest_core.examples import decode
from jest_core.examples.decode import BadImage, View
from jest_core.examples.preprocess import normalise
from jest_core.tables import SlotStatus, status_labels

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def encode(picture: Image.Image, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind)
    return sink.getvalue()


def picture(width: int = 50, height: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    size=st.sampled_from([32, 33, 48]),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
@settings(max_examples=150, deadline=None)
def test_the_view_equals_open_clips_transform(width: int, height: int, size: int, mode: str, interpolation: str):
    image, options = picture(width, height), {"resize_mode": mode, "interpolation": interpolation}
    whole = image_transform(size, is_train=False, mean=MEAN, std=STD, **options)
    ours = View(size, **options)
    try:
        expected = whole(image)
    except ValueError:  # the picture is so thin that a side is resized to zero
        with pytest.raises(BadImage, match="damaged"):
            ours(encode(image))
        return
    pixels, status = ours.batch([encode(image)])
    assert not status.any()
    torch.testing.assert_close(normalise(torch.from_numpy(pixels), MEAN, STD)[0].contiguous(), expected)
    steps = [step for step in whole.transforms[:-2] if not hasattr(step, "__name__")]
    # the representation is part of a score cache's fingerprint
    assert repr(ours) == "; ".join(" ".join(repr(step).split()) for step in steps)


def test_a_margin_is_cut_off_after_open_clips_transform():
    image = picture(90, 70)
    whole = image_transform(37, is_train=False)
    wide = image
    for step in whole.transforms[:-2]:
        wide = step(wide)
    pixels = View(32, margin=0.875)(encode(image))
    assert (pixels == np.asarray(wide).transpose(2, 0, 1)[:, 2:34, 2:34]).all()
    assert repr(View(32, margin=0.875)).endswith("MaybeConvertMode(); CenterCrop(size=(32, 32))")


def test_unknown_settings_are_refused_at_construction():
    with pytest.raises(ValueError, match="resize_mode is shortest, longest or squash, and not 'middle'"):
        View(32, resize_mode="middle")
    with pytest.raises(ValueError, match="interpolation is bicubic or bilinear, and not 'random'"):
        View(32, interpolation="random")


def test_a_view_can_be_pickled():
    assert pickle.loads(pickle.dumps(View(32).smaller(16))) == View(16, reduced=True)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats_and_modes_decode(kind: str):
    for mode in ("RGB", "L", "P"):
        data = encode(picture().convert(mode).convert("RGB" if kind == "JPEG" else mode), kind)
        assert View(16)(data).shape == (3, 16, 16)


def test_bad_images_get_a_status_instead_of_an_exception(monkeypatch: pytest.MonkeyPatch):
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
            assert status_labels(status) == ["ok", *cases.values()]
            assert not pixels[1:].any()
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    with pytest.raises(BadImage, match="too_large"):  # a decompression bomb
        View(16)(good)


def test_the_format_is_detected_from_the_bytes():
    assert View(16)(encode(picture(), "PNG")).shape == (3, 16, 16)  # whatever the suffix of its name


def test_a_decompression_bomb_is_refused_without_allocating_memory():
    data = encode(Image.new("1", (12_000, 12_000)))  # 144 million pixels
    assert len(data) < 200_000
    tracemalloc.start()
    with pytest.raises(BadImage, match="too_large"):
        View(16)(data)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_reduced_decoding_is_close_to_full_decoding():
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    data = encode(smooth.resize((512, 384), Image.Resampling.BICUBIC), "JPEG")
    whole, reduced = View(64)(data).astype(float), View(64, reduced=True)(data).astype(float)
    assert whole.shape == reduced.shape
    assert np.abs(whole - reduced).mean() < 1.5  # of 255
    sharp = encode(picture(30, 40), "JPEG")  # smaller than the view, so that it is not reduced
    assert (View(64)(sharp) == View(64, reduced=True)(sharp)).all()


def test_a_bad_image_error_keeps_its_status_when_pickled():
    error = pickle.loads(pickle.dumps(BadImage(SlotStatus.NO_IMAGE)))
    assert (error.status, str(error)) == (SlotStatus.NO_IMAGE, "no_image")
