"""The score cache: for each shard a part, row for row beside it, with the reference's embeddings of every kept pair.

Parts are written whole, and describe themselves in their metadata; the manifest and row_groups.parquet are made of
that. Two writers of one cache do each part twice at worst.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jest_core import tables
from jest_core.run_file import Run
from jest_core.tables import SlotStatus
from pipelines.base import blocks, cluster, storage
from pipelines.data.catalogue import Catalogue, Place, held_catalogue
from pipelines.data.shards import part_name

STAGE = "reference-scores"
_AT_ONCE = 32  # parts that are written at the same time on a cluster, and footers that are read
_DESCRIPTION = b"jest.scores"  # in a part's metadata: counts, row groups' slots, bad rows, and whose cache it is


def part_path(directory: str, shard: int) -> str:
    return f"{directory}/parts/{part_name(shard)}"


def opened(directory: str) -> dict[str, Any]:
    """The manifest of a finished cache. Raises FileNotFoundError, with the remedy, where there is none."""
    return storage.finished(directory, STAGE, "run `jest reference-scores` first")


def refuse_other(manifest: Mapping[str, Any], catalogue: Catalogue, directory: str) -> None:
    """A cache lines up with the catalogue that it was made for, and with those that refine it."""
    if manifest["config"]["catalogue"] not in (catalogue.manifest["fingerprint"], *catalogue.manifest["lineage"]):
        raise ValueError(
            f"{directory} was scored for another catalogue than {catalogue.directory}, and for none that it refines: "
            "run `jest reference-scores` into a new directory"
        )


def scale_and_bias(manifest: Mapping[str, Any]) -> tuple[float, float]:
    """The reference's logit_scale (the multiplier) and logit_bias."""
    return manifest["config"]["logit_scale"], manifest["logit_bias"]


def missing(directory: str, catalogue: Catalogue) -> NDArray[np.int64]:
    """Numbers of the shards that have no part yet."""
    done = set(storage.names(f"{directory}/parts", ".parquet"))
    return np.array([i for i in range(len(catalogue.shards)) if part_name(i) not in done], dtype=np.int64)


@storage.retried
def read(directory: str, place: Place, row_group: int, uids: list[str], columns: list[str]) -> pa.Table:
    """The rows beside those of a row group. Raises ValueError where there are none, or of other uids."""
    path = part_path(directory, place.number)
    file = storage.open_parquet(path)
    if row_group >= file.num_row_groups:
        raise ValueError(
            f"{path} ends before row group {row_group} of {place.path}: remove it and {directory}/{storage.MANIFEST}, "
            "and run `jest reference-scores` again, which does what is missing"
        )
    rows = file.read_row_group(row_group, columns=["uid", *columns])
    if not rows["uid"].equals(pa.chunked_array([pa.array(uids, pa.string())])):
        raise ValueError(
            f"the score cache does not line up with {place.path}, row group {row_group}: score it again into a new "
            "directory"
        )
    return rows


def store(block: pa.Table, session: str) -> pa.Table:
    """Write an embedded block as fragments of its shards' parts, one a row group, and report each."""
    return pa.Table.from_pylist([_store(part, session) for part in blocks.runs(block, "unit")])


def _store(block: pa.Table, session: str) -> dict[str, Any]:
    told = {name: block[name][0].as_py() for name in ("unit", "unit_rows", "shard", "read", "decode", "embed", "began")}
    first_row = block["row"][0].as_py()
    path = f"{session}/{told['shard']:05d}-{first_row:09d}.parquet"
    started = time.perf_counter()
    storage.retried(storage.write_table)(path, block.drop_columns(list(told)))
    return told | {"write": time.perf_counter() - started, "rows": len(block), "first_row": first_row, "path": path}


