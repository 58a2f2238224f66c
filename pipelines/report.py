"""The report stage: run directories -> one page with the table, the curves, what was selected, and what it cost."""

from importlib.resources import files
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from jinja2 import Environment
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from jest_core import config as run_files
from pipelines import comparison, pictures, progress, selection_log, storage
from pipelines.catalogue import open_catalogue
from pipelines.comparison import Finished

_THUMBNAILS = 12  # in each row of the grids


def run_stage(run_dirs: list[str], output: str) -> None:
    """Read the runs, print the table, and write the page, with the table as Markdown beside it."""
    runs = [comparison.read_run(run_files.join("", directory)) for directory in run_dirs]
    table = comparison.compare(runs)
    progress.console.print(comparison.terminal(table))
    template = Environment(autoescape=True).from_string((files("pipelines") / "report.html.j2").read_text())
    selecting = [run for run in runs if run.run.selection.method != "uniform"]
    charts = [("Scores against examples trained, examples seen and FLOPs", curves(runs))]
    if selecting:
        charts.append(("Learnability of what was offered and of what was selected", learnability_chart(selecting)))
    charts += [(f"What {run.name} selected: share of each kind", share_chart(run)) for run in selecting]
    page = template.render(
        plotly=get_plotlyjs(),
        note=comparison.NOTE,
        columns=table.columns,
        rows=table.rows,
        charts=[(title, pictures.html(chart)) for title, chart in charts],
        grids=[(run.name, grids(run)) for run in selecting],
    )
    output = run_files.join("", output)
    storage.write_bytes(output, page.encode())
    storage.write_bytes(output.removesuffix(".html") + ".md", comparison.markdown(table).encode())
    progress.say("report", f"written to {output}")


def curves(runs: list[Finished]) -> go.Figure:
    """One row a score, one column a cost axis, one line a run; references are left out."""
    columns = comparison.scores(runs)
    axes = (("examples trained", "samples_trained"), ("examples seen", "samples_seen"), ("TFLOPs", ""))
    figure = make_subplots(
        rows=len(columns),
        cols=len(axes),
        subplot_titles=[h if i == 0 else "" for _, _, h in columns for i in range(3)],
        vertical_spacing=0.25 / len(columns),
    )
    used = {run.run.path(run.run.reference.checkpoint or "") for run in runs if run.run.reference}
    compared = [run for run in runs if run.directory not in used]
    for r, (key, metric, _) in enumerate(columns, 1):
        for c, (title, field) in enumerate(axes, 1):
            for i, run in enumerate(compared):
                found = run.curve(key, metric)
                x = [line[field] if field else line["step"] * run.manifest["flops_step"] / 1e12 for line, _ in found]
                y = [100 * value for _, value in found]
                colour = pictures.COLOURS[i % len(pictures.COLOURS)]
                figure.add_scatter(
                    x=x,
                    y=y,
                    name=run.name,
                    legendgroup=run.name,
                    showlegend=r == c == 1,
                    line={"color": colour},
                    mode="lines+markers",
                    row=r,
                    col=c,
                )
            figure.update_xaxes(title_text=title, row=r, col=c)
            figure.update_yaxes(title_text="%", rangemode="tozero", row=r, col=c)
    figure.update_layout(height=280 * len(columns), legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return figure


def learnability_chart(runs: list[Finished]) -> go.Figure:
    """Mean matched-pair score of the super-batch and of the sub-batch over steps."""
    figure = go.Figure()
    for i, run in enumerate(runs):
        steps = selection_log.read_steps(run.directory)
        for field, dash, label in (
            ("sub_batch_matched_score", "solid", "selected"),
            ("super_batch_matched_score", "dot", "offered"),
        ):
            line = {"color": pictures.COLOURS[i % len(pictures.COLOURS)], "dash": dash}
            figure.add_scatter(
                x=steps["step"].to_numpy(), y=steps[field].to_numpy(), name=f"{run.name}, {label}", line=line
            )
    figure.update_layout(height=420, xaxis_title="step", yaxis_title="nats per matched pair")
    return figure


def share_chart(run: Finished, n_bins: int = 20) -> go.Figure:
    """Share of each kind (and noise) among the selected over time, with its share of the catalogue as a dotted line."""
    labels, offered = _labels(run)
    picks = run.picks.filter(run.picks["selected"])
    steps = picks["step"].to_numpy()
    names = np.array([labels[key] for key in zip(picks["shard"].to_pylist(), picks["row"].to_pylist(), strict=True)])
    bins = np.minimum(steps * n_bins // max(1, run.run.n_steps), n_bins - 1)
    figure = go.Figure()
    for i, name in enumerate(sorted(offered, key=lambda n: -offered[n])):
        used = np.unique(bins)
        share = [100 * np.mean(names[bins == b] == name) for b in used]
        x = [steps[bins == b].mean() for b in used]
        colour = pictures.COLOURS[i % len(pictures.COLOURS)]
        figure.add_scatter(x=x, y=share, name=name, line={"color": colour}, legendgroup=name)
        figure.add_scatter(
            x=[x[0], x[-1]],
            y=[100 * offered[name]] * 2,
            line={"color": colour, "dash": "dot"},
            legendgroup=name,
            showlegend=False,
            mode="lines",
        )
    figure.update_layout(height=420, xaxis_title="step", yaxis_title="% of the selected (dotted: of the catalogue)")
    return figure


def _labels(run: Finished) -> tuple[dict[tuple[int, int], str], dict[str, float]]:
    """kind and noise of every row of the catalogue's shards, and the share of each among the kept rows."""
    catalogue = open_catalogue(run.run.path(run.run.data.catalogue))
    labels: dict[tuple[int, int], str] = {}
    counts: dict[str, int] = {}
    for number in range(len(catalogue.shards)):
        place = catalogue.place(number)
        shard = place.open(run.run.data.columns)
        names = [name for name in ("kind", "noise") if shard.actual(name)]
        row = 0
        for group, size in enumerate(shard.row_group_sizes):
            kept = place.rows(group)[1] > 0
            columns = [shard.strings(group, name) for name in names]
            for i in range(size):
                value = " / ".join(column[i] for column in columns if column[i]) or "all"
                labels[number, row] = value
                counts[value] = counts.get(value, 0) + bool(kept[i])
                row += 1
    total = sum(counts.values())
    return labels, {name: n / total for name, n in counts.items() if n}


def grids(run: Finished) -> list[dict[str, Any]]:
    """Thumbnails of selected and refused examples at the first, middle and last logged step."""
    steps = np.unique(run.picks["step"].to_numpy())
    out = []
    for step in dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]):
        rows = run.picks.filter(pa.compute.equal(run.picks["step"], int(step))).to_pylist()
        selected = sorted((r for r in rows if r["selected"]), key=lambda r: -(r["learner_loss"] - r["reference_loss"]))
        spread = [selected[i] for i in np.linspace(0, len(selected) - 1, min(_THUMBNAILS, len(selected))).astype(int)]
        refused = [r for r in rows if not r["selected"]][:_THUMBNAILS]
        out.append({"step": int(step), "rows": [("selected", _tiles(run, spread)), ("refused", _tiles(run, refused))]})
    return out


def _tiles(run: Finished, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    catalogue = open_catalogue(run.run.path(run.run.data.catalogue))
    scores = [row["learner_loss"] - row["reference_loss"] for row in rows]
    notes = [f"{score:.1f}" if score == score else "" for score in scores]
    return pictures.tiles(run.run, catalogue, [(row["shard"], row["row"]) for row in rows], notes)
