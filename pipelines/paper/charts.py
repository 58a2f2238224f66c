"""Records of the reproduction's runs -> charts."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..reports import pictures
from ..reports.study import AnatomyLine, Figure2
from .records import (
    HEADLINE,
    FigureSpec,
    Results,
    Scores,
    by_seed,
    last_scores,
    leads,
    runs_of,
    score_at,
    x_field,
    x_of,
    x_title,
)

_LOGARITHMIC = {"type": "log", "tickvals": [4**i for i in range(1, 9)]}


def chart(spec: FigureSpec, results: Results, scores: Scores, *, figure: str) -> go.Figure | None:
    """The chart of the figure of that name; None where none of its runs was made."""
    if "study" in spec:
        study = results["studies"].get(figure)
        if study is None:
            return None
        drawn = _anatomy(study) if isinstance(study, list) else _figure2(study)
    elif not any(by_seed(results, name) for name in runs_of(spec)):
        return None
    elif "against" in spec:
        drawn = _against(spec, results, scores)
    elif spec.get("plot") == "curves":
        drawn = _curves(spec, results, scores)
    else:
        drawn = _bars(spec, results, spec.get("scores", scores))
    drawn.update_layout(title=spec["title"], template="plotly_white", colorway=pictures.COLOURS)
    return drawn


def _with_range(points: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Plotly's y and error bars of points with a value for each seed: the mean, from the least to the greatest."""
    means = [mean(v) for v in points]
    above = [max(v) - m for v, m in zip(points, means, strict=True)]
    below = [m - min(v) for v, m in zip(points, means, strict=True)]
    return {"y": means, "error_y": {"type": "data", "symmetric": False, "array": above, "arrayminus": below}}


def _curves(spec: FigureSpec, results: Results, scores: Scores) -> go.Figure:
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True)
    for i, name in enumerate(runs_of(spec)):
        records = by_seed(results, name, spec.get("seeds"))
        if not records:
            continue
        steps = [c["step"] for c in records[0]["checkpoints"]]
        values = [[score_at(r["checkpoints"][k], HEADLINE, scores) or 0.0 for r in records] for k in range(len(steps))]
        first = records[0]
        for column, whole in ((1, first["examples_trained"]), (2, first["teraflops"])):
            figure.add_scatter(
                x=[step * whole / first["steps"] for step in steps],
                **_with_range(values),
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"color": pictures.COLOURS[i % len(pictures.COLOURS)]},
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="examples trained", row=1, col=1)
    figure.update_xaxes(title_text="TFLOPs, as executed", row=1, col=2)
    figure.update_yaxes(title_text=f"{HEADLINE}, %", rangemode="tozero", row=1, col=1)
    return figure


def _against(spec: FigureSpec, results: Results, scores: Scores) -> go.Figure:
    pairs: Mapping[str, Sequence[str]] = spec.get("ahead", {})
    first, second = (series.split(",")[0] for series in next(iter(pairs.values()), ("", "")))
    titles = ["", f"{first} ahead of {second}, points, seed by seed"] if pairs else [""]
    figure = make_subplots(rows=1, cols=len(titles), subplot_titles=titles)
    for label, names in spec["series"].items():
        records = [each for name in names if (each := by_seed(results, name, spec.get("seeds")))]
        values = [[score_at(r["checkpoints"][-1], HEADLINE, scores) or 0.0 for r in each] for each in records]
        if records:
            line = {"x": [x_of(spec, each[0]) for each in records], **_with_range(values), "name": label}
            figure.add_scatter(**line, row=1, col=1)
    for name in spec.get("runs", []):
        if level := last_scores(results, name, HEADLINE, scores):
            figure.add_hline(y=mean(level), line_dash="dot", annotation_text=name, row=1, col=1)
    for label, points in leads(spec, results, HEADLINE, scores).items():
        colour = pictures.COLOURS[list(spec["series"]).index(pairs[label][0])]
        line = {"x": [x for x, _ in points], **_with_range([d for _, d in points]), "line": {"color": colour}}
        figure.add_scatter(**line, name=f"ahead, {label}", row=1, col=2)
    if pairs:
        figure.add_hline(y=0, line_dash="dot", row=1, col=2)
        figure.update_layout(legend={"orientation": "h", "y": -0.2})
    figure.update_xaxes(title_text=x_title(spec), **(_LOGARITHMIC if x_field(spec).endswith("size") else {}))
    figure.update_yaxes(title_text=f"{HEADLINE}, %", rangemode="tozero", row=1, col=1)
    return figure


def _bars(spec: FigureSpec, results: Results, scores: Scores) -> go.Figure:
    score = HEADLINE if "scores" not in spec else next(iter(scores))
    names = [name for name in runs_of(spec) if by_seed(results, name, spec.get("seeds"))]
    values = [
        [score_at(r["checkpoints"][-1], score, scores) or 0.0 for r in by_seed(results, name, spec.get("seeds"))]
        for name in names
    ]
    figure = go.Figure()
    figure.add_bar(x=names, **_with_range(values))
    figure.update_yaxes(title_text=f"{score}, %", rangemode="tozero")
    return figure


def _figure2(study: Figure2) -> go.Figure:
    figure = make_subplots(
        rows=1,
        cols=4,
        subplot_titles=["learnability matrix, selected", "refused", "by chunks, and Gibbs", "by filter ratio"],
    )
    matrices = study["matrices"]
    limit = max(abs(v) for matrix in (matrices["selected"], matrices["refused"]) for row in matrix for v in row)
    for column, matrix in ((1, matrices["selected"]), (2, matrices["refused"])):
        shown = {"z": matrix, "zmin": -limit, "zmax": limit, "colorscale": "RdBu", "showscale": False}
        figure.add_heatmap(**shown, row=1, col=column)
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    chunks = {int(n): v for n, v in study["chunks"].items()}
    chunk_line = {"x": list(chunks), "y": list(chunks.values()), "name": "joint, by its chunks"}
    figure.add_scatter(**chunk_line, mode="lines+markers", row=1, col=3)
    gibbs = [(i + 1, v) for i, v in study["gibbs"]]
    figure.add_scatter(x=[i for i, _ in gibbs], y=[v for _, v in gibbs], name="Gibbs, by iterations", row=1, col=3)
    figure.update_xaxes(type="log", row=1, col=3)
    by_method = {
        "joint": {float(f): v["joint"] for f, v in study["filter_ratio"].items()},
        "independent": {float(f): v["independent"] for f, v in study["filter_ratio"].items()},
    }
    for method, ratios in by_method.items():
        figure.add_scatter(x=list(ratios), y=list(ratios.values()), name=f"{method}, by filter ratio", row=1, col=4)
    figure.update_yaxes(title_text="nats a pair", row=1, col=3)
    return figure


def _anatomy(lines: Sequence[AnatomyLine]) -> go.Figure:
    figure = make_subplots(
        rows=1, cols=2, subplot_titles=["share of the off-diagonal sums in the draw scores' variance", "overlap"]
    )
    for i, step in enumerate(sorted({line["step"] for line in lines})):
        of_step = [line for line in lines if line["step"] == step]
        shares = [line["off_diagonal_share"] for line in of_step], [line["overlap"] for line in of_step]
        for column, values in enumerate(shares, 1):
            figure.add_scatter(
                x=[line["sub_batch_size"] for line in of_step],
                y=values,
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
