"""Thumbnails of examples, and charts as HTML, for pages."""

import base64
import html as escaped
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from jest_core.examples.decode import BadImage, View
from jest_core.run_file import Run

from ..data.catalogue import Catalogue
from ..data.shards import Shard

COLOURS = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#6cc5b0",
    "#3ca951",
    "#ff8ab7",
    "#a463f2",
    "#97bbf5",
    "#9c6b4e",
    "#9498a0",
)
_UNSAFE = 0.5  # a picture is blurred from this score on, of LAION's and DataComp's


@dataclass(frozen=True)
class Tile:
    """An example as pages show it. image: a data URL; score: the text before the caption."""

    image: str
    caption: str
    score: str
    unsafe: bool


@dataclass(frozen=True)
class Chart:
    """A chart of a page. description: what it shows, for those who do not see it."""

    title: str
    figure: go.Figure
    description: str = ""

    @property
    def html(self) -> str:
        return html(self.figure, self.description)


def tiles(run: Run, catalogue: Catalogue, rows: Sequence[tuple[int, int]], notes: Sequence[str]) -> list[Tile]:
    """Tiles of rows (shard, row of the shard), each with its note; each row group is read once."""
    out: dict[int, Tile] = {}
    for (number, group), wanted in catalogue.by_row_group(rows).items():
        shard = catalogue.place(number).open(run.data.columns)
        images, captions, unsafe = shard.images(group), shard.captions(group), _unsafe(shard, group)
        for row, i in wanted:
            out[i] = Tile(thumbnail(images[row].as_py()), captions[row], notes[i], unsafe[row])
    return [out[i] for i in range(len(rows))]


def _unsafe(shard: Shard, group: int) -> list[bool]:
    """Which rows a score or a label calls unsafe; none where there is neither."""
    flagged = [False] * shard.row_group_sizes[group]
    if shard.actual("unsafe"):
        flagged = [bool(score >= _UNSAFE) for score in shard.numbers(group, "unsafe")]
    if shard.actual("nsfw"):
        labels = shard.strings(group, "nsfw")
        flagged = [f or label.upper() in ("NSFW", "UNSURE") for f, label in zip(flagged, labels, strict=True)]
    return flagged


def thumbnail(data: bytes | None, side: int = 64) -> str:
    """A data URL of a small picture, decoded and encoded again within the bounds of those that are trained on; grey
    where it does not decode."""
    try:
        pixels = View(side, resize_mode="longest")(data)
    except BadImage:
        pixels = np.full((3, side, side), 200, np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(sink, "PNG")
    return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()


def plain(text: str) -> str:
    """Text for a chart, where Plotly would take <b> for a format and <a> for a link."""
    return escaped.escape(text, quote=False)


def html(figure: go.Figure, description: str = "") -> str:
    """A chart as HTML without its library; description: what it shows, for those who do not see it."""
    figure.update_layout(template="plotly_white", margin={"l": 50, "r": 20, "t": 60, "b": 50})
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False}
    )
    return f'<div role="img" aria-label="{escaped.escape(description, quote=True)}">{drawn}</div>'
