"""A selection log and the shards' columns -> the share of each source, language or kind of noise among the selected.

A sample of the logged rows is looked up in the shards: a run may have selected billions. The shares of what was offered
follow from those of the selected and of the logged sample of the refused.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..data.catalogue import Catalogue, open_catalogue
from .comparison import Finished

COLUMNS = ("kind", "noise", "language", "source", "nsfw")  # those that the shards have are shown
_SAMPLE = 5_000  # logged rows that are looked up, of the selected and of the refused each
_LARGEST = 9  # values that have a line each; the others share one
_BINS = 20


@dataclass(frozen=True)
class Shares:
    """steps: mean step of each bin. selected: value -> its share of the selected, by bin; offered: of all offered."""

    column: str
    steps: list[float]
    selected: dict[str, list[float]]
    offered: dict[str, float]


def shares(run: Finished, seed: int = 0) -> list[Shares]:
    """One for each of COLUMNS that the run's shards have, where there is more than one value."""
    picks = run.picks
    chosen, refused = (_some(picks.filter(pa.compute.equal(picks["selected"], s)), seed) for s in (True, False))
    catalogue = open_catalogue(run.run.path(run.run.data.catalogue))
    values = [_values(run, catalogue, table) for table in (chosen, refused)]
    steps = chosen["step"].to_numpy()
    bins = np.minimum(steps * _BINS // max(1, run.run.n_steps), _BINS - 1)
    used = np.unique(bins)
    ratio = 1 - run.run.sub_batch_size / run.run.super_batch_size
    out = []
    for column, of_chosen in values[0].items():
        of_refused = values[1].get(column, [])
        counts = Counter(of_chosen) + Counter(of_refused)
        if len(counts) < 2:
            continue
        largest = [value for value, _ in counts.most_common(_LARGEST)]
        names = [*largest, *(["other"] if len(counts) > _LARGEST else [])]
        drawn, left = (np.array([v if v in largest else "other" for v in each]) for each in (of_chosen, of_refused))
        weight = ratio if len(left) else 0.0  # of what was offered, the part that was refused
        offered = {n: (1 - weight) * float(np.mean(drawn == n)) for n in names}
        if weight:
            offered = {n: share + weight * float(np.mean(left == n)) for n, share in offered.items()}
        selected = {n: [float(np.mean(drawn[bins == b] == n)) for b in used] for n in names}
        out.append(Shares(column, [float(steps[bins == b].mean()) for b in used], selected, offered))
    return out


def repeats(run: Finished, n: int = 12) -> list[tuple[int, int, int]]:
    """The examples that were selected most often in the steps that are looked at: shard, row, times; none if once."""
    picks = run.picks.filter(run.picks["selected"])
    counted = picks.group_by(["shard", "row"]).aggregate([("step", "count")])
    top = counted.sort_by([("step_count", "descending"), ("shard", "ascending"), ("row", "ascending")]).slice(0, n)
    rows = zip(top["shard"].to_pylist(), top["row"].to_pylist(), top["step_count"].to_pylist(), strict=True)
    return [row for row in rows if row[2] > 1]


def _some(picks: pa.Table, seed: int) -> pa.Table:
    if len(picks) <= _SAMPLE:
        return picks
    return picks.take(pa.array(np.sort(np.random.default_rng(seed).permutation(len(picks))[:_SAMPLE])))


def _values(run: Finished, catalogue: Catalogue, picks: pa.Table) -> dict[str, list[str]]:
    """Column -> the value of each pick; `none` where it is empty."""
    rows = list(zip(picks["shard"].to_pylist(), picks["row"].to_pylist(), strict=True))
    out: dict[str, list[str]] = {}
    for (number, group), wanted in catalogue.by_row_group(rows).items():
        shard = catalogue.place(number).open(run.run.data.columns)
        for column in COLUMNS:
            if shard.actual(column):
                cells = shard.strings(group, column)
                values = out.setdefault(column, ["none"] * len(rows))
                for row, position in wanted:
                    values[position] = cells[row] or "none"
    return out
