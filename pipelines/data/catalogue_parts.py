"""One shard -> its part of a catalogue: each of its rows, how often it is kept, and the rule that dropped it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jest_core import tables
from jest_core.run_file import Run
from jest_core.run_file.rules import DuplicateRule

from ..base import owner, progress, storage
from . import rules
from .places import Place
from .shards import Shard
from .tar_index import write_index

if TYPE_CHECKING:
    import ray

KEPT = "kept"
_NO_CAPTION = "kept rows without a caption"
_SEVERAL = 20  # so many rows without a caption are no accident of a small shard
_DESCRIPTION = b"jest.shard"  # key of a part's Parquet metadata


class Description(TypedDict):
    """What a part says of its shard, as JSON in its Parquet metadata.

    bytes: size of the shard's file. rows: of the shard. fingerprint: SHA-256 in hex of its size, its number of rows and
    its uids in order. counts: rows that are kept, and rows that each rule dropped. group_rows: rows of each row group.
    group_slots: sum of the multiplicities of each row group. notes: what is unusual in the shard -> how often it is,
    and an example; absent before 0.1.0.
    """

    bytes: int
    rows: int
    fingerprint: str
    counts: dict[str, int]
    group_rows: list[int]
    group_slots: list[int]
    notes: NotRequired[dict[str, tuple[int, str]]]


class _Item(TypedDict):
    """A row of Ray Data: a shard, and whether its part is there already."""

    place: Place
    done: bool


class _Described(TypedDict):
    """A row of Ray Data: the number of a shard, and the description of its part in JSON."""

    number: int
    description: str


def describe(part: str) -> Description:
    """The description of a part; reads only the file's footer."""
    description: Description = json.loads(storage.open_parquet(part).schema_arrow.metadata[_DESCRIPTION])
    return description


def write_missing(run: Run, places: Sequence[Place], parent: str | None) -> dict[int, Description]:
    """Write the parts that are missing; returns the description of every shard's part, by its number.

    parent: the directory of the catalogue that data.refines names.
    """
    import ray
    import ray.data

    lists = {name: ray.put(entries) for name, entries in rules.load_lists(run).items()}
    written = set(storage.names(places[0].part_path.rpartition("/")[0], ".parquet")) if places else set()
    items: list[_Item] = [{"place": place, "done": place.part_path.rpartition("/")[2] in written} for place in places]
    stage = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map(
        partial(owner.carried(_write_shard), run=run, lists=lists, parent=parent)  # type: ignore[arg-type]
    )
    descriptions: dict[int, Description] = {}
    with progress.bar("catalogue", len(items), "shards") as advance:
        for row in stage.iter_rows():
            descriptions[row["number"]] = json.loads(row["description"])
            advance(1)
    _say_notes(run, descriptions)
    return descriptions


def _say_notes(run: Run, descriptions: Mapping[int, Description]) -> None:
    """Say what is unusual in the shards. Raises ValueError where too many of all rows have no caption."""
    n_rows = sum(description["rows"] for description in descriptions.values())
    notes: dict[str, tuple[int, str]] = {}
    for description in descriptions.values():
        for what, (n, example) in description.get("notes", {}).items():
            before, first = notes.get(what, (0, example))
            notes[what] = before + n, first
    for what, (n, example) in sorted(notes.items()):
        progress.warn("catalogue", f"{n:,} {what} (such as {example})")
    n_empty, example = notes.get(_NO_CAPTION, (0, ""))
    _refuse_empty(run, "the catalogue", n_empty, n_rows, example)


def _refuse_empty(run: Run, what: str, n: int, n_rows: int, example: str) -> None:
    if n > run.data.max_empty_captions * n_rows:
        raise ValueError(
            f"{what}: {n:,} of {n_rows:,} rows are kept without a caption, more than data.max_empty_captions "
            f"{run.data.max_empty_captions}, such as {example}: name the column of captions in data.columns, drop such "
            "rows with the rule `caption`, or raise the share"
        )


@storage.retried
def _write_shard(
    item: _Item, run: Run, lists: "Mapping[str, ray.ObjectRef[rules.List]]", parent: str | None
) -> _Described:
    """One shard -> one part, in the shard's row groups."""
    place = item["place"]
    if not item["done"]:
        import ray

        if place.index_path is not None and parent is None:
            write_index(place.path, place.index_path)
        size = storage.size(place.path)  # before it is read: if it changes meanwhile, its uids will show it
        shard = place.open(run.data.columns)
        entries = {name: ray.get(reference) for name, reference in lists.items()}
        before = replace(place, directory=parent) if parent else None
        groups = [_apply(run, place, shard, i, entries, before) for i in range(len(shard.row_group_sizes))]
        notes = _notes(run, shard, groups) if parent is None else {}
        write(place.part_path, groups, shard.row_group_sizes, size, notes)
    return {"number": place.number, "description": json.dumps(describe(place.part_path))}


