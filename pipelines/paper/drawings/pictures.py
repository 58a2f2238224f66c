"""Rows of drawings to pictures: resvg, a background, lossless WebP, and the search for near copies.

Training pictures vary in background and ink by their uid, evaluation pictures are black on white.
"""

import colorsys
import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from . import packages
from .icons import Icons, load_icons
from .names import uniform
from .rows import Row

IMAGE_SIZE = 64
THUMBNAIL_SIZE = 12
NEAR_COPY_RMS = 4.0  # of 255, between thumbnails: below it two drawings are the same to the eye
N_ICONS_PER_BATCH, N_FILES_PER_BATCH = 500, 50


@dataclass(frozen=True)
class Picture:
    """A rendered row; without `webp`, `error` says why."""

    webp: bytes | None = None
    thumbnail: bytes = b""
    original_size: tuple[int, int] = (0, 0)
    error: str = ""


class WebP(TypedDict):
    """Pillow's options of the encoder."""

    lossless: bool
    method: int
    quality: int


def import_resvg() -> Any:
    try:
        import resvg
    except ImportError as error:
        raise ImportError("drawing SVG needs resvg: pip install 'jest[drawings]'") from error
    return resvg


def batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def render_rows(rows: list[Row], tier: str, raw: Path, n_workers: int | None) -> dict[str, Picture]:
    """uid -> picture, from worker processes, since a drawing that resvg gives up on must not end the build."""
    # whole files are slower than icons, so they go first; icons stay with their set, so a worker reads it once
    work: list[list[Row]] = []
    for prefix, members in groupby(sorted(rows, key=lambda row: row.prefix), key=lambda row: row.prefix):
        work += batches(list(members), N_ICONS_PER_BATCH if prefix else N_FILES_PER_BATCH)
    pictures: dict[str, Picture] = {}
    context = get_context("spawn")
    with ProcessPoolExecutor(n_workers or os.cpu_count(), mp_context=context, initializer=_mute_stderr) as pool:
        for batch, results in zip(work, pool.map(partial(_render_batch, tier, raw), work), strict=True):
            pictures |= {row.uid: picture for row, picture in zip(batch, results, strict=True)}
    return pictures


def _mute_stderr() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # resvg writes a trace for every drawing it gives up on


def _render_batch(tier: str, raw: Path, rows: list[Row]) -> list[Picture]:
    plan = packages.load_sources()["tiers"][tier]
    webp = WebP(lossless=True, method=plan["webp_method"], quality=plan["webp_quality"])
    return [_render(row, tier, raw, webp) for row in rows]


def _render(row: Row, tier: str, raw: Path, webp: WebP) -> Picture:
    try:
        drawing, original_size, background = draw(row, tier, raw, IMAGE_SIZE)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # resvg's panics derive from BaseException alone
        return Picture(error=f"drawing failed: {type(error).__name__}")
    image = on_background(drawing, background, IMAGE_SIZE)
    if int(np.ptp(np.asarray(image), axis=(0, 1)).max()) < 12:
        return Picture(error="blank drawing")
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", **webp)
    # copies are looked for in black on white: random colours would hide them
    plain = drawing if row.has_palette else Image.merge("LA", (Image.new("L", drawing.size), drawing.getchannel("A")))
    thumbnail = on_background(plain.convert("RGBA"), (255, 255, 255), IMAGE_SIZE)
    thumbnail = thumbnail.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    return Picture(encoded.getvalue(), thumbnail.tobytes(), original_size)


def draw(row: Row, tier: str, raw: Path, size: int) -> tuple[Image.Image, tuple[int, int], tuple[int, int, int]]:
    """A row's drawing, RGBA and at most size pixels a side, the size it was made for, and the colour it lies on."""
    background, ink = _colours(row)
    if row.prefix:
        icons = load_icons(raw, tier, row.prefix)
        return *_draw_icon(icons, row.name, ink, size), background
    return *_draw_file(raw / row.name, size), background


