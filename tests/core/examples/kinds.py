"""Small pictures of every kind that the web has, and what each looks like to a person: (H, W, 3)."""

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps


@dataclass(frozen=True)
class Kind:
    """A file. seen: its pixels as a browser shows them in front of white; None: those of Pillow's conversion to RGB."""

    data: bytes
    seen: NDArray[np.uint8] | None = None


def photo(width: int, height: int) -> Image.Image:
    """Smooth, so that JPEG changes little, and without a symmetry."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)
    return sink.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(pixels: NDArray[np.uint16], colour_type: int) -> bytes:
    """A PNG of 16 bits, which Pillow writes of grey alone."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    end = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + end


def _on_white(picture: Image.Image) -> NDArray[np.uint8]:
    """img2dataset's formula."""
    rgba = np.asarray(picture.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    return np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def kinds(width: int = 32, height: int = 32) -> dict[str, Kind]:
    """By the words of deploy/docs/data-plane.md."""
    rgb = photo(width, height)
    fade = Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))
    rgba, la = rgb.copy(), rgb.convert("LA")
    rgba.putalpha(fade)
    la.putalpha(fade)
    palette = rgb.quantize(16)
    deep = np.asarray(rgb).astype(np.uint16) * 257
    grey = np.linspace(0, 65535, width * height).reshape(height, width).astype(np.uint16)
    cmyk = encoded(rgb.convert("CMYK"), "JPEG", quality=95)
    adobe = cmyk.index(b"Adobe") + 11
    see_through = encoded(palette, "PNG", transparency=bytes(range(0, 256, 16)))
    first_gone = encoded(palette, "GIF", transparency=0)

    def seen(data: bytes) -> NDArray[np.uint8]:
        return _on_white(Image.open(io.BytesIO(data)))

    def upright(data: bytes) -> NDArray[np.uint8]:
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))

    turned = {
        f"EXIF, {name}": encoded(rgb, kind, exif=_turned(6), **options)
        for name, kind, options in (("JPEG", "JPEG", {"quality": 95}), ("PNG", "PNG", {}), ("WebP", "WEBP", {}))
    }
    return {
        "RGB JPEG": Kind(encoded(rgb, "JPEG", quality=95)),
        "progressive JPEG": Kind(encoded(rgb, "JPEG", quality=95, progressive=True, subsampling=0)),
        "grey JPEG": Kind(encoded(rgb.convert("L"), "JPEG", quality=95)),
        "CMYK JPEG": Kind(cmyk),
        "YCCK JPEG": Kind(cmyk[:adobe] + b"\2" + cmyk[adobe + 1 :]),
        "RGB PNG": Kind(encoded(rgb, "PNG")),
        "grey PNG": Kind(encoded(rgb.convert("L"), "PNG")),
        "WebP": Kind(encoded(rgb, "WEBP")),
        "1 bit": Kind(encoded(rgb.convert("1"), "PNG")),
        "palette": Kind(encoded(palette, "PNG")),
        "palette with transparency": Kind(see_through, seen(see_through)),
        "GIF with transparency": Kind(first_gone, seen(first_gone)),
        "LA": Kind(encoded(la, "PNG"), _on_white(la)),
        "RGBA PNG": Kind(encoded(rgba, "PNG"), _on_white(rgba)),
        "RGBA WebP": Kind(encoded(rgba, "WEBP", lossless=True, exact=True), _on_white(rgba)),
        "16-bit RGB PNG": Kind(_png(deep, 2), (deep >> 8).astype(np.uint8)),
        "16-bit grey PNG": Kind(_png(grey, 0), np.stack([(grey >> 8).astype(np.uint8)] * 3, -1)),
        "16-bit grey TIFF": Kind(
            encoded(Image.fromarray(grey), "TIFF"), np.stack([(grey >> 8).astype(np.uint8)] * 3, -1)
        ),
    } | {name: Kind(data, upright(data)) for name, data in turned.items()}
