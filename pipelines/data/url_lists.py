"""Metadata of URLs -> the lists that `jest ingest` fetches: a Parquet file of rows for each shard to be.

<shards>/urls/ has, for file i of ingest.urls, the lists IIIII-NNNNN.parquet and, written last, IIIII.json: the rows
that are kept and that each rule dropped. A further pass over what could not be fetched has retry-PPP-NNNNN.parquet.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from jest_core import run_file
from jest_core.run_file import Ingest, Run

from ..base import cluster, in_parallel, owner, progress, storage
from . import rules
from .layouts import open_shard
from .plain_columns import plain
from .shards import ALIASES, Shard, clean

HASH = "sha256"  # the column that ingest.verify_hash compares
_OPTED_OUT = "Use of image disallowed by X-Robots-Tag directive"  # in img2dataset's words
# Columns that img2dataset itself writes for each row
_WRITTEN = {"key", "caption", "url", "status", "error_message", "width", "height", "original_width", "original_height"}
_WRITTEN |= {"exif", "md5", "sha256", "sha512", "uid", "txt", "json"}


class _Retry(TypedDict):
    """retry-PPP.json: how many lists the pass has."""

    lists: int


@dataclass(frozen=True)
class Written:
    """What a file of metadata had. left_out: columns whose values JSON cannot hold. named: rows that each deny-list or
    subset names."""

    rows: int
    left_out: set[str]
    named: Counter[str]


def write(run: Run, directory: str, paths: list[str]) -> None:
    """Write the lists of each file of metadata: the rows that the rules keep, rows_per_shard in each list.

    A second call does the files that are missing.
    """
    done = storage.names(f"{directory}/urls", ".json")
    todo = [i for i in range(len(paths)) if f"{i:05d}.json" not in done]
    text, lists = run_file.dump(run), rules.load_lists(with_own_rules(run))
    there = ray.put(lists)
    jobs = [(text, paths[i], f"{directory}/urls/{i:05d}", there) for i in todo]
    n_tasks = cluster.n_tasks(run.ingest.n_tasks if run.ingest else None)
    start, left_out, named, n_rows = ray.remote(num_cpus=1)(owner.carried(write_file)), set[str](), Counter[str](), 0
    with progress.bar("ingest (lists)", len(todo), "files") as advance:
        for written in in_parallel.ray_tasks(start.remote, jobs, n_tasks):
            left_out |= written.left_out
            named += written.named
            n_rows += written.rows
            advance(1)
    if len(todo) == len(paths):
        rules.say_unused("ingest", lists, named, n_rows)
    if left_out:
        progress.say("ingest", f"columns that shards of pictures cannot have, left out: {', '.join(sorted(left_out))}")


def with_own_rules(run: Run) -> Run:
    """The run with the rules of `ingest` where those of `data` are."""
    assert run.ingest is not None
    return run.model_copy(update={"data": run.data.model_copy(update={"rules": run.ingest.rules})})


def write_file(run_text: str, path: str, prefix: str, lists: Mapping[str, rules.List]) -> Written:
    """Write the lists of one file of metadata, as prefix-NNNNN.parquet and prefix.json. lists: that the rules name, as
    rules.load_lists reads them."""
    spec = run_file.load(run_text).ingest
    assert spec is not None
    audit = Counter(dict.fromkeys(("kept", "url"), 0))
    shard = open_shard(path, spec.columns)
    others = _others(shard)
    left_out, named = set[str](), Counter[str]()

    def kept() -> Iterator[pa.Table]:
        for row_group in range(len(shard.row_group_sizes)):
            rows = _rows(shard, row_group, others, spec)
            left_out.update(set(others) - set(rows.column_names))
            urls = rows["url"].to_pylist()
            keep = np.array([bool(re.match("https?://", url, re.IGNORECASE)) for url in urls], dtype=bool)
            audit["url"] += int((~keep).sum())
            for rule in spec.rules:
                times = rules.apply(rule, shard, row_group, rows["uid"].to_pylist(), lists)
                rules.count_named(rule, times, named)
                by_rule = times > 0
                audit[rule.rule] += int((keep & ~by_rule).sum())
                keep &= by_rule
            audit["kept"] += int(keep.sum())
            yield rows.filter(pa.array(keep))

    _write_tables(kept(), prefix, spec.rows_per_shard)
    storage.write_json(f"{prefix}.json", dict(audit))
    return Written(sum(shard.row_group_sizes), left_out, named)


def read_audit(directory: str) -> dict[str, int]:
    """Rows of all files of metadata that are kept, and that each rule dropped (`url`: no HTTP or HTTPS URL)."""
    rows: Counter[str] = Counter()
    for name in storage.names(f"{directory}/urls", ".json"):
        if not name.startswith("retry-"):
            rows.update(storage.read_json(f"{directory}/urls/{name}"))
    return dict(rows)


def _others(shard: Shard) -> list[str]:
    """The metadata's columns that are carried beside uid, url and caption, by their names in the file."""
    used = {shard.actual(name) for name in ("uid", "url", "caption")}
    return sorted(shard.names - used - _WRITTEN - set(ALIASES["image"]))