def _colours(row: Row) -> tuple[tuple[int, int, int], str]:
    """Background, and the ink of one-colour icons: plain for evaluation, varied by uid for training."""
    if row.split.startswith("eval-"):
        return (255, 255, 255), "#000000"
    choice, hue, depth, saturation, ink_hue = (uniform(row.uid, i) for i in range(5))
    is_dark = choice >= 0.85 and not row.has_palette
    lightness = 0.08 + 0.2 * depth if is_dark else 0.82 + 0.16 * depth
    background = (1.0, 1.0, 1.0) if choice < 0.4 else colorsys.hls_to_rgb(hue, lightness, 0.6 * saturation)
    ink = colorsys.hls_to_rgb(ink_hue, 0.85 if is_dark else 0.05 + 0.35 * depth, 0.8 * hue)
    red, green, blue = (round(255 * value) for value in background)
    return (red, green, blue), "#" + "".join(f"{round(255 * value):02x}" for value in ink)


def _draw_icon(icons: Icons, name: str, ink: str, size: int) -> tuple[Image.Image, tuple[int, int]]:
    icon = icons["icons"][name]
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    pad = 0.04 * max(width, height)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" color="{ink}" '
        f'viewBox="{left - pad} {top - pad} {width + 2 * pad} {height + 2 * pad}">{icon["body"]}</svg>'
    )
    return _draw_svg(svg), (round(width), round(height))


def _draw_file(path: Path, size: int) -> tuple[Image.Image, tuple[int, int]]:
    if path.suffix == ".png":
        image = Image.open(path).convert("RGBA")
        original = image.size
    else:
        svg = path.read_text(encoding="utf-8", errors="replace")
        usvg = import_resvg().usvg
        original = usvg.Tree.from_str(svg, usvg.Options.default()).int_size()
        # drawing it at about the size wanted is far faster than shrinking a poster, and sharper than a tiny original
        scale = 2 * size / max(original)
        svg = re.sub(r"<svg\b[^>]*>", lambda tag: _scaled_root(tag.group(), original, scale), svg, count=1)
        image = _draw_svg(svg)
        image = image.crop(image.getchannel("A").getbbox())  # many draw in one corner of an empty page
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return image, original


def _draw_svg(svg: str) -> Image.Image:
    resvg = import_resvg()
    tree = resvg.usvg.Tree.from_str(svg, resvg.usvg.Options.default())
    return Image.open(io.BytesIO(resvg.render(tree, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)))).convert("RGBA")


def _scaled_root(tag: str, size: tuple[int, int], scale: float) -> str:
    width, height = (max(1, round(side * scale)) for side in size)
    view_box = "" if "viewBox" in tag else f' viewBox="0 0 {size[0]} {size[1]}"'
    tag = re.sub(r"""\s(width|height)\s*=\s*("[^"]*"|'[^']*')""", "", tag)
    return tag.replace("<svg", f'<svg width="{width}" height="{height}"{view_box}', 1)


def on_background(drawing: Image.Image, colour: tuple[int, int, int], size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), colour)
    image.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2), drawing)
    return image


def near_copies(rows: list[Row], pictures: dict[str, Picture]) -> set[str]:
    """uids of evaluation rows that look like a training row: other vendors redraw, but some copy."""

    def thumbnails(members: list[Row]) -> np.ndarray:
        return np.stack([np.frombuffer(pictures[row.uid].thumbnail, np.uint8) for row in members]).astype(np.float32)

    drawn = [row for row in rows if pictures[row.uid].webp]
    training = thumbnails([row for row in drawn if not row.split.startswith("eval-")])
    norms = (training**2).sum(1)
    copies = set()
    for block in batches([row for row in drawn if row.split.startswith("eval-")], 256):
        held_out = thumbnails(block)
        nearest = (norms - 2 * held_out @ training.T).min(1) + (held_out**2).sum(1)
        is_copy = nearest / held_out.shape[1] < NEAR_COPY_RMS**2
        copies |= {row.uid for row, copied in zip(block, is_copy, strict=True) if copied}
    return copies
