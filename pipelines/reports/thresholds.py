"""A column of the score cache -> a page to choose a threshold by: its distribution, and examples on either side."""

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import plotly.graph_objects as go
import pyarrow.compute as pc
from jinja2 import Environment
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from jest_core import run_file
from jest_core.run_file import Run
from jest_core.tables import SlotStatus

from ..base import cluster, manifests, progress, storage
from ..data.catalogue import Catalogue, open_catalogue
from ..data.quantiles import thresholds
from ..scores import score_cache
from . import pictures
from .pictures import Chart, Tile

STAGE = "thresholds"
SHARES = (0.9, 0.7, 0.5, 0.3, 0.1)  # kept
_PARTS = 64  # shards that are looked into
_TILES = 12  # on either side of a threshold


@dataclass(frozen=True)
class Sample:
    """Scored rows of some shards; clean: which of them are, None where no column says it."""

    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    score: NDArray[np.float32]
    clean: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Section:
    """A threshold on the page. kept, dropped: pairs of the sample; rows: labels and their tiles."""

    share: str  # of the pairs that it keeps, in %
    limit: str  # the least score that it keeps
    kept: int
    dropped: int
    rows: list[tuple[str, list[Tile]]]


def write_page(run: Run, column: str, truth: str | None, output: str) -> None:
    """Write the page. truth: a column of the shards that is empty where a pair is clean; precision and recall of each
    threshold are against it."""
    if run.reference is None:
        raise ValueError("the run file has no `reference` part, and so no score cache to choose a threshold in: add it")
    directory = run.path(run.reference.scores)
    catalogue = _scored(run, directory)
    cluster.connect()
    cluster.data_context()
    limits = dict(zip(SHARES, thresholds(directory, column, SHARES), strict=True))
    sample = _sample(run, catalogue, directory, column, truth)
    charts = [Chart("How the scores are spread", histogram(sample, limits))]
    if sample.clean is not None:
        charts.append(Chart("Precision and recall of clean pairs", precision_recall(sample, limits)))
        for share, limit in limits.items():
            precision, recall = at(sample, limit)
            progress.say(
                STAGE,
                f"the best {share:.0%} by {column} (at least {limit:.3f}): {precision:.1%} clean against "
                f"{sample.clean.mean():.1%} of all, {recall:.1%} of the clean kept",
            )
    template = Environment(autoescape=True).from_string((files(__package__) / "thresholds.html.j2").read_text())
    page = template.render(
        plotly=get_plotlyjs(),
        column=column,
        n=len(sample.score),
        n_shards=min(_PARTS, len(catalogue.shards)),
        charts=charts,
        sections=_sections(run, catalogue, sample, limits),
    )
    output = run_file.join("", output)
    storage.write_bytes(output, page.encode())
    progress.say(STAGE, f"written to {output}")


def _scored(run: Run, directory: str) -> Catalogue:
    """The catalogue that the cache was made for: the run's, or the one it refines."""
    made_for = score_cache.opened(directory)["config"]["catalogue"]
    for path in (run.data.catalogue, run.data.refines):
        if path and manifests.exists(run.path(path)):
            catalogue = open_catalogue(run.path(path))
            if catalogue.manifest["fingerprint"] == made_for:
                return catalogue
    raise ValueError(
        f"{directory} was scored for neither data.catalogue {run.data.catalogue} nor data.refines {run.data.refines}: "
        "correct reference.scores, or run `jest reference-scores`"
    )


def _sample(run: Run, catalogue: Catalogue, directory: str, column: str, truth: str | None) -> Sample:
    n_shards = len(catalogue.shards)
    chosen = np.sort(np.random.default_rng(run.seed).permutation(n_shards)[:_PARTS])
    shards, rows, scores, clean = [], [], [], []
    for number in chosen.tolist():
        part = storage.open_parquet(score_cache.part_path(directory, number)).read(columns=["row", "status", column])
        score = part[column].to_numpy()
        ok = pc.equal(part["status"], SlotStatus.OK.label).to_numpy() & ~np.isnan(score)
        shards.append(np.full(int(ok.sum()), number))
        rows.append(part["row"].to_numpy()[ok].astype(np.int64))
        scores.append(score[ok])
        if truth is not None:
            shard = catalogue.place(number).open(run.data.columns)
            groups = range(len(shard.row_group_sizes))
            values = np.array([v for g in groups for v in shard.strings(g, truth)], dtype=object)
            clean.append(values[ok] == "")
    is_clean = np.concatenate(clean) if truth is not None else None
    return Sample(np.concatenate(shards), np.concatenate(rows), np.concatenate(scores), is_clean)


