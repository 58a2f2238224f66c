import io
import struct
import time

import pytest
from PIL import Image

from jest_core.examples import exif
from tests.core.examples.kinds import encoded, photo


def block(order: str, *tags: tuple[int, int, int], n: int | None = None) -> bytes:
    """An EXIF block of (tag, type, value)."""
    listed = b"".join(struct.pack(f"{order}HHIHH", tag, kind, 1, value, 0) for tag, kind, value in tags)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + start + struct.pack(f"{order}IH", 8, len(tags) if n is None else n) + listed


@pytest.mark.parametrize("order", "<>")
def test_the_orientation_is_found_in_both_byte_orders(order):
    for value in range(1, 9):
        assert exif.orientation(block(order, (0x010F, 2, 0), (0x0112, 3, value))) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0II",
        b"nothing",
        block("<"),
        block("<", (0x0112, 3, 0)),
        block("<", (0x0112, 3, 9)),
        block("<", (0x0112, 7, 6)),
        block("<", (0x0111, 3, 6)),
        block("<", (0x0111, 3, 6), n=9),
        block("<", (0x0112, 3, 6))[:-8],
    ],
)
def test_a_block_that_says_nothing_leaves_a_picture_as_it_is(data):
    assert exif.orientation(data) == 1


def test_a_block_of_many_tags_takes_no_time():
    """Pillow's getexif copies for each of these tags the same 60 kB."""
    data = block("<", *[(1000 + i % 9, 7, 60_000) for i in range(5_000)])
    started = time.process_time()
    assert exif.orientation(data) == 1
    assert time.process_time() - started < 0.5


def test_the_block_of_a_jpeg_is_that_of_pillow():
    tags = Image.Exif()
    tags[0x0112] = 8
    for options in ({}, {"icc_profile": bytes(3_000)}, {"progressive": True, "comment": b"\xff\xe1Exif\0\0"}):
        data = encoded(photo(20, 10), "JPEG", exif=tags.tobytes(), **options)
        assert exif.of_jpeg(data) == Image.open(io.BytesIO(data)).info["exif"]
    for without in (b"", data[:2], encoded(photo(20, 10), "JPEG"), b"\xff\xd8" + b"\xff" * 50):
        assert exif.of_jpeg(without) == b""
