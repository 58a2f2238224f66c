"""Image shards -> catalogue: which rows are kept, how often each comes, and the rule that dropped each of the others.

One pass over metadata; no image is read or copied. A part per shard mirrors all its rows, so that a catalogue made of
another one (data.refines), and a score cache made for either, line up row by row. <catalogue>/ holds parts/,
shards.parquet and row_groups.parquet (what a run's order is made of), index/ for tars, and the manifest.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jest_core import tables
from jest_core.run_file import Run
from jest_core.run_file.rules import DuplicateRule, ScoreRule

from ..base import cluster, progress, storage
from . import rules
from .layouts import open_shard
from .shards import Shard, part_name
from .tars import write_index

if TYPE_CHECKING:
    from jest_core.examples.order import Order

KEPT = "kept"
_DESCRIPTION = b"jest.shard"  # in a part's metadata: its line of shards.parquet and its sizes
_BUCKETS = 64  # tasks that look for duplicates, each among its share of the keys


@dataclass(frozen=True)
class Catalogue:
    """A finished catalogue, open for reading."""

    directory: str
    manifest: dict[str, Any]

    @cached_property
    def shards(self) -> pa.Table:
        """tables.SHARDS"""
        return storage.open_parquet(f"{self.directory}/shards.parquet").read()

    @cached_property
    def row_groups(self) -> pa.Table:
        """tables.ROW_GROUPS"""
        return storage.open_parquet(f"{self.directory}/row_groups.parquet").read()

    def row_group_sizes(self, shard: int) -> list[int]:
        sizes: list[int] = self.row_groups.filter(pc.equal(self.row_groups["shard"], shard))["rows"].to_pylist()
        return sizes

    def by_row_group(self, rows: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """(shard, row group) -> (row within it, position in `rows`), of rows (shard, row of the shard)."""
        inside = defaultdict(list)
        starts = {shard: np.cumsum([0, *self.row_group_sizes(shard)]) for shard in {shard for shard, _ in rows}}
        for position, (shard, row) in enumerate(rows):
            group = int(np.searchsorted(starts[shard], row, "right")) - 1
            inside[shard, group].append((row - int(starts[shard][group]), position))
        return inside

    def place(self, number: int) -> "Place":
        return Place(number, self.shards["path"][number].as_py(), self.directory, self.manifest["index"])

    def order(self, run: Run, slots: NDArray[np.int64] | None = None) -> "Order":
        """The order of the catalogue's rows; slots: of each row group, where fewer rows are good than kept."""
        from jest_core.examples.order import Order  # and with it PyTorch, which no worker of this stage needs

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


@dataclass(frozen=True)
class Place:
    """Where a worker finds a shard and what the catalogue says of it."""

    number: int
    path: str
    directory: str
    index: str

    def open(self, columns: dict[str, str]) -> Shard:
        index = f"{self.index}/{part_name(self.number)}" if self.path.endswith(".tar") else None
        return open_shard(self.path, columns, index)

    def rows(self, row_group: int) -> tuple[list[str], NDArray[np.int64]]:
        """uid and multiplicity of each row of a row group."""
        file = storage.open_parquet(f"{self.directory}/parts/{part_name(self.number)}")
        part = file.read_row_group(row_group, columns=["uid", "multiplicity"])
        return part["uid"].to_pylist(), part["multiplicity"].to_numpy().astype(np.int64)

    def aligned(self, shard: Shard, row_group: int) -> tuple[list[str], NDArray[np.int64]]:
        """The same. Raises ValueError where the shard is not the one that was catalogued."""
        uids, multiplicity = self.rows(row_group)
        if row_group >= len(shard.row_group_sizes) or shard.uids(row_group) != uids:
            raise ValueError(
                f"{self.path}, row group {row_group}, changed since it was catalogued: run `jest catalogue` into a new "
                "directory"
            )
        return uids, multiplicity