def write_part(
    directory: str,
    catalogue: Catalogue,
    shard: int,
    fragments: list[tuple[int, str]],
    config: dict[str, Any],
    max_bad_share: float,
) -> None:
    """A shard's fragments -> its part. Rows that no fragment has are `dropped` where the catalogue says so, `missing`
    elsewhere. Raises ValueError where more than max_bad_share of the kept rows is bad.

    fragments: the first row of each, within the shard, and its path; none reaches over a row group's end.
    """
    place, row_group_sizes = catalogue.place(shard), catalogue.row_group_sizes(shard)
    schema = tables.score_cache(config["width"], [scorer["name"] for scorer in config["scorers"]])
    starts = np.cumsum([0, *row_group_sizes])
    description: dict[str, Any] = {"config": storage.fingerprint(config), "counts": Counter(), "groups": []}
    description["bad_rows"] = []

    def groups() -> Iterator[pa.Table]:
        for number, (start, stop) in enumerate(pairwise(starts.tolist())):
            uids, multiplicity = place.rows(number)
            found = [storage.open_parquet(path).read() for first, path in fragments if start <= first < stop]
            group = _lay_out(found, uids, multiplicity, int(start), schema)
            status = np.array(group["status"].to_pylist(), dtype=object)
            ok = status == SlotStatus.OK.label
            description["counts"].update(status.tolist())
            description["groups"].append((int(ok.sum()), int(multiplicity[ok].sum())))
            bad = np.flatnonzero(~ok & (status != "dropped"))
            description["bad_rows"] += [(uids[i], int(start) + i, status[i]) for i in bad.tolist()]
            yield group

    body = list(groups())
    counts = description["counts"]
    n_kept = sum(counts.values()) - counts["dropped"]
    if n_bad(counts) > max_bad_share * n_kept:
        raise ValueError(
            f"{place.path}: {n_bad(counts)} of {n_kept} kept rows are bad ({reasons(counts)}), more than "
            f"data.max_bad_share {max_bad_share}; drop them with a rule of the catalogue, or raise the share"
        )
    table = pa.concat_tables(body) if body else schema.empty_table()
    table = table.replace_schema_metadata({_DESCRIPTION: json.dumps(description).encode()})
    storage.write_table(part_path(directory, shard), table, row_group_sizes)


def _lay_out(
    found: list[pa.Table], uids: list[str], multiplicity: NDArray[np.int64], start: int, schema: pa.Schema
) -> pa.Table:
    """Fragments of a row group -> all of its rows, in order; zeros where a row has none."""
    status = np.where(multiplicity > 0, "missing", "dropped").astype(object)
    fragments = pa.concat_tables([schema.empty_table(), *found])
    rows = fragments["row"].to_numpy() - start
    if fragments["uid"].to_pylist() != [uids[i] for i in rows]:
        raise ValueError("fragments of the score cache do not line up with the catalogue: was it written anew?")
    status[rows] = fragments["status"].to_pylist()
    columns: dict[str, Any] = {"uid": uids, "row": np.arange(start, start + len(uids)), "status": status.tolist()}
    for field in schema:
        if field.name not in columns:
            is_list = pa.types.is_fixed_size_list(field.type)
            own = blocks.unpack(fragments[field.name]) if is_list else fragments[field.name].to_numpy()
            values = np.zeros((len(uids), *own.shape[1:]), dtype=own.dtype)
            values[rows] = own
            columns[field.name] = blocks.pack(values) if is_list else values
    return pa.table(columns).cast(schema)


class Parts:
    """Shards whose fragments are complete become parts, by tasks, a few at a time; the fragments go then."""

    def __init__(self, run: Run, directory: str, config: dict[str, Any]) -> None:
        import ray

        self._write: Any = ray.remote(num_cpus=1)(_write)
        self.run, self.directory, self.config = run, directory, config
        self.at_once = cluster.n_cores() if cluster.is_local() else _AT_ONCE
        self.under_way: list[Any] = []

    def write(self, shard: int, fragments: list[tuple[int, str]]) -> None:
        import ray

        self.under_way.append(self._write.remote(self.run, self.directory, shard, fragments, self.config))
        if len(self.under_way) > self.at_once:
            done, self.under_way = ray.wait(self.under_way)
            ray.get(done)  # raises its error, if it had one

    def wait(self) -> None:
        import ray

        ray.get(self.under_way)


