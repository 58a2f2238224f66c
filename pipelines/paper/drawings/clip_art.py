"""Clip art and stamps, with the titles and tags of their collections."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_SVG_BYTES = 1_500_000  # a handful of traced posters take seconds each to draw and are gone at 64 pixels anyway


@dataclass(frozen=True)
class ClipArt:
    """One file of a clip-art collection; `path` is relative to the raw directory, `name` to the collection."""

    path: str
    name: str
    title: str
    description: str = ""
    tags: tuple[str, ...] = ()
    translations: tuple[tuple[str, str], ...] = ()  # (language, sentence)


def list_open_clip_art(raw: Path) -> Iterator[ClipArt]:
    """Open Clip Art Library: titles, descriptions and tags from each file's own metadata."""
    root = raw / "openclipart-svg/usr/share/openclipart/svg"
    for path in sorted(root.rglob("*.svg")):
        if not path.is_file() or path.stat().st_size > MAX_SVG_BYTES:
            continue
        svg = path.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"<metadata.*?</metadata>", svg, re.DOTALL)
        metadata = found.group() if found else ""
        yield ClipArt(
            path=path.relative_to(raw).as_posix(),
            name=path.relative_to(root).as_posix(),
            title=" ".join(_element_texts(metadata, "dc:title")[:1]),
            description=" ".join(_element_texts(metadata, "dc:description")[:1]),
            tags=tuple(filter(None, _element_texts(metadata, "rdf:li"))),
        )


def _element_texts(metadata: str, tag: str) -> list[str]:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", metadata, re.DOTALL)
    return [re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).strip() for text in texts]


def list_stamps(raw: Path) -> Iterator[ClipArt]:
    """Tux Paint's stamps: a sentence for each picture, and the same sentence in many languages."""
    root = raw / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
    for text_file in sorted(root.rglob("*.txt")):
        lines = text_file.read_text(encoding="utf-8", errors="replace").splitlines()
        pictures = [text_file.with_suffix(suffix) for suffix in (".png", ".svg")]
        picture = next((path for path in pictures if path.exists()), None)
        if picture is None or not lines or not lines[0].strip():
            continue
        translated = (re.match(r"([\w@]+)\.utf8=(.+)", line) for line in lines[1:])
        yield ClipArt(
            path=picture.relative_to(raw).as_posix(),
            name=picture.relative_to(root).as_posix(),
            title=lines[0].strip(),
            translations=tuple((match[1], match[2].strip()) for match in translated if match),
        )