def open_catalogue(directory: str) -> Catalogue:
    """Raises FileNotFoundError, with the remedy, where `jest catalogue` has not finished."""
    return Catalogue(directory, storage.finished(directory, "catalogue", "run `jest catalogue` first"))


def held_catalogue(directory: str) -> Catalogue:
    """The same for a task: a worker's process keeps what was read of it for its next task."""
    return _held(directory, open_catalogue(directory).manifest["fingerprint"])


@lru_cache(maxsize=2)
def _held(directory: str, fingerprint: str) -> Catalogue:
    return open_catalogue(directory)


def run_stage(run: Run) -> Catalogue:
    """Write the catalogue of data.shards. A second run does the shards that are missing."""
    directory = run.path(run.data.catalogue)
    found = [storage.expand([source], run.path("")) for source in run.data.sources]
    paths = [path for source in found for path in source]
    sources = [i for i, source in enumerate(found) for _ in source]
    parent = open_catalogue(run.path(run.data.refines)) if run.data.refines else None
    config = {
        "shards": run.data.sources,
        "n_shards": len(paths),
        "shards_hash": storage.fingerprint([paths, sources]),
        "rules": [rule.model_dump() for rule in run.data.rules],
        "columns": run.data.columns,
        "refines": parent.manifest["fingerprint"] if parent else None,
    }
    if (manifest := storage.begin(directory, "catalogue", config)) is not None:
        progress.say("catalogue", f"already at {directory}: {audit(manifest['counts'])}")
        return Catalogue(directory, manifest)
    if parent and parent.manifest["config"]["shards_hash"] != config["shards_hash"]:
        raise ValueError(f"data.refines {run.data.refines} is a catalogue of other shards than data.shards")
    _check_scores(run, parent)
    names = ", ".join(rule.rule for rule in run.data.rules) or "none"
    progress.say("catalogue", f"{len(paths):,} shards, rules {names}: reading metadata only")
    cluster.connect()
    cluster.data_context(cluster.n_cores() if cluster.is_local() else None)  # each task keeps one busy
    run = rules.with_thresholds(run)
    index = parent.manifest["index"] if parent else f"{directory}/index"
    described = _catalogue_shards(run, paths, directory, index, parent)
    if run.data.rules and isinstance(run.data.rules[-1], DuplicateRule):
        described |= _drop_duplicates(directory, described)
    lines = [described[i] for i in range(len(paths))]
    shards = pa.Table.from_pylist(
        [
            {**line, "counts": list(line["counts"].items()), "path": p, "source": s}
            for line, p, s in zip(lines, paths, sources, strict=True)
        ],
        schema=tables.SHARDS,
    )
    storage.write_table(f"{directory}/shards.parquet", shards)
    groups = [
        {"shard": i, "row_group": g, "rows": rows, "slots": slots}
        for i, line in enumerate(lines)
        for g, (rows, slots) in enumerate(zip(line["group_rows"], line["group_slots"], strict=True))
    ]
    storage.write_table(f"{directory}/row_groups.parquet", pa.Table.from_pylist(groups, schema=tables.ROW_GROUPS))
    counts = sum((Counter(line["counts"]) for line in lines), Counter[str]())
    manifest = storage.finish(
        directory,
        "catalogue",
        config,
        counts=dict(sorted(counts.items())),
        index=index,
        shards_fingerprint=storage.fingerprint([line["fingerprint"] for line in lines]),
        rules=[rule.model_dump() for rule in run.data.rules],
        lineage=[*parent.manifest["lineage"], parent.manifest["fingerprint"]] if parent else [],
    )
    progress.say("catalogue", audit(manifest["counts"]))
    return Catalogue(directory, manifest)


def _check_scores(run: Run, parent: Catalogue | None) -> None:
    """A score cache lines up, row by row, with the catalogue it was made for and those that refine it."""
    for rule in run.data.rules:
        if not (isinstance(rule, ScoreRule) and rule.scores):
            continue
        scores = storage.finished(run.path(rule.scores), "reference-scores", "run `jest reference-scores` first")
        made_for = scores["config"]["catalogue"]
        if parent is None or made_for not in (parent.manifest["fingerprint"], *parent.manifest["lineage"]):
            raise ValueError(
                f"{rule.scores} was scored for another catalogue than data.refines {run.data.refines}: name the one"
                " that it was made for there"
            )