@storage.retried
def _write(run: Run, directory: str, shard: int, fragments: list[tuple[int, str]], config: dict[str, Any]) -> None:
    try:
        catalogue = held_catalogue(run.path(run.data.catalogue))
        write_part(directory, catalogue, shard, fragments, config, run.data.max_bad_share)
    except FileNotFoundError:
        # whoever else writes this cache has finished it, and cleared the fragments away
        if not storage.exists(part_path(directory, shard)):
            raise
    for _, path in fragments:
        storage.remove(path)


def finish(directory: str, catalogue: Catalogue, config: dict[str, Any], logit_bias: float) -> dict[str, Any]:
    """What the parts say of themselves -> row_groups.parquet, bad_rows.parquet, and the manifest."""
    counts: Counter[str] = Counter()
    groups: list[NDArray[np.int64]] = []  # of each shard: shard, row group, ok, slots
    bad_rows: list[Any] = []
    own = storage.fingerprint(config)
    for shard, description in enumerate(_descriptions(directory, len(catalogue.shards))):
        if description["config"] != own:
            raise ValueError(
                f"{part_path(directory, shard)} was written with another configuration at the same time: remove it, "
                "and run the stage again"
            )
        counts.update(description["counts"])
        lines = [(shard, g, ok, slots) for g, (ok, slots) in enumerate(description["groups"])]
        groups.append(np.array(lines, dtype=np.int64).reshape(-1, len(tables.SCORED)))
        bad_rows += [(-1, uid, shard, number, reason) for uid, number, reason in description["bad_rows"]]
    whole = np.concatenate([np.empty((0, len(tables.SCORED)), np.int64), *groups])
    scored = dict(zip(tables.SCORED.names, whole.T, strict=True))
    storage.write_table(f"{directory}/row_groups.parquet", pa.table(scored).cast(tables.SCORED))
    bad = [dict(zip(tables.BAD_ROWS.names, row, strict=True)) for row in bad_rows]
    storage.write_table(f"{directory}/bad_rows.parquet", pa.Table.from_pylist(bad, tables.BAD_ROWS))
    for left in storage.names(f"{directory}/parts", ".tmp"):  # half written by a process that was killed
        storage.remove(f"{directory}/parts/{left}")
    return storage.finish(
        directory,
        STAGE,
        config,
        shards_fingerprint=catalogue.manifest["shards_fingerprint"],
        counts=dict(sorted(counts.items())),
        logit_bias=logit_bias,
    )


def _descriptions(directory: str, n_shards: int) -> Iterator[dict[str, Any]]:
    """What each part says of itself, in order; only the footers are read."""

    @storage.retried
    def described(shard: int) -> dict[str, Any]:
        metadata = storage.open_parquet(part_path(directory, shard)).schema_arrow.metadata
        return dict(json.loads(metadata[_DESCRIPTION]))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, n_shards, 1_000):  # no more are held at once
            yield from pool.map(described, range(start, min(start + 1_000, n_shards)))


def good_slots(directory: str) -> NDArray[np.int64]:
    """Of each row group of the catalogue: the slots of its rows that have embeddings."""
    slots: NDArray[np.int64] = storage.open_parquet(f"{directory}/row_groups.parquet").read()["slots"].to_numpy()
    return slots


def n_bad(counts: Mapping[str, int]) -> int:
    """Kept rows that did not decode."""
    return sum(n for status, n in counts.items() if status not in ("ok", "dropped"))


def reasons(counts: Mapping[str, int]) -> str:
    bad = [(reason, n) for reason, n in counts.items() if reason not in ("ok", "dropped")]
    return ", ".join(f"{reason} {n:,}" for reason, n in sorted(bad, key=lambda item: -item[1]))


def summary(manifest: Mapping[str, Any]) -> str:
    """A finished cache in one line."""
    counts, (scale, bias) = manifest["counts"], scale_and_bias(manifest)
    bad = f"{n_bad(counts):,} bad" + (f" ({reasons(counts)})" if n_bad(counts) else "")
    return f"{counts.get('ok', 0):,} pairs scored, {bad}; logit_scale {scale:.2f}, logit_bias {bias:.2f}"
