"""One shard -> its part of a catalogue: each of its rows, how often it is kept, and the rule that dropped it."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jest_core import tables
from jest_core.run_file import Run
from jest_core.run_file.rules import DuplicateRule

from ..base import damage, owner, progress, storage
from ..base.shard_paths import is_tar
from . import rules
from .layouts import write_index
from .places import Place, Places
from .shards import Shard, part_name

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
    and an example. named: rows that each deny-list or subset names, by its name in rules.load_lists. is_paged: the
    shard is a Parquet file with an index. The last three are absent before 0.1.0.
    """

    bytes: int
    rows: int
    fingerprint: str
    counts: dict[str, int]
    group_rows: list[int]
    group_slots: list[int]
    notes: NotRequired[dict[str, tuple[int, str]]]
    named: NotRequired[dict[str, int]]
    is_paged: NotRequired[bool]


class _Item(TypedDict):
    """A shard, and whether its part is there already."""

    place: Place
    done: bool


class _Described(TypedDict):
    """A row of Ray Data: the number of a shard, and the description of its part in JSON."""

    number: int
    description: str


def describe(part: str) -> Description:
    """The description of a part; reads only the file's footer."""
    with damage.noted(part, "catalogue"):
        description: Description = json.loads(storage.open_parquet(part).schema_arrow.metadata[_DESCRIPTION])
    return description


def write_missing(run: Run, places: Places, parent: str | None, whole: bool) -> Iterator[tuple[int, Description]]:
    """Write the parts that are missing; returns the number of every shard and the description of its part.

    parent: the directory of the catalogue that data.refines names. whole: large row groups of Parquet are not read in
    parts, as before 0.1.0. Raises ValueError at the end where too many of all rows have no caption.
    """
    import ray
    import ray.data

    loaded = rules.load_lists(run)
    lists = {name: ray.put(entries) for name, entries in loaded.items()}
    names = damage.whole(f"{places.directory}/parts")
    done = np.array([part_name(number) in names for number in range(len(places))], bool)
    settings = {"run": run, "lists": lists, "parent": parent, "whole": whole, "todo": ray.put((places, done))}
    stage = ray.data.range(len(places), override_num_blocks=min(len(places), 1000)).map(
        partial(owner.carried(_write_numbered), **settings)  # type: ignore[arg-type]
    )
    notes = _Notes()
    with progress.bar("catalogue", len(places), "shards") as advance:
        for row in stage.iter_rows():
            description: Description = json.loads(row["description"])
            notes.add(description)
            yield row["number"], description
            advance(1)
    notes.say(run)
    if notes.named is not None:
        rules.say_unused("catalogue", loaded, notes.named, notes.n_rows)


class _Notes:
    """What the parts say that a person should read.

    notes: as in Description, of all shards. named: the same; None where a part of an earlier version lacks it.
    """

    def __init__(self) -> None:
        self.n_rows = 0
        self.notes: dict[str, tuple[int, str]] = {}
        self.named: Counter[str] | None = Counter()

    def add(self, description: Description) -> None:
        self.n_rows += description["rows"]
        for what, (n, example) in description.get("notes", {}).items():
            before, first = self.notes.get(what, (0, example))
            self.notes[what] = before + n, first
        if self.named is not None and "named" in description:
            self.named.update(description["named"])
        else:
            self.named = None

    def say(self, run: Run) -> None:
        """Raises ValueError where too many of all rows have no caption."""
        for what, (n, example) in sorted(self.notes.items()):
            progress.warn("catalogue", f"{n:,} {what} (such as {example})")
        n_empty, example = self.notes.get(_NO_CAPTION, (0, ""))
        _refuse_empty(run, "the catalogue", n_empty, self.n_rows, example)


def _refuse_empty(run: Run, what: str, n: int, n_rows: int, example: str) -> None:
    if n > run.data.max_empty_captions * n_rows:
        raise ValueError(
            f"{what}: {n:,} of {n_rows:,} rows are kept without a caption, more than data.max_empty_captions "
            f"{run.data.max_empty_captions}, such as {example}: name the column of captions in data.columns, drop such "
            "rows with the rule `caption`, or raise the share"
        )


def _write_numbered(row: dict[str, int], todo: "ray.ObjectRef[Any]", **settings: Any) -> _Described:
    """Column `id`, the number of a shard -> its part."""
    import ray

    places, done = ray.get(todo)
    number = int(row["id"])
    return _write_shard({"place": places.place(number), "done": bool(done[number])}, **settings)


@storage.retried
def _write_shard(
    item: _Item, run: Run, lists: "Mapping[str, ray.ObjectRef[rules.List]]", parent: str | None, whole: bool = False
) -> _Described:
    """One shard -> one part, in the shard's row groups."""
    place = item["place"]
    if not item["done"]:
        import ray

        if parent is None and (is_tar(place.path) or not whole):
            indexed = replace(place, is_paged=not is_tar(place.path))
            place = indexed if write_index(place.path, run.data.columns, str(indexed.index_path)) else place
        size = storage.size(place.path)  # before it is read: if it changes meanwhile, its uids will show it
        shard = place.open(run.data.columns)
        entries = {name: ray.get(reference) for name, reference in lists.items()}
        before = replace(place, directory=parent) if parent else None
        named = Counter[str]()
        groups = [_apply(run, place, shard, i, entries, before, named) for i in range(len(shard.row_group_sizes))]
        notes = _notes(run, shard, groups) if parent is None else {}
        write(place.part_path, groups, shard.row_group_sizes, size, notes, named, place.is_paged)
        damage.remove_note(place.part_path)
    return {"number": place.number, "description": json.dumps(describe(place.part_path))}


def _apply(
    run: Run,
    place: Place,
    shard: Shard,
    row_group: int,
    lists: Mapping[str, rules.List],
    parent: Place | None,
    named: Counter[str],
) -> pa.Table:
    """The rows of a row group as the part has them; `dropped_by` names the first rule that drops a row. Adds to
    `named` what the description of the part has of it."""
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
        rules.count_named(rule, times, named)
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
    named: Mapping[str, int] | None = None,
    is_paged: bool = False,
) -> Description:
    """Write a part with its description in its metadata; returns the description. size: bytes of the shard's file.
    notes, named, is_paged: as in Description."""
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
        "named": dict(named or {}),
        "is_paged": is_paged,
    }
    table = table.replace_schema_metadata({_DESCRIPTION: json.dumps(description).encode()})
    storage.write_table(part, table, row_group_sizes)
    return description