def _rows(shard: Shard, row_group: int, others: list[str], spec: Ingest) -> pa.Table:
    """uid, url and caption by those names, and other columns as JSON can hold them."""
    columns = {
        "uid": shard.uids(row_group),
        "url": [url.strip() for url in shard.strings(row_group, "url")],
        "caption": shard.captions(row_group),
    }
    refuse_columns(shard, spec)
    if spec.verify_hash:
        hashes = plain(shard.table(row_group, [HASH]))  # in hex, where they are bytes of a fixed size
        values = hashes[HASH].to_pylist() if hashes.column_names else shard.strings(row_group, HASH)
        columns[HASH] = [clean(value).lower() for value in values]
    rest = plain(shard.table(row_group, others)) if others else pa.table({})
    if spec.blur_boxes:
        kind = rest[spec.blur_boxes].type if spec.blur_boxes in rest.column_names else pa.binary()
        if not pa.types.is_nested(kind):
            raise ValueError(
                f"{shard.path}, column {spec.blur_boxes}: {kind} where lists of four numbers are needed: correct "
                "ingest.blur_boxes"
            )
    return pa.table({**columns, **{name: rest[name] for name in rest.column_names}})


def refuse_columns(shard: Shard, spec: Ingest) -> None:
    """Raises ValueError where the metadata lacks a column that fetching needs."""
    needed = {
        "ingest.columns": [spec.columns.get(name, name) for name in ("url", "caption") if shard.actual(name) is None],
        "ingest.verify_hash": [HASH] if spec.verify_hash else [],
        "ingest.blur_boxes": [spec.blur_boxes] if spec.blur_boxes else [],
    }
    for setting, names in needed.items():
        if missing := [name for name in names if name not in shard.names]:
            raise ValueError(
                f"{shard.path} has no column {', '.join(missing)}; it has {', '.join(sorted(shard.names))}: correct "
                f"{setting}"
            )


def _write_tables(tables: Iterator[pa.Table], prefix: str, size: int) -> int:
    """Tables -> prefix-NNNNN.parquet of `size` rows each, the last of fewer; returns the number of files."""
    waiting: list[pa.Table] = []
    n = 0
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= size:
            whole = _joined(waiting)
            storage.write_table(f"{prefix}-{n:05d}.parquet", whole.slice(0, size))
            waiting, n = [whole.slice(size)], n + 1
    if sum(map(len, waiting)):
        storage.write_table(f"{prefix}-{n:05d}.parquet", _joined(waiting))
        n += 1
    return n


def _joined(tables: list[pa.Table]) -> pa.Table:
    """One table. The files of a data set may have a column in several types; what no one type holds becomes text."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        kinds = defaultdict(set)
        for field in (field for table in tables for field in table.schema):
            kinds[field.name].add(field.type)
        mixed = [name for name, types in kinds.items() if len(types) > 1]
        return pa.concat_tables([_with_text(table, mixed) for table in tables], promote_options="permissive")


def _with_text(table: pa.Table, columns: list[str]) -> pa.Table:
    for name in set(columns) & set(table.column_names):
        values = table[name].to_pylist()
        text = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        table = table.set_column(table.column_names.index(name), name, pa.array(text, pa.string()))
    return table


def names(directory: str) -> list[str]:
    """Names of all lists, in the order of their shards' numbers.

    Leaves out the lists of a file or pass whose .json is not there: not all of its lists are written.
    """
    files = storage.names(f"{directory}/urls")
    whole = {name.removesuffix(".json") for name in files if name.endswith(".json")}
    return [name for name in files if name.endswith(".parquet") and name.rpartition("-")[0] in whole]


def write_failed(directory: str, size: int) -> None:
    """Write what the latest pass could not fetch as the lists of a further pass; leaves out pictures whose owners opted
    out. size: rows_per_shard."""
    lists = names(directory)
    latest = max(map(pass_of, lists), default=0)
    numbers = [i for i, name in enumerate(lists) if pass_of(name) == latest]

    def failed(number: int) -> pa.Table:
        rows = storage.open_parquet(f"{directory}/urls/{lists[number]}").read()
        fetched = storage.open_parquet(f"{directory}/{number:05d}.parquet").read(["key", "status", "error_message"])
        opted_out = pc.equal(pc.fill_null(fetched["error_message"], ""), _OPTED_OUT)
        settled = fetched.filter(pc.or_(pc.not_equal(fetched["status"], "failed_to_download"), opted_out))
        numbers_of_rows = [int(key) % 10 ** math.ceil(math.log10(size)) for key in settled["key"].to_pylist()]
        again = np.ones(len(rows), dtype=bool)  # also rows that img2dataset does not mention
        again[numbers_of_rows] = False
        return rows.filter(pa.array(again))

    prefix = f"{directory}/urls/retry-{latest + 1:03d}"
    if n := _write_tables(in_parallel.read_each(failed, numbers), prefix, size):
        storage.write_json(f"{prefix}.json", _Retry(lists=n))


def pass_of(name: str) -> int:
    """The pass that a list belongs to: 0 for the first, 1 for what that could not fetch, and so on."""
    return int(name.split("-")[1]) if name.startswith("retry-") else 0
