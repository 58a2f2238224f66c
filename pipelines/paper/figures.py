"""Results of the reproduction -> charts, tables, a page, and the README. Knows results.json and nothing of runs."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from statistics import mean
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from ..reports import pictures
from ..reports.comparison import cell

Results = Mapping[str, Any]
Scores = Mapping[str, Sequence[str]]  # label -> key and metric of eval_results.jsonl
_HEADLINE = "mean of four"
_LOGARITHMIC = {"type": "log", "tickvals": [4**i for i in range(1, 9)]}


def values(results: Results, name: str, score: str, scores: Scores) -> list[float]:
    """A score of a run's last checkpoint, in %, for each seed; `mean of four` is that of the first four scores."""
    return [v for record in _seeds(results, name) if (v := _at(record["checkpoints"][-1], score, scores)) is not None]


def table(spec: Mapping[str, Any], results: Results, scores: Scores) -> list[list[str]]:
    """Rows of text, the header first: a run a row, the mean over its seeds with their range, and what it cost."""
    own: Scores = spec.get("scores", scores)
    shown = [*([_HEADLINE] if own is scores else []), *own]
    rows = [["run", "seeds", *shown, "trained", "seen", "TFLOPs", "with reuse", "s"]]
    for name in runs_of(spec):
        records = _seeds(results, name, spec.get("seeds"))
        if not records:
            rows.append([name, "not run yet", *[""] * (len(shown) + 5)])
            continue
        found = [[_at(r["checkpoints"][-1], score, own) for r in records] for score in shown]
        costs = [
            ("examples_trained", "{:,.0f}"),
            ("examples_seen", "{:,.0f}"),
            ("teraflops", "{:.1f}"),
            ("teraflops_with_reuse", "{:.1f}"),
            ("seconds", "{:.0f}"),
        ]
        rows.append(
            [
                name,
                str(len(records)),
                *(cell([v for v in column if v is not None], "{:.1f}") for column in found),
                *(form.format(mean(r[key] for r in records)) for key, form in costs),
            ]
        )
    return rows


def runs_of(spec: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys([*spec.get("runs", []), *(n for line in spec.get("series", {}).values() for n in line)]))


def chart(spec: Mapping[str, Any], results: Results, scores: Scores, *, figure: str) -> go.Figure | None:
    """The figure's picture; None where nothing of it was run."""
    if "study" in spec:
        found = results["studies"].get(figure)
        if found is None:
            return None
        drawn = _of_draw(found) if spec["study"] == "figure2" else _of_sizes(found)
    elif not any(_seeds(results, name) for name in runs_of(spec)):
        return None
    elif "against" in spec:
        drawn = _against(spec, results, scores)
    elif spec.get("plot") == "curves":
        drawn = _curves(spec, results, scores)
    else:
        drawn = _bars(spec, results, spec.get("scores", scores))
    drawn.update_layout(title=spec["title"], template="plotly_white", colorway=pictures.COLOURS)
    return drawn


def page(specs: Mapping[str, Any], results: Results, scores: Scores) -> str:
    """All figures with their tables on one page that needs no network."""
    parts = []
    for name, spec in specs.items():
        drawn = chart(spec, results, scores, figure=name)
        told = table(spec, results, scores) if runs_of(spec) else []
        parts.append((name, spec["title"], pictures.html(drawn) if drawn is not None else "", told))
    template = Environment(autoescape=True).from_string((files(__package__) / "reproduction.html.j2").read_text())
    return template.render(plotly=get_plotlyjs(), parts=parts)


