"""The report stage: run directories -> one page: what was gained at what cost, the curves, and what was drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TypedDict

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from jinja2 import Environment
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from jest_core import run_file
from jest_core.run_file import Run

from ..base import progress, storage
from ..data.catalogue import open_catalogue
from ..evaluation.results import Line
from ..training import selection_log
from ..training.metrics_line import part_seconds
from . import comparison, composition, pictures, study
from .comparison import Finished
from .composition import Shares
from .pictures import Chart, Tile

_THUMBNAILS = 12  # in each row of the grids
_MOMENTS = 4  # of training, of which thumbnails are shown
_MATRIX = 64  # examples a side
_MOST_PAIRS = 0.95  # of the heat map, which differ in colour; the others have the strongest
_SHOWN_COSTS = ("score", "reference", "select", "train", "loss", "optimizer", "agreement")
_SHOWN_TIMES = ("wait", "score", "reference", "select", "exchange", "train", "log")


class Pick(TypedDict):
    """Columns of a row of the selection log that the page shows; losses of the matched pair, in nats, NaN if none."""

    shard: int
    row: int
    selected: bool
    learner_loss: float
    reference_loss: float


@dataclass(frozen=True)
class Moment:
    """A step of training. rows: labels and their tiles."""

    step: int
    rows: list[tuple[str, list[Tile]]]


def run_stage(run: Run) -> None:
    """The report of one run, in its directory."""
    directory = run.path(run.run_dir)
    write_report([directory], f"{directory}/report.html")


def write_report(run_dirs: Sequence[str], output: str) -> None:
    """Read the runs, print the table, and write the page, with the table as Markdown beside it."""
    runs = [comparison.read_run(run_file.join("", directory)) for directory in run_dirs]
    table = comparison.compare(runs)
    progress.console.print(comparison.terminal(table))
    output = run_file.join("", output)
    storage.write_bytes(output, page(runs, table).encode())
    storage.write_bytes(output.removesuffix(".html") + ".md", comparison.markdown(table).encode())
    progress.say("report", f"written to {output}")


def page(runs: list[Finished], table: comparison.Comparison) -> str:
    """The whole page, without a need for the network."""
    selecting = [run for run in runs if run.run.selection.selects]
    charts = [
        Chart(
            "Scores against examples, FLOPs and time", curves(runs), "Lines of each score over training, a line a run."
        ),
        Chart(
            "Where the FLOPs and the time went", costs(runs), "Stacked bars of each run's FLOPs and seconds by part."
        ),
    ]
    if selecting:
        title = "Learnability of what was offered and of what was selected"
        description = "Learnability of the super-batches and of the sub-batches over steps."
        charts.append(Chart(title, learnability_chart(selecting), description))
    for run in selecting:
        for each in composition.shares(run):
            title = f"What {run.name} selected, by {each.column}"
            description = f"Share of each {each.column} of the selected over steps, with its share of what was offered."
            charts.append(Chart(title, share_chart(each), description))
    for run in selecting[:1]:
        if run.run.reads_scores and run.run.uses_learner:
            title = f"Learnability of the pairs of a batch, by {run.name}"
            description = "Heat map: learner loss minus reference loss of every image with every caption of a batch."
            charts.append(Chart(title, matrix_chart(run), description))
    template = Environment(autoescape=True).from_string((files(__package__) / "report.html.j2").read_text())
    return template.render(
        plotly=get_plotlyjs(),
        verdict=comparison.verdict(runs),
        note=comparison.NOTE,
        columns=table.columns,
        rows=table.rows,
        charts=charts,
        grids=[(run.name, grids(run), repeated(run)) for run in selecting],
    )


def curves(runs: list[Finished]) -> go.Figure:
    """One row a score, one column a cost axis, one line a run; references are left out."""
    columns = comparison.scores(runs)
    axes = ("examples trained", "examples seen", "TFLOPs", "seconds in steps")
    figure = make_subplots(
        rows=len(columns) or 1,
        cols=len(axes),
        subplot_titles=[pictures.plain(h) if i == 0 else "" for _, _, h in columns for i in range(len(axes))] or None,
        vertical_spacing=0.25 / max(1, len(columns)),
    )
    used = {run.run.path(run.run.reference.checkpoint or "") for run in runs if run.run.reference}
    compared = [run for run in runs if run.directory not in used] or runs
    for r, (key, metric, _) in enumerate(columns, 1):
        for c, title in enumerate(axes, 1):
            for i, run in enumerate(compared):
                curve = run.curve(key, metric)
                figure.add_scatter(
                    x=[_spent(run, line, title) for line, _ in curve],
                    y=[100 * value for _, value in curve],
                    name=pictures.plain(run.name),
                    legendgroup=run.name,
                    showlegend=r == c == 1,
                    line={"color": pictures.COLOURS[i % len(pictures.COLOURS)]},
                    mode="lines+markers",
                    row=r,
                    col=c,
                )
            figure.update_xaxes(title_text=title, row=r, col=c)
            figure.update_yaxes(title_text="%", rangemode="tozero", row=r, col=c)
    figure.update_annotations(x=0, xanchor="left")  # the titles, which are wider than their charts on a phone
    figure.update_layout(
        height=280 * max(1, len(columns)), legend={"orientation": "h", "yref": "container", "y": 1, "yanchor": "top"}
    )
    return figure


def _spent(run: Finished, line: Line, what: str) -> float:
    match what:
        case "examples trained":
            return float(line["samples_trained"])
        case "examples seen":
            return float(line["samples_seen"])
        case "TFLOPs":
            return float(line["step"] * run.manifest["flops_step"] / 1e12)
        case _:
            return run.seconds_at(line["step"])


def costs(runs: list[Finished]) -> go.Figure:
    """FLOPs and seconds of each run's steps, by part."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=["TFLOPs", "seconds"])
    names = [pictures.plain(run.name) for run in runs]
    for i, part in enumerate(dict.fromkeys([*_SHOWN_COSTS, *_SHOWN_TIMES])):
        colour = pictures.COLOURS[i % len(pictures.COLOURS)]
        flops = [run.manifest["steps"] * run.flops_of(part) / 1e12 for run in runs]
        seconds = [sum(part_seconds(line, part) for line in run.metrics) for run in runs]
        for column, values in ((1, flops), (2, seconds)):
            if any(values):
                figure.add_bar(
                    x=names,
                    y=values,
                    name=part,
                    legendgroup=part,
                    showlegend=column == 1 or not any(flops),
                    marker_color=colour,
                    row=1,
                    col=column,
                )
    figure.update_layout(barmode="stack", height=420)
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
                x=steps["step"].to_numpy(),
                y=steps[field].to_numpy(),
                name=pictures.plain(f"{run.name}, {label}"),
                line=line,
            )
    figure.update_layout(height=420, xaxis_title="step", yaxis_title="nats per matched pair")
    return figure


