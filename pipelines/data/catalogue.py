"""Image shards -> catalogue: which rows are kept, how often each comes, and the rule that dropped each of the others.

One pass over metadata; no image is read or copied. The part of a shard has a row for each of its rows, so that a
catalogue made of another one (data.refines), and a score cache made for either, line up row by row. <catalogue>/ has
parts/, shards.parquet and row_groups.parquet (which a run's order is made of), index/ for tars, and manifest.json.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jest_core.run_file import Run
from jest_core.run_file.rules import DuplicateRule, ScoreRule

from ..base import cluster, damage, manifests, owner, progress, shard_paths, storage
from ..base.integrity import Damaged
from . import duplicates, first_shards, rules
from .catalogue_parts import KEPT, write_missing
from .descriptions import Descriptions
from .pages import MANY_ROWS
from .places import Place, Places
from .shards import part_name

if TYPE_CHECKING:
    from jest_core.examples.order import Order

STAGE = "catalogue"


class Config(TypedDict):
    """What decides a catalogue's content.

    shards: the patterns of data.shards. n_shards: files that they name. shards_hash: SHA-256 in hex of the paths, and
    of which pattern named each. rules, columns: those of the run file's `data`. refines: fingerprint of the parent.
    lists: a hash of each list that a rule names, where one does. groups: the most rows of a row group of Parquet that
    is not read in parts, where its pages allow that. Both are absent before 0.1.0.
    """

    shards: list[str]
    n_shards: int
    shards_hash: str
    rules: list[dict[str, Any]]
    columns: dict[str, str]
    refines: str | None
    lists: NotRequired[dict[str, str]]
    groups: NotRequired[int]


class Manifest(manifests.Manifest[Config]):
    """The manifest of a finished catalogue.

    counts: rows kept, and rows dropped by each rule. index: folder of the indices of tars. shards_fingerprint: SHA-256
    in hex of all shards' fingerprints. rules: as in config, with every share of best scores turned into a threshold.
    lineage: fingerprints of the catalogues that this one refines, the oldest first.
    """

    counts: dict[str, int]
    index: str
    shards_fingerprint: str
    rules: list[dict[str, Any]]
    lineage: list[str]


@dataclass(frozen=True)
class Catalogue:
    """A finished catalogue, open for reading."""

    directory: str
    manifest: Manifest

    @cached_property
    def shards(self) -> pa.Table:
        """A row per shard (columns: tables.SHARDS)."""
        with damage.made_again_by(STAGE):
            return storage.open_parquet(f"{self.directory}/shards.parquet").read()

    @cached_property
    def row_groups(self) -> pa.Table:
        """A row per row group of every shard (columns: tables.ROW_GROUPS)."""
        with damage.made_again_by(STAGE):
            return storage.open_parquet(f"{self.directory}/row_groups.parquet").read()

    def row_group_sizes(self, shard: int) -> list[int]:
        """Number of rows of each row group of a shard."""
        first, last = self._first_row_groups[shard : shard + 2].tolist()
        sizes: list[int] = self.row_groups["rows"].slice(first, last - first).to_pylist()
        return sizes

    @cached_property
    def _first_row_groups(self) -> NDArray[np.int64]:
        """Where each shard begins in `row_groups`, which is sorted by shard; and the number of its rows."""
        shards = self.row_groups["shard"].to_numpy()
        return np.searchsorted(shards, np.arange(len(self.shards) + 1))

    def by_row_group(self, rows: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Rows, given as (shard, row of the shard), by (shard, row group): for each its row within the row group, and
        its position in `rows`."""
        inside = defaultdict(list)
        starts = {shard: np.cumsum([0, *self.row_group_sizes(shard)]) for shard in {shard for shard, _ in rows}}
        for position, (shard, row) in enumerate(rows):
            group = int(np.searchsorted(starts[shard], row, "right")) - 1
            inside[shard, group].append((row - int(starts[shard][group]), position))
        return inside

    def lines_up_with(self, fingerprint: str) -> bool:
        """Whether its rows stand as in the catalogue with this fingerprint: it is the same, or refines that one."""
        return fingerprint in (self.manifest["fingerprint"], *self.manifest["lineage"])

    def place(self, number: int) -> Place:
        """Where shard `number` and its part are."""
        return self.places.place(number)

    @cached_property
    def places(self) -> Places:
        """Where all shards and their parts are."""
        paths = self.shards["path"].combine_chunks()
        was_before = "is_paged" not in self.shards.column_names  # of 0.1.0, which read no Parquet file in parts
        is_paged = np.zeros(len(paths), bool) if was_before else self.shards["is_paged"].to_numpy()
        return Places(paths, self.directory, self.manifest["index"], is_paged)

    def order(self, run: Run, slots: NDArray[np.int64] | None = None) -> "Order":
        """The order in which a run sees the catalogue's rows.

        slots: number of slots of each row group (default: the sum of its multiplicities); fewer where kept rows have no
        embeddings.
        """
        from jest_core.examples.order import Order  # imports PyTorch, which no worker of this stage needs

        groups = self.row_groups
        shards = groups["shard"].to_numpy().astype(np.int64)
        return Order(
            shards,
            groups["row_group"].to_numpy().astype(np.int64),
            groups["slots"].to_numpy() if slots is None else slots,
            seed=run.seed,
            n_streams=run.data.n_streams,
            window_rows=run.data.window_rows,
            sources=self.shards["source"].to_numpy().astype(np.int64)[shards],
            weights=run.data.weights,
        )