def _apply(
    run: Run, place: Place, shard: Shard, row_group: int, lists: Mapping[str, rules.List], parent: Place | None
) -> pa.Table:
    """The rows of a row group as the part has them; `dropped_by` names the first rule that drops a row."""
    if parent is None:
        uids = shard.uids(row_group)
        multiplicity = np.ones(len(uids), dtype=np.int64)
        dropped: NDArray[np.object_] = np.full(len(uids), None, dtype=object)
    else:
        part = storage.open_parquet(parent.part_path).read_row_group(row_group)
        uids, multiplicity = parent.aligned(shard, row_group)
        dropped = np.array(part["dropped_by"].to_pylist(), dtype=object)
    for rule in run.data.rules:
        times = rules.apply(rule, shard, row_group, uids, lists, rules.scores_part(rule, run, place.number))
        dropped[(times == 0) & (multiplicity > 0)] = rule.rule
        multiplicity = multiplicity * times
    columns = {"uid": uids, "dropped_by": dropped.tolist(), "multiplicity": multiplicity}
    table = pa.table(columns).cast(tables.CATALOGUE)
    if run.data.rules and isinstance(run.data.rules[-1], DuplicateRule):
        keys = rules.duplicate_keys(run.data.rules[-1], shard, row_group, uids)
        table = table.append_column("duplicate_key", pc.if_else(pc.greater(table["multiplicity"], 0), keys, None))
    return table


def _notes(run: Run, shard: Shard, groups: Sequence[pa.Table]) -> dict[str, tuple[int, str]]:
    """What is unusual in a shard. Raises ValueError where too many of its rows have no caption."""
    notes = dict[str, tuple[int, str]]()
    first: dict[str, int] = {}  # uid -> the first row that has it
    empty, again, start = list[int](), list[int](), 0
    for row_group, table in enumerate(groups):
        kept = table["multiplicity"].to_numpy() > 0
        for row, uid in enumerate(table["uid"].to_pylist()):
            if kept[row] and first.setdefault(uid, start + row) != start + row:
                again.append(start + row)
        if shard.actual("caption") is not None:
            blank = np.array([not caption.strip() for caption in shard.captions(row_group)], dtype=bool)
            empty += (np.flatnonzero(kept & blank) + start).tolist()
        start += len(table)
    if again and not any(isinstance(rule, DuplicateRule) for rule in run.data.rules):
        notes["rows with the uid of an earlier row of their shard"] = len(again), f"row {again[0]} of {shard.path}"
    if empty:
        example = f"row {empty[0]} of {shard.path}, which has the columns {shard.listed()}"
        notes[_NO_CAPTION] = len(empty), example
        if len(empty) >= _SEVERAL:
            _refuse_empty(run, shard.path, len(empty), start, example)
    for (column, row_group), values in shard.no_numbers.items():
        if values:
            what = f"values of column {column} that are no numbers count as missing"
            n, example = notes.get(what, (0, f"{values[0][:80]!r} in row group {row_group} of {shard.path}"))
            notes[what] = n + len(values), example
    return notes


def write(
    part: str,
    groups: Sequence[pa.Table],
    row_group_sizes: list[int],
    size: int,
    notes: dict[str, tuple[int, str]] | None = None,
) -> Description:
    """Write a part with its description in its metadata; returns the description. size: bytes of the shard's file.
    notes: as in Description."""
    table = pa.concat_tables(groups) if groups else tables.CATALOGUE.empty_table()
    uids = table["uid"].to_pylist()
    counts = Counter(KEPT if rule is None else rule for rule in table["dropped_by"].to_pylist())
    description: Description = {
        "bytes": size,
        "rows": len(table),
        "fingerprint": storage.fingerprint([size, len(uids), storage.fingerprint(uids)]),
        "counts": dict(sorted(counts.items())),
        "group_rows": row_group_sizes,
        "group_slots": [int(pc.sum(group["multiplicity"]).as_py() or 0) for group in groups],
        "notes": notes or {},
    }
    table = table.replace_schema_metadata({_DESCRIPTION: json.dumps(description).encode()})
    storage.write_table(part, table, row_group_sizes)
    return description
