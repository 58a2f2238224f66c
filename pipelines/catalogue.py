"""Image shards -> catalogue: which rows are kept, and the rule that dropped each of the others. No image is read."""

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from numpy.typing import NDArray

from jest_core import tables
from jest_core.config import CaptionRule, Rule, Run, StatusRule, UnsafeRule
from jest_core.order import Order
from pipelines import cluster, progress, storage
from pipelines.shards import Shard, part_name

KEPT = "kept"


def run_stage(run: Run) -> dict[str, Any]:
    """Write the catalogue of data.shards; returns its manifest. A second run does the shards that are missing."""
    directory = run.path(run.data.catalogue)
    shards = storage.expand(run.data.shards, run.path(""))
    config = {"shards": shards, "rules": [rule.model_dump() for rule in run.data.rules]}
    if (manifest := storage.begin(directory, "catalogue", config)) is not None:
        progress.say("catalogue", f"already at {directory}: {audit(manifest)}")
        return manifest
    progress.say(
        "catalogue",
        f"{len(shards)} shards, rules {', '.join(rule.rule for rule in run.data.rules)}: reading metadata only",
    )
    cluster.connect()
    cluster.data_context()
    done = set(storage.names(f"{directory}/parts", ".parquet"))
    todo = [{"index": i, "path": path} for i, path in enumerate(shards) if part_name(i) not in done]
    if todo:
        stage = ray.data.from_items(todo, override_num_blocks=min(len(todo), 1000)).map(
            partial(_catalogue_shard, directory=directory, rules=run.data.rules)
        )
        with progress.bar("catalogue", len(shards), "shards", start=len(done)) as advance:
            for _ in stage.iter_rows():
                advance(1)
    described = [_describe(directory, i, path) for i, path in enumerate(shards)]
    manifest = storage.finish(directory, "catalogue", config, shards=described)
    progress.say("catalogue", audit(manifest))
    return manifest


def _catalogue_shard(item: dict[str, Any], directory: str, rules: list[Rule]) -> dict[str, Any]:
    """One shard -> one part, in the shard's row groups."""
    shard = Shard(item["path"])
    groups = [_apply(shard, i, rules) for i in range(len(shard.row_group_sizes))]
    table = pa.concat_tables([pa.table(group, schema=tables.CATALOGUE) for group in groups])
    storage.write_table(f"{directory}/parts/{part_name(item['index'])}", table, shard.row_group_sizes)
    return {"index": item["index"]}


def _apply(shard: Shard, row_group: int, rules: list[Rule]) -> dict[str, list[str | None]]:
    uids = shard.uids(row_group)
    dropped: NDArray[np.object_] = np.full(len(uids), None, dtype=object)
    for rule in rules:
        keep = _keeps(rule, shard, row_group)
        dropped[~keep & (dropped == None)] = rule.rule  # noqa: E711 - elementwise
    return {"uid": uids, "dropped_by": dropped.tolist()}


def _keeps(rule: Rule, shard: Shard, row_group: int) -> NDArray[np.bool_]:
    match rule:
        case StatusRule():
            status = shard.read(row_group, "status")["status"]
            return pc.fill_null(pc.equal(status, "success"), False).to_numpy()
        case UnsafeRule():
            unsafe = shard.read(row_group, "unsafe")["unsafe"].cast(pa.float64())
            return pc.fill_null(pc.less(unsafe, rule.below), False).to_numpy()
        case CaptionRule():
            captions = shard.captions(row_group)
            return np.array(
                [len(c.split()) >= rule.min_words and len(c.strip()) >= rule.min_characters for c in captions],
                dtype=bool,
            )


def _describe(directory: str, index: int, path: str) -> dict[str, Any]:
    """A shard's entry in the manifest; its fingerprint is its size, row count and a hash of its uids in order."""
    file = storage.open_parquet(f"{directory}/parts/{part_name(index)}")
    fs, inner = storage.filesystem(path)
    groups, counts, uids = [], Counter[str](), []
    for i in range(file.num_row_groups):
        part = file.read_row_group(i)
        uids += part["uid"].to_pylist()
        groups.append({"rows": len(part), "kept": part["dropped_by"].null_count})
        counts.update(KEPT if rule is None else rule for rule in part["dropped_by"].to_pylist())
    return {
        "path": path,
        "fingerprint": storage.fingerprint([int(fs.size(inner)), len(uids), storage.fingerprint(uids)]),
        "row_groups": groups,
        "counts": dict(sorted(counts.items())),
    }


def audit(manifest: dict[str, Any]) -> str:
    """Counts per rule, over all shards, in one line."""
    counts: Counter[str] = sum((Counter(shard["counts"]) for shard in manifest["shards"]), Counter())
    kept, total = counts.pop(KEPT, 0), sum(counts.values())
    dropped = ", ".join(f"{rule} {n:,}" for rule, n in counts.most_common())
    return f"kept {kept:,} of {kept + total:,} rows" + (f"; dropped by {dropped}" if dropped else "")


def kept_rows(directory: str, shard: int, row_group: int) -> tuple[NDArray[np.int64], list[str]]:
    """Rows that the catalogue keeps of a row group, counted within it, and the uids of all its rows."""
    part = storage.open_parquet(f"{directory}/parts/{part_name(shard)}").read_row_group(row_group)
    return np.flatnonzero(part["dropped_by"].is_null().to_numpy()), part["uid"].to_pylist()


def order(manifest: dict[str, Any], run: Run, bad_rows: dict[str, list[int]] | None = None) -> Order:
    """The order of the catalogue's kept rows, without bad_rows (shard number -> rows of it) where they are known."""
    shards, groups, kept = [], [], []
    for index, shard in enumerate(manifest["shards"]):
        sizes = np.array([group["rows"] for group in shard["row_groups"]])
        bad = np.array((bad_rows or {}).get(str(index), []), dtype=np.int64)
        n_bad = np.bincount(np.searchsorted(np.cumsum(sizes), bad, side="right"), minlength=len(sizes))
        for i, group in enumerate(shard["row_groups"]):
            shards.append(index)
            groups.append(i)
            kept.append(group["kept"] - int(n_bad[i]))
    return Order(
        np.array(shards),
        np.array(groups),
        np.array(kept),
        seed=run.seed,
        n_streams=run.data.n_streams,
        window_rows=run.data.window_rows,
    )