def _catalogue_shards(
    run: Run, paths: list[str], directory: str, index: str, parent: Catalogue | None
) -> dict[int, dict[str, Any]]:
    """Write the parts that are missing; describe all."""
    import ray.data

    lists = {name: ray.put(found) for name, found in rules.load_lists(run).items()}
    places = [Place(i, path, directory, index) for i, path in enumerate(paths)]
    done = set(storage.names(f"{directory}/parts", ".parquet"))
    items = [{"place": place, "done": part_name(place.number) in done} for place in places]
    stage = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map(
        partial(_catalogue_shard, run=run, lists=lists, parent=parent.directory if parent else None)
    )
    described = {}
    with progress.bar("catalogue", len(items), "shards") as advance:
        for row in stage.iter_rows():
            described[row["number"]] = json.loads(row["description"])
            advance(1)
    return described


@storage.retried
def _catalogue_shard(item: dict[str, Any], run: Run, lists: dict[str, Any], parent: str | None) -> dict[str, Any]:
    """One shard -> one part, in the shard's row groups, and its description."""
    place: Place = item["place"]
    part = f"{place.directory}/parts/{part_name(place.number)}"
    if not item["done"]:
        import ray

        if place.path.endswith(".tar") and parent is None:
            write_index(place.path, f"{place.index}/{part_name(place.number)}")
        size = storage.size(place.path)  # before it is read: what changes meanwhile is noticed by its uids
        shard = place.open(run.data.columns)
        held = {name: ray.get(reference) for name, reference in lists.items()}
        before = Place(place.number, place.path, parent, place.index) if parent else None
        groups = [_apply(run, place, shard, i, held, before) for i in range(len(shard.row_group_sizes))]
        _write_part(part, groups, shard.row_group_sizes, size)
    metadata = storage.open_parquet(part).schema_arrow.metadata
    return {"number": place.number, "description": metadata[_DESCRIPTION].decode()}


def _apply(
    run: Run, place: Place, shard: Shard, row_group: int, lists: dict[str, Any], parent: Place | None
) -> pa.Table:
    """A row group's rows of the part: the first rule that drops a row is named."""
    if parent is None:
        uids = shard.uids(row_group)
        multiplicity = np.ones(len(uids), dtype=np.int64)
        dropped: NDArray[np.object_] = np.full(len(uids), None, dtype=object)
    else:
        file = storage.open_parquet(f"{parent.directory}/parts/{part_name(place.number)}")
        part = file.read_row_group(row_group)
        uids, multiplicity = parent.aligned(shard, row_group)
        dropped = np.array(part["dropped_by"].to_pylist(), dtype=object)
    for rule in run.data.rules:
        times = rules.apply(rule, shard, row_group, uids, lists, rules.scores_part(rule, run, place.number))
        dropped[(times == 0) & (multiplicity > 0)] = rule.rule
        multiplicity = multiplicity * times
    columns: dict[str, Any] = {"uid": uids, "dropped_by": dropped.tolist(), "multiplicity": multiplicity}
    table = pa.table(columns).cast(tables.CATALOGUE)
    if run.data.rules and isinstance(run.data.rules[-1], DuplicateRule):
        keys = rules.duplicate_keys(run.data.rules[-1], shard, row_group, uids)
        table = table.append_column("duplicate_key", pc.if_else(pc.greater(table["multiplicity"], 0), keys, None))
    return table


