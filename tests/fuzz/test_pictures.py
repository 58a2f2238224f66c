"""Bytes of pictures -> pixels or BadImage: mutated, with other sizes in their headers, and of extreme shapes."""

import contextlib
import io
import resource
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.random import Generator
from PIL import Image

from jest_core.examples.decode import View
from tests.fuzz.harness import SIZES, fuzz, mutated, one_of

VIEWS = [
    View(32),
    View(24, resize_mode="longest", interpolation="bilinear"),
    View(24, resize_mode="squash", margin=0.875),
    View(48, reduced=True),
]
MODES = {
    "PNG": ("RGB", "RGBA", "L", "LA", "1", "P", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L", "1"),
}
# where the header has the width and the height, how they are written, and where the CRC of what follows the length is
_DIMENSIONS = {"PNG": (16, ">II"), "GIF": (6, "<HH"), "BMP": (18, "<ii"), "WEBP": (26, "<HH"), "JPEG": (0, ">HH")}
MAX_GROWTH_BYTES = 1_000_000_000


def encoded(width: int, height: int, mode: str, kind: str, **options: object) -> bytes:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).convert("I" if mode == "I;16" else mode).convert(mode).save(sink, kind, **options)
    return sink.getvalue()


@cache
def samples() -> list[tuple[str, bytes]]:
    """Small pictures of all formats that are read, and of some that are not."""
    plain = [(kind, encoded(37, 29, mode, kind)) for kind, modes in MODES.items() for mode in modes]
    frames = {"save_all": True, "append_images": [Image.new("RGB", (37, 29))]}
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    return [
        *plain,
        ("JPEG", encoded(64, 48, "RGB", "JPEG", progressive=True, exif=exif.tobytes(), icc_profile=b"none")),
        ("GIF", encoded(37, 29, "P", "GIF", **frames)),
        ("WEBP", encoded(37, 29, "RGBA", "WEBP", lossless=True, **frames)),
        ("PNG", encoded(37, 29, "RGB", "PNG", **frames)),
        ("TIFF", encoded(37, 29, "RGB", "TIFF")),
    ]


def make(rng: Generator) -> bytes:
    kind, data = one_of(samples(), rng)
    match int(rng.integers(4)):
        case 0 if kind in _DIMENSIONS:
            data = of_another_size(data, kind, rng)
        case 1 if kind == "PNG":
            data = with_other_chunks(data, rng)
        case 2 if rng.random() < 0.2:
            kind = one_of(list(MODES), rng)
            width = min(int(2 ** rng.uniform(0, 16)), 16_383 if kind == "WEBP" else 65_500)  # the most of WebP and JPEG
            size = [width, max(1, min(16_383, 40_000 // width))]
            rng.shuffle(size)
            data = encoded(*size, one_of(list(MODES[kind]), rng), kind)
        case _:
            data = mutated(data, rng, one_of(samples(), rng)[1])
    return data


def of_another_size(data: bytes, kind: str, rng: Generator) -> bytes:
    """The same picture with another width or height in its header, which its pixels do not fill."""
    place, form = _DIMENSIONS[kind]
    if kind == "JPEG":
        place = next(i for i in range(len(data)) if data[i : i + 2] in (b"\xff\xc0", b"\xff\xc2")) + 5
    largest = 2 ** (31 if form[1] in "Ii" else 16) - 1
    size = list(struct.unpack_from(form, data, place))
    size[int(rng.integers(2))] = min(largest, one_of([*SIZES, int(2 ** rng.uniform(0, 31))], rng))
    out = bytearray(data)
    struct.pack_into(form, out, place, *size)
    if kind == "PNG":
        struct.pack_into(">I", out, 29, zlib.crc32(out[12:29]))
    return bytes(out)


def with_other_chunks(data: bytes, rng: Generator) -> bytes:
    """A PNG whose chunks are dropped, repeated, exchanged or changed, each with its right checksum."""
    chunks, place = list[tuple[bytes, bytes]](), 8
    while place < len(data):
        (n,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + n]))
        place += 12 + n
    i, j = rng.integers(len(chunks), size=2)
    name, body = chunks[i]
    names = [b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"zTXt", b"iTXt", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"IEND"]
    match int(rng.integers(5)):
        case 0:
            del chunks[i]
        case 1:
            chunks.insert(j, (name, body))
        case 2:
            chunks[i], chunks[j] = chunks[j], chunks[i]
        case 3:
            chunks[i] = (name, mutated(body or b"0", rng))
        case 4:
            bomb = b"key\0\0" + zlib.compress(bytes(int(2 ** rng.uniform(0, 22))))
            chunks.insert(j, (one_of(names, rng), one_of([b"", body, rng.bytes(26), bomb], rng)))
    whole = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return data[:8] + b"".join(whole)


def check(data: bytes) -> None:
    """Pixels of a view's shape or a status, and the same status with both decoders."""
    view = VIEWS[len(data) % len(VIEWS)]
    (pixels,), status = view.batch([data])
    (others,), other_status = replace(view, decoder="simplejpeg").batch([data])
    assert status[0] == other_status[0]
    assert pixels.shape == others.shape == (3, view.image_size, view.image_size)
    assert pixels.dtype == others.dtype == np.uint8


def test_pictures():
    fuzz("pictures", 500, make, check)


def in_a_process() -> None:
    """Decode cases where a machine's memory cannot be had, and print how many more bytes the process came to use."""
    samples()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (8 * MAX_GROWTH_BYTES,) * 2)
    fuzz("memory", 150, make, check)
    unit = 1 if sys.platform == "darwin" else 1024
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)


def test_pictures_within_a_bound_of_memory():
    code = "from tests.fuzz import test_pictures; test_pictures.in_a_process()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr
    assert int(out.stdout) < MAX_GROWTH_BYTES
