"""What pages are made of: thumbnails of examples, and charts as HTML."""

import base64
import io
from collections.abc import Sequence

import plotly.graph_objects as go
from PIL import Image

from jest_core.config import Run
from pipelines.catalogue import Catalogue

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


def tiles(
    run: Run, catalogue: Catalogue, rows: Sequence[tuple[int, int]], notes: Sequence[str]
) -> list[dict[str, str]]:
    """Thumbnail, caption and note of rows (shard, row of the shard)."""
    out = []
    for (number, row), note in zip(rows, notes, strict=True):
        shard = catalogue.place(number).open(run.data.columns)
        group, inside = 0, row
        while inside >= shard.row_group_sizes[group]:
            inside -= shard.row_group_sizes[group]
            group += 1
        image, caption = shard.images(group)[inside].as_py(), shard.captions(group)[inside]
        out.append({"image": thumbnail(image), "caption": caption, "score": note})
    return out


def thumbnail(data: bytes, side: int = 64) -> str:
    """A data URL of a small picture, decoded and encoded again."""
    with Image.open(io.BytesIO(data)) as image:
        picture = image.convert("RGB")
    picture.thumbnail((side, side))
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return "data:image/png;base64," + base64.b64encode(sink.getvalue()).decode()


def html(figure: go.Figure) -> str:
    figure.update_layout(template="plotly_white", margin={"l": 50, "r": 20, "t": 60, "b": 50})
    return str(
        figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False})
    )
