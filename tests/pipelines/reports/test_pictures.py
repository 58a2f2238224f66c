"""Thumbnails of any bytes, and charts of any names."""

import base64
import io

import plotly.graph_objects as go
import pytest
from PIL import Image

from pipelines.reports import pictures


def shown(data: bytes | None) -> Image.Image:
    address = pictures.thumbnail(data)
    assert address.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind)
    return sink.getvalue()


def test_a_thumbnail_shows_the_whole_picture():
    wide = shown(encoded(Image.new("RGB", (128, 32), "red")))
    assert wide.size == (64, 64)
    assert [wide.getpixel((32, y)) for y in (0, 32, 63)] == [(0, 0, 0), (255, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize(
    "data",
    [
        None,
        b"no picture",
        encoded(Image.new("1", (12_000, 12_000))),
        encoded(Image.new("L", (1, 65_000))),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
        encoded(Image.new("RGB", (50, 50), "red"))[:-30],
    ],
    ids=["none", "text", "bomb", "thread", "program", "cut off"],
)
def test_what_does_not_decode_is_a_grey_thumbnail(data: bytes | None):
    assert shown(data).getcolors() == [(64 * 64, (200, 200, 200))]


def test_a_name_in_a_chart_is_neither_a_format_nor_the_end_of_its_script():
    name = "<b>a</b></script><a href='javascript:1'>"
    html = pictures.html(go.Figure(go.Bar(name=pictures.plain(name))), name)
    assert html.count("</script>") == html.count("<script")
    assert "<b>" not in html
    assert "<a " not in html