def open_catalogue(directory: str) -> Catalogue:
    """A finished catalogue. Raises FileNotFoundError, with the remedy, where `jest catalogue` has not finished."""
    return Catalogue(directory, manifests.finished(directory, STAGE, Manifest, "run `jest catalogue` first"))


def held_catalogue(directory: str) -> Catalogue:
    """The same for a task: a worker process keeps the tables that it has read, for its next task."""
    return _cached(directory, open_catalogue(directory).manifest["fingerprint"])


@lru_cache(maxsize=2)
def _cached(directory: str, fingerprint: str) -> Catalogue:
    return open_catalogue(directory)


@owner.until_return
def run_stage(run: Run) -> Catalogue:
    """Write the catalogue of data.shards. A second run does the shards that are missing."""
    directory = run.path(run.data.catalogue)
    by_source = [shard_paths.expand([source], run.path("")) for source in run.data.sources]
    paths = [path for source in by_source for path in source]
    sources = [i for i, source in enumerate(by_source) for _ in source]
    parent = open_catalogue(run.path(run.data.refines)) if run.data.refines else None
    config: Config = {
        "shards": run.data.sources,
        "n_shards": len(paths),
        "shards_hash": storage.fingerprint([paths, sources]),
        "rules": [rule.model_dump() for rule in run.data.rules],
        "columns": run.data.columns,
        "refines": parent.manifest["fingerprint"] if parent else None,
        "groups": MANY_ROWS,
    }
    if versions := rules.list_versions(run):
        config["lists"] = versions
    if not manifests.is_finished(directory):  # before it is begun: the same directory serves the corrected run file
        first_shards.check(run, by_source)
    if (manifest := _begin(directory, config)) is not None and _is_whole(directory, len(paths)):
        progress.say(STAGE, f"already at {directory}: {audit(manifest['counts'])}")
        return Catalogue(directory, manifest)
    if manifest is not None and "groups" not in manifest["config"]:
        del config["groups"]  # what is made again of it keeps its row groups
    owner.claim(directory)  # of a finished one too, of which damaged parts are made again
    if parent and parent.manifest["config"]["shards_hash"] != config["shards_hash"]:
        raise ValueError(
            f"data.refines {run.data.refines} is a catalogue of other shards than data.shards: name the shards that it"
            " was made of"
        )
    _check_scores(run, parent)
    names = ", ".join(rule.rule for rule in run.data.rules) or "none"
    progress.say(STAGE, f"{len(paths):,} shards, rules {names}: reading metadata only")
    cluster.connect()
    cluster.data_context(cluster.n_cores() if cluster.is_local() else None)  # each task keeps one core busy
    run = rules.with_thresholds(run)
    index = parent.manifest["index"] if parent else f"{directory}/index"
    paged = parent.places.is_paged if parent else np.zeros(len(paths), bool)
    places = Places(pa.array(paths, pa.string()), directory, index, paged)
    descriptions = _describe_all(run, places, parent, whole="groups" not in config)
    descriptions.write_tables(directory, paths, sources)
    counts = descriptions.counts()
    _refuse_nothing_kept(directory, counts)
    manifest = manifests.finish(
        directory,
        Manifest(
            stage=STAGE,
            complete=True,
            config=config,
            counts=dict(sorted(counts.items())),
            index=index,
            shards_fingerprint=storage.fingerprint(descriptions.fingerprints),
            rules=[rule.model_dump() for rule in run.data.rules],
            lineage=[*parent.manifest["lineage"], parent.manifest["fingerprint"]] if parent else [],
        ),
    )
    progress.say(STAGE, audit(manifest["counts"]))
    return Catalogue(directory, manifest)


