import io
import pickle
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib
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


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"])
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
        encode(picture(), "PPM"): "no_image",
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


def test_a_picture_that_is_large_between_resizing_rows_and_columns_is_refused_before_it_is_decoded():
    data = encode(Image.new("1", (100, 800_000)), "PNG")  # rows of 256 pixels would be 205 million
    for decoder in ("pillow", "simplejpeg"):
        assert status_labels(View(256, resize_mode="squash", decoder=decoder).batch([data])[1]) == ["too_large"]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + jpeg[2:]


def directory_of_overlapping_tags(n: int, size: int) -> bytes:
    """A TIFF directory as in EXIF: n tags, of which each has the same `size` bytes."""
    tags = b"".join(struct.pack("<HHII", 1000 + i, 1, size, 0) for i in range(n))
    return (b"II*\0" + struct.pack("<IH", 8, n) + tags).ljust(65_000, b"\0")


def bombs() -> dict[str, tuple[bytes, str]]:
    """Small files that would take gigabytes or minutes -> the status that each gets."""
    png, zeros = encode(picture(8, 8)), zlib.compress(bytes(20_000_000), 9)
    gif, webp = bytearray(encode(picture(8, 8), "GIF")), io.BytesIO()
    frame = gif.index(b"\x2c\0\0\0\0")
    gif[frame + 5 : frame + 9] = struct.pack("<HH", 60_000, 60_000)  # larger than the picture's screen
    picture(8, 8).save(webp, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8))], lossless=True)
    canvas = bytearray(webp.getvalue())
    place = canvas.index(b"VP8X") + 12
    canvas[place : place + 6] = struct.pack("<I", 16_382)[:3] * 2
    bmp = bytearray(encode(picture(8, 8), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, -60_000)
    return {
        "a row": (encode(Image.new("RGB", (65_500, 1)), "JPEG"), "too_large"),
        "a column": (encode(Image.new("L", (1, 65_500)), "PNG"), "too_large"),
        "a frame of a GIF": (bytes(gif), "too_large"),
        "the canvas of a WebP": (bytes(canvas), "too_large"),
        "a BMP of negative height": (bytes(bmp), "too_large"),
        "text": (png[:33] + png_chunk(b"iTXt", b"k\0\1\0\0\0" + zeros) + png[33:], "damaged"),
        "a colour profile": (png[:33] + png_chunk(b"iCCP", b"k\0\0" + zeros) + png[33:], "damaged"),
        "many texts": (
            png[:33] + png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6))) * 99 + png[33:],
            "damaged",
        ),
        "scans": (progressive(1_900), "too_large"),
    }


def progressive(n_scans: int) -> bytes:
    """A JPEG of a million pixels whose last scan comes n_scans times."""
    sink = io.BytesIO()
    Image.new("L", (1_000, 1_000), 100).save(sink, "JPEG", progressive=True)
    data = sink.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * n_scans + data[-2:]


def test_a_small_file_takes_neither_gigabytes_nor_minutes():
    files = bombs()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for kind, (data, status) in files.items():
        assert len(data) < 500_000
        for view in (View(256), View(512).smaller(256), View(256, decoder="simplejpeg")):
            assert status_labels(view.batch([data])[1]) == [status], kind
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 200_000 * (1 if sys.platform == "linux" else 1024)
    assert after.ru_utime - before.ru_utime < 10


@pytest.mark.filterwarnings("ignore:Tag data larger")
def test_what_looks_like_a_bomb_and_is_none_decodes():
    plain = encode(picture(), "JPEG")
    for data in (
        plain + b"\xff\xda" * 100_000,  # a film behind a picture, as telephones write them
        with_segment(plain, 0xE1, b"Exif\0\0" + directory_of_overlapping_tags(5_000, 60_000)),
    ):
        assert (View(16)(data) == View(16)(plain)).all()
    assert (View(16)(progressive(10)) == View(16)(progressive(1))).all()
    assert View(256)(encode(Image.new("L", (1_300, 1)))).shape == (3, 256, 256)


def test_large_pictures_are_decoded_one_at_a_time():
    large, small = encode(Image.new("L", (5_000, 5_000))), encode(picture())
    with ThreadPoolExecutor(1) as pool, decode._alone:  # as if another one were being decoded
        waiting = pool.submit(View(16), large)
        assert View(16)(small).any()
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
    assert waiting.result().shape == (3, 16, 16)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space of a process")
def test_a_picture_for_which_there_is_no_memory_has_a_status_and_the_next_one_decodes(tmp_path):
    """In a process of its own, which may take 100 MB more than it has."""
    (tmp_path / "large").write_bytes(encode(Image.new("L", (9_000, 9_000))))
    (tmp_path / "large.jpeg").write_bytes(encode(Image.new("L", (9_000, 9_000)), "JPEG"))
    (tmp_path / "small").write_bytes(encode(picture()))
    code = """
import resource, sys
from pathlib import Path
from jest_core.examples.decode import View
folder = Path(sys.argv[1])
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 100_000_000,) * 2)
for decoder in ("pillow", "simplejpeg"):
    view = View(16, decoder=decoder)
    print(*view.batch([(folder / name).read_bytes() for name in ("large", "large.jpeg")])[1])
print(*View(16).batch([(folder / "small").read_bytes()])[1])
"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    too_large = [str(int(SlotStatus.TOO_LARGE))] * 4
    assert out.stdout.split() == [*too_large, str(int(SlotStatus.OK))], out.stderr


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
