"""Embedded rows -> fragments -> the parts of a score cache -> its manifest.

A fragment has the embedded rows of one block. When a shard's fragments are complete they become its part, which is
written whole and describes itself in its metadata; the manifest and row_groups.parquet are made of these descriptions.
"""

import json
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jest_core import tables
from jest_core.run_file import Run
from jest_core.tables import SlotStatus

from ..base import blocks, cluster, damage, in_parallel, manifests, owner, storage
from ..data.catalogue import Catalogue, held_catalogue
from ..data.rows import ReadReport
from .score_cache import EMBEDDINGS, STAGE, TOKENIZER, Config, Manifest, n_bad, part_path, reasons, refuse_unsound

_AT_ONCE = 32  # parts that a cluster writes at the same time
_MOST_ROWS = 4096  # of a row group of a part: a window reads only those that it needs of a larger one of the shard
_DESCRIPTION = b"jest.scores"  # key of a part's Parquet metadata


class EmbedReport(ReadReport):
    """What an embedded block says of the work on it, as columns with the same value in every row.

    embed: seconds. began: time.time() when the embedding began.
    """

    embed: float
    began: float


class StoreReport(EmbedReport):
    """The same, once its rows are a fragment. write: seconds. rows: of the fragment. first_row: of the shard."""

    write: float
    rows: int
    first_row: int
    path: str


@dataclass(frozen=True)
class Fragment:
    """A Parquet file with embedded rows of one row group. first_row: the number in the shard of its first row."""

    first_row: int
    path: str


class Description(TypedDict):
    """What a part says of itself, as JSON in its Parquet metadata.

    config: fingerprint of the cache's configuration. counts: rows of each status. groups: for each row group, rows with
    embeddings and the sum of their multiplicities. bad_rows: uid, row of the shard, and status of each. tokenizer: the
    identity of the one whose tokens the part has.
    """

    config: str
    counts: dict[str, int]
    groups: list[tuple[int, int]]
    bad_rows: list[tuple[str, int, str]]
    tokenizer: NotRequired[str | None]


def store(block: pa.Table, session: str) -> pa.Table:
    """Write an embedded block as fragments, one for each row group; returns a row of StoreReport for each.

    session: the folder of the fragments.
    """
    return pa.Table.from_pylist([_store(part, session) for part in blocks.runs(block, "unit")])


def _store(block: pa.Table, session: str) -> StoreReport:
    report = cast(EmbedReport, {name: block[name][0].as_py() for name in EmbedReport.__annotations__})
    first_row = block["row"][0].as_py()
    path = f"{session}/{report['shard']:05d}-{first_row:09d}.parquet"
    started = time.perf_counter()
    storage.retried(storage.write_table)(path, block.drop_columns(list(report)))
    seconds = time.perf_counter() - started
    return {**report, "write": seconds, "rows": len(block), "first_row": first_row, "path": path}


def write_part(
    directory: str,
    catalogue: Catalogue,
    shard: int,
    fragments: list[Fragment],
    config: Config,
    max_bad_share: float,
    tokenizer: str | None = None,
) -> None:
    """A shard's fragments -> its part. Rows that no fragment has are `dropped` where the catalogue says so, `missing`
    elsewhere. tokenizer: the identity of the one whose tokens the fragments have. Raises ValueError where more than
    max_bad_share of the kept rows is bad.
    """
    place, row_group_sizes = catalogue.place(shard), catalogue.row_group_sizes(shard)
    names = [scorer["name"] for scorer in config["scorers"]]
    schema = tables.score_cache(config["width"], names, tokens=tokenizer is not None)
    counts: Counter[str] = Counter()
    groups: list[tuple[int, int]] = []
    bad_rows: list[tuple[str, int, str]] = []
    body: list[pa.Table] = []
    for number, (start, stop) in enumerate(pairwise(np.cumsum([0, *row_group_sizes]).tolist())):
        uids, multiplicity = place.rows(number)
        embedded = [storage.open_parquet(f.path).read() for f in fragments if start <= f.first_row < stop]
        body.append(_lay_out(embedded, uids, multiplicity, start, schema))
        for name in EMBEDDINGS:
            refuse_unsound(blocks.halves(body[-1][name]), f"what is to be {place.path}, row group {number}: {name}")
        status = np.array(body[-1]["status"].to_pylist(), dtype=object)
        ok = status == SlotStatus.OK.label
        counts.update(status.tolist())
        groups.append((int(ok.sum()), int(multiplicity[ok].sum())))
        bad = np.flatnonzero(~ok & (status != "dropped"))
        bad_rows += [(uids[i], start + i, status[i]) for i in bad.tolist()]
    n_kept = sum(counts.values()) - counts["dropped"]
    if n_bad(counts) > max_bad_share * n_kept:
        raise ValueError(
            f"{place.path}: {n_bad(counts)} of {n_kept} kept rows are bad ({reasons(counts)}), more than "
            f"data.max_bad_share {max_bad_share}; drop them with a rule of the catalogue, or raise the share"
        )
    description: Description = {
        "config": storage.fingerprint(config),
        "counts": counts,
        "groups": groups,
        "bad_rows": bad_rows,
        "tokenizer": tokenizer,
    }
    table = pa.concat_tables(body) if body else schema.empty_table()
    says = {_DESCRIPTION: json.dumps(description)} | ({TOKENIZER: tokenizer} if tokenizer else {})
    storage.write_table(
        part_path(directory, shard), table.replace_schema_metadata(says), row_group_sizes, most_rows=_MOST_ROWS
    )


