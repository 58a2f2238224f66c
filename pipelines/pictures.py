"""What pages are made of: thumbnails of examples, and charts as HTML."""

import base64
import io
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
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
    """Thumbnail, caption and note of rows (shard, row of the shard); each row group is read once."""
    inside = defaultdict(list)  # shard, row group -> rows of it, each with its place in `rows`
    for i, (number, row) in enumerate(rows):
        starts = np.cumsum([0, *catalogue.row_group_sizes(number)])
        group = int(np.searchsorted(starts, row, "right")) - 1
        inside[number, group].append((row - int(starts[group]), i))
    out: list[dict[str, str]] = [{} for _ in rows]
    for (number, group), wanted in inside.items():
        shard = catalogue.place(number).open(run.data.columns)
        images, captions = shard.images(group), shard.captions(group)
        for row, i in wanted:
            out[i] = {"image": thumbnail(images[row].as_py()), "caption": captions[row], "score": notes[i]}
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