def render(template: str, specs: Mapping[str, Any], results: Results, scores: Scores) -> str:
    """Markdown from a template that asks for `table`, `value`, `ahead`, `lead`, `picture` and the studies."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)

    def in_markdown(rows: list[list[str]]) -> str:
        rule = ["---", *["---:"] * (len(rows[0]) - 1)]
        return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])

    def markdown(name: str) -> str:
        return in_markdown(table(specs[name], results, scores))

    def value(name: str, score: str = _HEADLINE) -> str:
        return cell(values(results, name, score, scores), "{:.1f}")

    def ahead(name: str) -> str:
        """The advantage of one series over another, a line for each value of what they are plotted against."""
        spec, shown = specs[name], [_HEADLINE, "naming @5"]
        columns = [_ahead(spec, results, score, scores) for score in shown]
        lines = [["", _said(_field(spec)), "seeds", *shown]]
        for label, points in columns[0].items():
            for x, found in points:
                cells = [cell(dict(column[label]).get(x, []), "{:+z.1f}") for column in columns]
                lines.append([label, f"{x:,}", str(len(found)), *cells])
        return in_markdown(lines)

    def lead(name: str, label: str, x: float, score: str = _HEADLINE) -> str:
        points = dict(_ahead(specs[name], results, score, scores)[label])
        return cell(points[x], "{:+z.1f}")

    def picture(name: str) -> str:
        return f"![{specs[name]['title']}](pictures/{name}.svg)"

    def last() -> list[Any]:
        return [x for x in results["studies"]["anatomy"] if x["step"] == updates()]

    def updates() -> int:
        return int(max(line["step"] for line in results["studies"]["anatomy"]))

    def share(sub_batch_size: int) -> str:
        (found,) = (x["off_diagonal_share"] for x in last() if x["sub_batch_size"] == sub_batch_size)
        return f"{100 * found:.0f} %"

    return environment.from_string(template).render(
        share=share,
        updates=updates,
        table=markdown,
        ahead=ahead,
        lead=lead,
        value=value,
        picture=picture,
        nats=lambda x: f"{x:z.1f}",
        studies=results["studies"],
    )


def _seeds(results: Results, name: str, seeds: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """A run's records; seeds: only these. The seeds that settings were tuned on are in no other figure."""
    held = results["runs"].get(name, {})
    wanted = [str(s) for s in seeds] if seeds is not None else [s for s in held if int(s) < 100]
    asked = ["0"] if name.startswith("reference") else list(wanted)
    return [held[seed] for seed in asked if seed in held]


def _at(checkpoint: Mapping[str, Any], score: str, scores: Scores) -> float | None:
    if score == _HEADLINE:
        found = [_at(checkpoint, label, scores) for label in list(scores)[:4]]
        return mean(v for v in found if v is not None) if all(v is not None for v in found) else None
    value = checkpoint["scores"].get(" ".join(scores[score]))
    return None if value is None else 100 * value


def _with_range(found: Sequence[Sequence[float]]) -> dict[str, Any]:
    """y and its error bars: the mean over seeds, from the least to the greatest."""
    means = [mean(v) for v in found]
    above = [max(v) - m for v, m in zip(found, means, strict=True)]
    below = [m - min(v) for v, m in zip(found, means, strict=True)]
    return {"y": means, "error_y": {"type": "data", "symmetric": False, "array": above, "arrayminus": below}}


def _curves(spec: Mapping[str, Any], results: Results, scores: Scores) -> go.Figure:
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True)
    for i, name in enumerate(runs_of(spec)):
        records = _seeds(results, name, spec.get("seeds"))
        if not records:
            continue
        steps = [c["step"] for c in records[0]["checkpoints"]]
        found = [[_at(r["checkpoints"][k], _HEADLINE, scores) or 0.0 for r in records] for k in range(len(steps))]
        first = records[0]
        for column, whole in ((1, first["examples_trained"]), (2, first["teraflops"])):
            figure.add_scatter(
                x=[step * whole / first["steps"] for step in steps],
                **_with_range(found),
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"color": pictures.COLOURS[i % len(pictures.COLOURS)]},
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="examples trained", row=1, col=1)
    figure.update_xaxes(title_text="TFLOPs, as executed", row=1, col=2)
    figure.update_yaxes(title_text=f"{_HEADLINE}, %", rangemode="tozero", row=1, col=1)
    return figure


def _against(spec: Mapping[str, Any], results: Results, scores: Scores) -> go.Figure:
    field = _field(spec)
    pairs: Mapping[str, Sequence[str]] = spec.get("ahead", {})
    first, second = (series.split(",")[0] for series in next(iter(pairs.values()), ("", "")))
    titles = ["", f"{first} ahead of {second}, points, seed by seed"] if pairs else [""]
    figure = make_subplots(rows=1, cols=len(titles), subplot_titles=titles)
    for label, names in spec["series"].items():
        records = [(name, _seeds(results, name, spec.get("seeds"))) for name in names]
        done = [(name, held) for name, held in records if held]
        found = [[_at(r["checkpoints"][-1], _HEADLINE, scores) or 0.0 for r in held] for _, held in done]
        if done:
            line = {"x": [held[0][field] for _, held in done], **_with_range(found), "name": label}
            figure.add_scatter(**line, row=1, col=1)
    for name in spec.get("runs", []):
        held = values(results, name, _HEADLINE, scores)
        if held:
            figure.add_hline(y=mean(held), line_dash="dot", annotation_text=name, row=1, col=1)
    for label, points in _ahead(spec, results, _HEADLINE, scores).items():
        colour = pictures.COLOURS[list(spec["series"]).index(pairs[label][0])]
        line = {"x": [x for x, _ in points], **_with_range([d for _, d in points]), "line": {"color": colour}}
        figure.add_scatter(**line, name=f"ahead, {label}", row=1, col=2)
    if pairs:
        figure.add_hline(y=0, line_dash="dot", row=1, col=2)
        figure.update_layout(legend={"orientation": "h", "y": -0.2})
    figure.update_xaxes(title_text=_said(field), **(_LOGARITHMIC if field.endswith("size") else {}))
    figure.update_yaxes(title_text=f"{_HEADLINE}, %", rangemode="tozero", row=1, col=1)
    return figure