def _describe_all(run: Run, places: Places, parent: Catalogue | None, *, whole: bool) -> Descriptions:
    """Write the parts that are missing; returns what all parts say. whole: as in write_missing."""
    descriptions = Descriptions(len(places))
    for number, description in write_missing(run, places, parent.directory if parent else None, whole):
        descriptions.add(number, description)
    if run.data.rules and isinstance(run.data.rules[-1], DuplicateRule):
        for number, description in duplicates.drop(places.directory, len(places)):
            descriptions.add(number, description)
    return descriptions


def _begin(directory: str, config: Config) -> Manifest | None:
    """The manifest of a finished catalogue. A directory that no part is in yet may be begun with another configuration;
    one of an earlier version does not say what its lists were."""
    return manifests.begin(
        directory,
        STAGE,
        config,
        Manifest,
        today=lambda old: {"lists": config.get("lists"), "groups": MANY_ROWS, **old},
        extends=lambda *_: not storage.names(f"{directory}/parts"),
    )


def _refuse_nothing_kept(directory: str, counts: Counter[str]) -> None:
    """Raises ValueError where no row is kept, and leaves no part that another try would take for its own."""
    if not counts[KEPT]:
        storage.remove_tree(f"{directory}/parts")
        raise ValueError(f"data.rules keep no row ({audit(counts)}): correct data.rules, data.columns or data.shards")


def _is_whole(directory: str, n_shards: int) -> bool:
    """Whether a finished catalogue needs nothing made again: a part, or the tables that are made of them."""
    try:
        for name in ("shards", "row_groups"):
            storage.open_parquet(f"{directory}/{name}.parquet").read()
    except (Damaged, FileNotFoundError):
        return False
    return damage.whole(f"{directory}/parts") >= {part_name(number) for number in range(n_shards)}


def _check_scores(run: Run, parent: Catalogue | None) -> None:
    """Raises ValueError where a rule reads a score cache whose rows do not stand as those of the parent catalogue."""
    for rule in run.data.rules:
        if not (isinstance(rule, ScoreRule) and rule.scores):
            continue
        scores = manifests.finished(
            run.path(rule.scores), "reference-scores", manifests.AnyManifest, "run `jest reference-scores` first"
        )
        if parent is None or not parent.lines_up_with(scores["config"]["catalogue"]):
            raise ValueError(
                f"{rule.scores} was scored for another catalogue than data.refines {run.data.refines}: set data.refines"
                " to the catalogue that was scored"
            )


def audit(counts: dict[str, int]) -> str:
    """Rows kept, and dropped by each rule, in one line."""
    dropped = {rule: n for rule, n in counts.items() if rule != KEPT}
    kept, total = counts.get(KEPT, 0), sum(counts.values())
    by = ", ".join(f"{rule} {n:,}" for rule, n in sorted(dropped.items(), key=lambda item: -item[1]))
    return f"kept {kept:,} of {total:,} rows" + (f"; dropped by {by}" if by else "")