def _write_part(path: str, groups: list[pa.Table], row_group_sizes: list[int], size: int) -> dict[str, Any]:
    """Write a part with its description in its metadata; returns the description."""
    table = pa.concat_tables(groups) if groups else tables.CATALOGUE.empty_table()
    uids = table["uid"].to_pylist()
    counts = Counter(KEPT if rule is None else rule for rule in table["dropped_by"].to_pylist())
    description = {
        "bytes": size,
        "rows": len(table),
        "fingerprint": storage.fingerprint([size, len(uids), storage.fingerprint(uids)]),
        "counts": dict(sorted(counts.items())),
        "group_rows": row_group_sizes,
        "group_slots": [int(pc.sum(group["multiplicity"]).as_py() or 0) for group in groups],
    }
    table = table.replace_schema_metadata({_DESCRIPTION: json.dumps(description).encode()})
    storage.write_table(path, table, row_group_sizes)
    return description


def _drop_duplicates(directory: str, described: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Of kept rows with one key, all but the first of the first shard are dropped; returns the parts that changed."""
    import ray.data

    cluster.data_context()  # its actors have to run all at once
    keys = ray.data.from_items(
        [{"number": i, "part": f"{directory}/parts/{part_name(i)}"} for i in described],
        override_num_blocks=min(len(described), 1000),
    ).flat_map(_kept_keys)
    repeats = keys.groupby("bucket", num_partitions=min(_BUCKETS, len(described))).map_groups(
        _repeats, batch_format="pyarrow"
    )
    changed = repeats.groupby("shard", num_partitions=min(_BUCKETS, len(described))).map_groups(
        partial(_drop, directory=directory), batch_format="pyarrow"
    )
    return {row["shard"]: json.loads(row["description"]) for row in changed.iter_rows()}


def _kept_keys(item: dict[str, Any]) -> list[dict[str, Any]]:
    keys = storage.open_parquet(item["part"]).read(columns=["duplicate_key"])["duplicate_key"].to_pylist()
    return [
        {"bucket": key[0] % _BUCKETS, "key": key, "shard": item["number"], "row": row}
        for row, key in enumerate(keys)
        if key is not None
    ]


def _repeats(bucket: pa.Table) -> pa.Table:
    """Rows of a bucket whose key an earlier row has."""
    ordered = bucket.sort_by([("key", "ascending"), ("shard", "ascending"), ("row", "ascending")])
    keys = ordered["key"].combine_chunks()
    again = pc.equal(keys[1:], keys[:-1]) if len(keys) > 1 else pa.array([], pa.bool_())
    return ordered.filter(pa.concat_arrays([pa.array([False]), again])).select(["shard", "row"])


def _drop(repeats: pa.Table, directory: str) -> pa.Table:
    """Write a shard's part again, without its repeats."""
    number = repeats["shard"][0].as_py()
    path = f"{directory}/parts/{part_name(number)}"
    file = storage.open_parquet(path)
    old = json.loads(file.schema_arrow.metadata[_DESCRIPTION])
    table = file.read()
    repeated = np.isin(np.arange(len(table)), repeats["row"].to_numpy())
    columns = {
        "dropped_by": pa.array(np.where(repeated, "duplicate", table["dropped_by"].to_numpy()), pa.string()),
        "multiplicity": pa.array(np.where(repeated, 0, table["multiplicity"].to_numpy()).astype(np.int32)),
    }
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    starts = np.cumsum([0, *old["group_rows"]]).tolist()
    groups = [table.slice(start, size) for start, size in zip(starts, old["group_rows"], strict=False)]
    description = _write_part(path, groups, old["group_rows"], old["bytes"])
    return pa.table({"shard": [number], "description": [json.dumps(description)]})


def audit(counts: dict[str, int]) -> str:
    """Rows kept, and dropped by each rule, in one line."""
    dropped = {rule: n for rule, n in counts.items() if rule != KEPT}
    kept, total = counts.get(KEPT, 0), sum(counts.values())
    by = ", ".join(f"{rule} {n:,}" for rule, n in sorted(dropped.items(), key=lambda item: -item[1]))
    return f"kept {kept:,} of {total:,} rows" + (f"; dropped by {by}" if by else "")