def _ahead(
    spec: Mapping[str, Any], results: Results, score: str, scores: Scores
) -> dict[str, list[tuple[float, list[float]]]]:
    """By how much the first of two series is ahead of the second: at each x, in points, for each seed of both."""
    out = {}
    for label, (one, other) in spec.get("ahead", {}).items():
        points = []
        for pair in zip(spec["series"][one], spec["series"][other], strict=True):
            first, second = (results["runs"].get(name, {}) for name in pair)
            seeds = [str(seed) for seed in spec["seeds"] if str(seed) in first and str(seed) in second]
            ends = [[_at(run[seed]["checkpoints"][-1], score, scores) for run in (first, second)] for seed in seeds]
            found = [a - b for a, b in ends if a is not None and b is not None]
            if found:
                points.append((first[seeds[0]][_field(spec)], found))
        out[label] = points
    return out


def _field(spec: Mapping[str, Any]) -> str:
    """Of a record: what the figure's x axis has."""
    return str(spec["against"].rsplit(".", 1)[-1])


def _said(field: str) -> str:
    return field.replace("sub_batch", "sub-batch").replace("_", " ")


def _bars(spec: Mapping[str, Any], results: Results, scores: Scores) -> go.Figure:
    score = _HEADLINE if "scores" not in spec else next(iter(scores))
    names = [name for name in runs_of(spec) if _seeds(results, name, spec.get("seeds"))]
    found = [
        [_at(r["checkpoints"][-1], score, scores) or 0.0 for r in _seeds(results, name, spec.get("seeds"))]
        for name in names
    ]
    figure = go.Figure()
    figure.add_bar(x=names, **_with_range(found))
    figure.update_yaxes(title_text=f"{score}, %", rangemode="tozero")
    return figure


def _of_draw(found: Mapping[str, Any]) -> go.Figure:
    figure = make_subplots(
        rows=1,
        cols=4,
        subplot_titles=["learnability matrix, selected", "refused", "by chunks, and Gibbs", "by filter ratio"],
    )
    matrices = found["matrices"]
    limit = max(abs(v) for matrix in matrices.values() for row in matrix for v in row)
    for column, name in ((1, "selected"), (2, "refused")):
        shown = {"z": matrices[name], "zmin": -limit, "zmax": limit, "colorscale": "RdBu", "showscale": False}
        figure.add_heatmap(**shown, row=1, col=column)
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    chunks = {int(n): v for n, v in found["chunks"].items()}
    chunk_line = {"x": list(chunks), "y": list(chunks.values()), "name": "joint, by its chunks"}
    figure.add_scatter(**chunk_line, mode="lines+markers", row=1, col=3)
    gibbs = [(i + 1, v) for i, v in found["gibbs"]]
    figure.add_scatter(x=[i for i, _ in gibbs], y=[v for _, v in gibbs], name="Gibbs, by iterations", row=1, col=3)
    figure.update_xaxes(type="log", row=1, col=3)
    for method in ("joint", "independent"):
        ratios = {float(f): v[method] for f, v in found["filter_ratio"].items()}
        figure.add_scatter(x=list(ratios), y=list(ratios.values()), name=f"{method}, by filter ratio", row=1, col=4)
    figure.update_yaxes(title_text="nats a pair", row=1, col=3)
    return figure


def _of_sizes(found: Sequence[Mapping[str, float]]) -> go.Figure:
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=["share of the off-diagonal sums in the draw scores' variance", "overlap"]
    )
    for i, step in enumerate(sorted({line["step"] for line in found})):
        lines = [line for line in found if line["step"] == step]
        for column, field in ((1, "off_diagonal_share"), (2, "overlap")):
            figure.add_scatter(
                x=[line["sub_batch_size"] for line in lines],
                y=[line[field] for line in lines],
                name=f"after {step:.0f} updates",
                legendgroup=str(step),
                showlegend=column == 1,
                line={"color": pictures.COLOURS[i % len(pictures.COLOURS)]},
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="sub-batch size", **_LOGARITHMIC)
    figure.update_yaxes(range=[0, 1])
    return figure