def at(sample: Sample, limit: float) -> tuple[float, float]:
    """Precision and recall of clean pairs where what scores at least `limit` is kept."""
    assert sample.clean is not None
    kept = sample.score >= limit
    good = int((kept & sample.clean).sum())
    return good / max(1, int(kept.sum())), good / max(1, int(sample.clean.sum()))


def precision_recall(sample: Sample, limits: dict[float, float]) -> go.Figure:
    """Every threshold as a point of one curve; those of the page are marked."""
    assert sample.clean is not None
    order = np.argsort(-sample.score, kind="stable")
    good = np.cumsum(sample.clean[order])
    n = np.arange(1, len(order) + 1)
    shown = np.unique(np.linspace(0, len(order) - 1, 400).astype(int))
    figure = go.Figure()
    line = {"color": pictures.COLOURS[0]}
    figure.add_scatter(x=100 * good[shown] / good[-1], y=100 * good[shown] / n[shown], line=line, name="by the score")
    marks = [at(sample, limit) for limit in limits.values()]
    figure.add_scatter(
        x=[100 * recall for _, recall in marks],
        y=[100 * precision for precision, _ in marks],
        text=[f"best {share:.0%}" for share in limits],
        mode="markers+text",
        textposition="top right",
        marker={"size": 9, "color": pictures.COLOURS[0]},
        showlegend=False,
    )
    all_clean = 100 * float(sample.clean.mean())
    dotted = {"color": "#888", "dash": "dot"}
    figure.add_scatter(x=[0, 100], y=[all_clean] * 2, mode="lines", line=dotted, name="without a filter")
    figure.update_layout(height=460, xaxis_title="% of the clean pairs kept", yaxis_title="% of the kept that is clean")
    return figure


def histogram(sample: Sample, limits: dict[float, float]) -> go.Figure:
    figure = go.Figure()
    low, high = (float(x) for x in np.quantile(sample.score, [0.001, 0.999]))
    groups = {"": np.ones(len(sample.score), dtype=bool)}
    if sample.clean is not None:
        groups = {"clean": sample.clean, "not clean": ~sample.clean}
    for i, (name, mask) in enumerate(groups.items()):
        counts, edges = np.histogram(sample.score[mask], bins=80, range=(low, high))
        figure.add_bar(x=(edges[1:] + edges[:-1]) / 2, y=counts, name=name, marker_color=pictures.COLOURS[i])
    for share, limit in limits.items():
        figure.add_vline(x=limit, line={"color": "#444", "dash": "dot"}, annotation_text=f"{share:.0%}")
    figure.update_layout(height=380, barmode="stack", bargap=0, xaxis_title="score", yaxis_title="pairs")
    return figure


def _sections(run: Run, catalogue: Catalogue, sample: Sample, limits: dict[float, float]) -> list[Section]:
    """One for each threshold, with examples that it just keeps, and just drops."""
    order = np.argsort(sample.score, kind="stable")
    borders = np.searchsorted(sample.score[order], list(limits.values()), "left").tolist()
    kept = [order[border : border + _TILES] for border in borders]
    dropped = [order[max(0, border - _TILES) : border][::-1] for border in borders]
    shown = np.unique(np.concatenate(kept + dropped))
    places = list(zip(sample.shard[shown].tolist(), sample.row[shown].tolist(), strict=True))
    pictured = pictures.tiles(run, catalogue, places, [f"{score:.3f}" for score in sample.score[shown]])
    tiles = dict(zip(shown.tolist(), pictured, strict=True))
    return [
        Section(
            share=f"{share:.0%}",
            limit=f"{limit:.3f}",
            kept=len(order) - borders[i],
            dropped=borders[i],
            rows=[
                (f"just {side}", [tiles[j] for j in rows[i].tolist()])
                for side, rows in (("kept", kept), ("dropped", dropped))
            ],
        )
        for i, (share, limit) in enumerate(limits.items())
    ]
