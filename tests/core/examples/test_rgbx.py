"""Pixels of the decoder `simplejpeg`, against Pillow's and open_clip's."""

import io
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image, ImageOps

from jest_core.examples import rgbx
from jest_core.examples.decode import BadImage, View
from jest_core.tables import SlotStatus
from tests.core.examples.kinds import encoded, kinds, photo

FAST = {"decoder": "simplejpeg"}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    mode=st.sampled_from(["RGB", "L"]),
    subsampling=st.sampled_from([0, 1, 2]),
    quality=st.sampled_from([5, 75, 90, 100]),
    progressive=st.booleans(),
    restarts=st.sampled_from([0, 3]),
)
@settings(max_examples=60, deadline=None)
def test_jpegs_have_the_very_pixels_of_pillow(width, height, mode, subsampling, quality, progressive, restarts):
    options = {"quality": quality, "progressive": progressive, "restart_marker_blocks": restarts}
    if mode == "RGB":
        options["subsampling"] = subsampling
    data = encoded(noise(width, height).convert(mode), "JPEG", **options)
    assert rgbx.jpeg_size(data) == (width, height)
    pixels = rgbx.of_jpeg(data, (width, height))
    assert (pixels[..., :3] == rgb(data)).all()


def test_what_is_not_decoded_as_a_jpeg_is_left_to_pillow():
    picture = noise(20, 20)
    good = encoded(picture, "JPEG")
    for data in (encoded(picture, "PNG"), encoded(picture.convert("CMYK"), "JPEG"), b"\xff\xd8\xff" + bytes(50)):
        assert rgbx.jpeg_size(data) is None
    assert rgbx.of_jpeg(good[:-100], (20, 20)) is None


@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    margin=st.sampled_from([1.0, 0.875]),
)
@settings(max_examples=60, deadline=None)
def test_resized_pictures_are_nearly_those_of_pillow(width, height, mode, interpolation, margin):
    """The view of one decoder against that of the other: on a smooth picture they differ by rounding. On noise, the
    worst case, also where Pillow resizes the height first (since release 13, of some tall pictures): values are cut to
    0..255 between the passes."""
    options = {"resize_mode": mode, "interpolation": interpolation, "margin": margin}
    for picture, most, mean in ((photo(width, height), 2, 0.2), (noise(width, height), 255, 1.0)):
        data = encoded(picture, "PNG")
        try:
            expected = View(32, **options)(data).astype(int)
        except BadImage as error:
            with pytest.raises(BadImage, match=str(error)):
                View(32, **options, **FAST)(data)
            return
        difference = np.abs(View(32, **options, **FAST)(data) - expected)
        assert difference.max() <= most
        assert difference.mean() < mean


def test_pictures_of_every_kind_against_open_clips_transform():
    """The table of deploy/docs/data-plane.md. Of the view's size: nothing is resized, and colours alone can differ."""
    transform = image_transform(32, is_train=False)
    differ = set()
    for name, kind in kinds().items():
        picture = Image.open(io.BytesIO(kind.data))
        for step in transform.transforms[:-2]:
            picture = step(picture)
        of_open_clip = np.asarray(picture).transpose(2, 0, 1)
        assert (View(32)(kind.data) == of_open_clip).all(), name
        ours = View(32, **FAST)(kind.data)
        expected = of_open_clip if kind.seen is None else kind.seen.transpose(2, 0, 1)
        assert (ours == expected).all(), name
        if (ours != of_open_clip).any():
            differ.add(name)
    assert differ == {
        "palette with transparency",  # on white, as img2dataset shows what is transparent
        "GIF with transparency",
        "LA",
        "RGBA PNG",
        "RGBA WebP",
        "16-bit grey PNG",  # scaled: Pillow makes white of all above 255
        "16-bit grey TIFF",
        "EXIF, JPEG",  # upright
        "EXIF, PNG",
        "EXIF, WebP",
    }


def test_open_clip_resizes_palettes_and_bits_by_nearest_neighbour_and_both_decoders_by_the_interpolation():
    transform = image_transform(32, is_train=False)
    for name, kind in kinds(90, 60).items():
        picture = Image.open(io.BytesIO(kind.data))
        for step in transform.transforms[:-2]:
            picture = step(picture)
        of_open_clip = np.asarray(picture).transpose(2, 0, 1).astype(int)
        of_pillow, ours = View(32)(kind.data), View(32, **FAST)(kind.data)
        if name in ("1 bit", "palette"):
            assert np.abs(of_pillow - of_open_clip).mean() > 3
        if kind.seen is None:
            assert np.abs(ours - of_pillow.astype(int)).max() <= 2, name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(40, 24), "JPEG", exif=exif.tobytes())
    picture = Image.open(io.BytesIO(data))
    expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    assert (rgbx.upright(rgb(data), orientation) == expected).all()
    turned = encoded(Image.fromarray(expected), "PNG")
    assert (View(24, **FAST)(data) == View(24)(turned)).all()
    reduced = View(8, reduced=True, resize_mode="squash", **FAST)(data).astype(int)
    assert np.abs(reduced - View(8, resize_mode="squash")(turned)).mean() < 3


