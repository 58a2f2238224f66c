from importlib.resources import files

from jinja2 import Environment


def test_captions_stay_text():
    template = Environment(autoescape=True).from_string((files("pipelines") / "report.html.j2").read_text())
    tile = {"image": "data:,", "caption": "<script>alert(1)</script>", "score": "1.0"}
    grid = [("joint", [{"step": 0, "rows": [("selected", [tile])]}])]
    page = template.render(plotly="", headings=[], rows=[], charts=[], grids=grid)
    assert "<script>alert(1)</script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