def share_chart(shares: Shares) -> go.Figure:
    """Share of each value among the selected over time, with its share of what was offered as a dotted line."""
    figure = go.Figure()
    for i, (name, share) in enumerate(shares.selected.items()):
        colour = pictures.COLOURS[i % len(pictures.COLOURS)]
        figure.add_scatter(
            x=shares.steps,
            y=[100 * s for s in share],
            name=pictures.plain(name[:40]),
            line={"color": colour},
            legendgroup=name,
        )
        figure.add_scatter(
            x=[shares.steps[0], shares.steps[-1]],
            y=[100 * shares.offered[name]] * 2,
            line={"color": colour, "dash": "dot"},
            legendgroup=name,
            showlegend=False,
            mode="lines",
        )
    figure.update_layout(height=420, xaxis_title="step", yaxis_title="% of the selected (dotted: of the offered)")
    return figure


def matrix_chart(run: Finished) -> go.Figure:
    """The learnability matrix of a few examples of the run's first super-batch, by its last checkpoint."""
    matrix = study.matrix(run.run, _MATRIX)
    # a few pairs have most of the range: with their colours the others would all look white
    limit = float(np.quantile(np.abs(matrix), _MOST_PAIRS)) or 1.0
    figure = go.Figure(go.Heatmap(z=matrix, zmin=-limit, zmax=limit, colorscale="RdBu", colorbar_title="nats"))
    figure.update_layout(height=520, xaxis_title="caption", yaxis_title="image", yaxis_autorange="reversed")
    return figure


def grids(run: Finished) -> list[Moment]:
    """Thumbnails of selected and refused examples at a few of the logged steps, from the first to the last."""
    steps = np.unique(run.picks["step"].to_numpy())
    out = []
    for step in dict.fromkeys(steps[np.linspace(0, len(steps) - 1, _MOMENTS).astype(int)].tolist()):
        rows: list[Pick] = run.picks.filter(pa.compute.equal(run.picks["step"], int(step))).to_pylist()
        selected = sorted((row for row in rows if row["selected"]), key=_score, reverse=True)
        spread = [selected[i] for i in np.linspace(0, len(selected) - 1, min(_THUMBNAILS, len(selected))).astype(int)]
        refused = [r for r in rows if not r["selected"]][:_THUMBNAILS]
        out.append(Moment(int(step), [("selected", _tiles(run, spread)), ("refused", _tiles(run, refused))]))
    return out


def repeated(run: Finished) -> list[Tile]:
    """Thumbnails of what was selected most often."""
    repeats = composition.repeats(run, _THUMBNAILS)
    catalogue = open_catalogue(run.run.path(run.run.data.catalogue))
    notes = [f"{times} times" for _, _, times in repeats]
    return pictures.tiles(run.run, catalogue, [(shard, row) for shard, row, _ in repeats], notes)


def _score(row: Pick) -> float:
    """The score of a row's matched pair, in nats, by the models that scored it: one or both. NaN where none did."""
    losses = (row["learner_loss"], -row["reference_loss"])
    return sum(loss for loss in losses if loss == loss) if any(loss == loss for loss in losses) else float("nan")


def _tiles(run: Finished, rows: list[Pick]) -> list[Tile]:
    catalogue = open_catalogue(run.run.path(run.run.data.catalogue))
    notes = [f"{score:.1f}" if (score := _score(row)) == score else "" for row in rows]
    return pictures.tiles(run.run, catalogue, [(row["shard"], row["row"]) for row in rows], notes)