def test_the_bands_of_a_large_picture_and_parts_of_a_picture_have_its_pixels(monkeypatch):
    picture = noise(37, 29)
    whole = np.asarray(picture)
    monkeypatch.setattr(rgbx, "_BAND", 100)
    pixels = rgbx.of_rgb(picture)
    assert (pixels[..., :3] == whole).all()
    planes = np.zeros((3, 20, 20), np.uint8)
    for part in (pixels, pixels[::-1, ::-1], pixels.swapaxes(0, 1), rgbx.resized(pixels, 30, 40, "bilinear")):
        rgbx.to_planes(part[3:23, 5:25], planes)
        assert (planes == part[3:23, 5:25, :3].transpose(2, 0, 1)).all()


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    seed=st.integers(0, 9),
)
@example(shape=(2000, 700), width=130, height=224, interpolation="bicubic", seed=0)  # in blocks of rows
@example(shape=(3, 70_000), width=224, height=5, interpolation="bicubic", seed=0)  # a row is more than a block
@settings(deadline=None, max_examples=300)
def test_resized_pixels_are_those_of_pytorch(shape, width, height, interpolation, seed):
    """Noise of the two extremes, at whose edges filters overshoot most; and turned, so that rows are strided."""
    pixels = (np.random.default_rng(seed).integers(0, 2, (*shape[::-1], 4), np.uint8) * 255).swapaxes(0, 1)
    found = rgbx.resized(pixels, width, height, interpolation)
    assert found.shape == (height, width, 4)
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(planes, (height, width), mode=interpolation, antialias=True)
    off = np.abs(found - expected[0].permute(1, 2, 0).numpy().astype(int))
    assert off.max() <= 1
    if platform.machine() == "x86_64" and min(width, height) > 1 and shape[1] < 100 * width:
        assert not off.any()


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_a_line_that_would_have_no_width_is_damaged(decoder):
    """The longer side of 37 x 65,535 becomes 24, and the shorter one nothing."""
    data = encoded(Image.new("L", (37, 65_535)), "PNG")
    assert View(24, resize_mode="longest", decoder=decoder).batch([data])[1].tolist() == [SlotStatus.DAMAGED]


def damaged() -> list[bytes]:
    """JPEGs cut at every few bytes, and with bytes changed, dropped and doubled."""
    generator, out = np.random.default_rng(0), []
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encoded(noise(33, 25), "JPEG", exif=exif.tobytes(), **options)
        out += [data[:n] for n in range(0, len(data), 23)] + [data[:-1], data[:-2], data + b"film"]
        for _ in range(60):
            at = int(generator.integers(2, len(data)))
            byte = bytes([int(generator.integers(256))])
            out += [data[:at] + byte + data[at + 1 :], data[:at] + data[at + 1 :], data[:at] + byte + data[at:]]
    return out


def test_damaged_jpegs_have_the_same_status_with_both_decoders():
    """A cut one is damaged with both. libjpeg-turbo also fills what is missing with grey: not here."""
    images = damaged()
    of_pillow, its_status = View(25).batch(images)
    ours, status = View(25, **FAST).batch(images)
    assert (status == its_status).all()
    assert {SlotStatus.OK, SlotStatus.DAMAGED, SlotStatus.NO_IMAGE} <= set(status.tolist())
    assert (of_pillow.any((1, 2, 3)) == ours.any((1, 2, 3))).all()


def test_reading_starts_no_threads_and_does_not_import_pytorch():
    """In a process of its own, which may have many threads."""
    code = """
import io, os, platform, sys
import numpy as np
from PIL import Image
from jest_core.examples.decode import View
sink = io.BytesIO()
Image.fromarray(np.zeros((1024, 1024, 3), np.uint8)).save(sink, "JPEG")
n_threads = lambda: len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
View(1024, decoder="simplejpeg")(sink.getvalue())
before = n_threads()
View(700, decoder="simplejpeg")(sink.getvalue())
assert n_threads() == before, (before, n_threads())
assert platform.machine() == "aarch64" or "torch" not in sys.modules
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