def _lay_out(
    embedded: list[pa.Table], uids: list[str], multiplicity: NDArray[np.int64], start: int, schema: pa.Schema
) -> pa.Table:
    """Fragments of a row group -> all of its rows, in order; zeros where a row has no embedding."""
    status = np.where(multiplicity > 0, "missing", "dropped").astype(object)
    fragments = pa.concat_tables([schema.empty_table(), *embedded])
    rows = fragments["row"].to_numpy() - start
    if fragments["uid"].to_pylist() != [uids[i] for i in rows]:
        raise ValueError(
            f"fragments of the score cache do not line up with the catalogue in the row group from row {start}: if the"
            " catalogue was made again meanwhile, score it into a new directory"
        )
    status[rows] = fragments["status"].to_pylist()
    columns = {"uid": uids, "row": np.arange(start, start + len(uids)), "status": status.tolist()}
    source = np.full(len(uids), len(fragments))  # of each row: its number among the fragments' rows, or of `zeros`
    source[rows] = np.arange(len(fragments))
    zeros = pa.table({field.name: pa.array([_zero(field.type)], field.type) for field in schema})
    laid_out = pa.concat_tables([fragments, zeros.cast(schema)]).take(pa.array(source))
    for name, values in columns.items():
        laid_out = laid_out.set_column(
            schema.get_field_index(name), schema.field(name), pa.array(values, schema.field(name).type)
        )
    return laid_out


def _zero(kind: pa.DataType) -> object:
    if pa.types.is_fixed_size_binary(kind):
        return bytes(kind.byte_width)
    return "" if pa.types.is_string(kind) else [] if pa.types.is_list(kind) else 0


class Parts:
    """Writes the parts of shards whose fragments are complete, in Ray tasks, a few at a time; removes the fragments."""

    def __init__(self, run: Run, directory: str, config: Config, tokenizer: str | None = None) -> None:
        """tokenizer: the identity of the one whose tokens the fragments have."""
        import ray

        self._write: Any = ray.remote(num_cpus=1)(owner.carried(_write))
        self.run, self.directory, self.config, self.tokenizer = run, directory, config, tokenizer
        self.at_once = cluster.n_cores() if cluster.is_local() else _AT_ONCE
        self.under_way: list[Any] = []

    def write(self, shard: int, fragments: list[Fragment]) -> None:
        """Start a shard's part. Raises the error of a part that was started before."""
        import ray

        arguments = self.run, self.directory, shard, fragments, self.config, self.tokenizer
        self.under_way.append(self._write.remote(*arguments))
        if len(self.under_way) > self.at_once:
            done, self.under_way = ray.wait(self.under_way)
            ray.get(done)  # raises its error, if it had one

    def wait(self) -> None:
        """Wait for all parts that were started."""
        import ray

        ray.get(self.under_way)


@storage.retried
def _write(
    run: Run, directory: str, shard: int, fragments: list[Fragment], config: Config, tokenizer: str | None
) -> None:
    try:
        catalogue = held_catalogue(run.path(run.data.catalogue))
        write_part(directory, catalogue, shard, fragments, config, run.data.max_bad_share, tokenizer)
    except FileNotFoundError:
        # another process that writes this cache has finished it, and removed the fragments
        if not storage.exists(part_path(directory, shard)):
            raise
    damage.remove_note(part_path(directory, shard))
    for fragment in fragments:
        storage.remove(fragment.path)


def finish(directory: str, catalogue: Catalogue, config: Config, logit_bias: float) -> Manifest:
    """The descriptions of all parts -> row_groups.parquet, bad_rows.parquet, and the manifest."""
    counts: Counter[str] = Counter()
    groups: list[NDArray[np.int64]] = []  # of each shard: shard, row group, ok, slots
    bad_rows: list[tuple[int, str, int, int, str]] = []  # columns of tables.BAD_ROWS
    tokenizers: set[str | None] = set()
    expected = storage.fingerprint(config)
    paths = [part_path(directory, shard) for shard in range(len(catalogue.shards))]
    for shard, description in enumerate(in_parallel.read_each(_describe, paths)):
        if description["config"] != expected:
            raise ValueError(
                f"{paths[shard]} was written with another configuration at the same time: remove it, and run the stage "
                "again"
            )
        counts.update(description["counts"])
        tokenizers.add(description.get("tokenizer"))
        lines = [(shard, g, ok, slots) for g, (ok, slots) in enumerate(description["groups"])]
        groups.append(np.array(lines, dtype=np.int64).reshape(-1, len(tables.SCORED)))
        bad_rows += [(-1, uid, shard, number, reason) for uid, number, reason in description["bad_rows"]]
    whole = np.concatenate([np.empty((0, len(tables.SCORED)), np.int64), *groups])
    scored = dict(zip(tables.SCORED.names, whole.T, strict=True))
    storage.write_table(f"{directory}/row_groups.parquet", pa.table(scored).cast(tables.SCORED))
    bad = [dict(zip(tables.BAD_ROWS.names, row, strict=True)) for row in bad_rows]
    storage.write_table(f"{directory}/bad_rows.parquet", pa.Table.from_pylist(bad, tables.BAD_ROWS))
    for name in storage.names(f"{directory}/parts", ".tmp"):  # half written by a process that was killed
        storage.remove(f"{directory}/parts/{name}")
    manifest = Manifest(
        stage=STAGE,
        complete=True,
        config=config,
        shards_fingerprint=catalogue.manifest["shards_fingerprint"],
        counts=dict(sorted(counts.items())),
        logit_bias=logit_bias,
    )
    if len(tokenizers) == 1 and (tokenizer := tokenizers.pop()) is not None:
        manifest["tokenizer"] = tokenizer
    return manifests.finish(directory, manifest)


def _describe(part: str) -> Description:
    """The description of a part; reads only the file's footer."""
    with damage.noted(part, STAGE):
        description: Description = json.loads(storage.open_parquet(part).schema_arrow.metadata[_DESCRIPTION])
    return description
