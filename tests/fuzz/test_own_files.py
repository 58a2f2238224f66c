"""What jest wrote is read as it was written, or refused by an error that names the file, whatever befell its bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from jest_core import tables
from pipelines.base import blocks, checkpoints, commits, manifests, storage
from pipelines.data import catalogue_parts
from pipelines.data.catalogue import Catalogue
from pipelines.data.places import Place
from pipelines.scores import parts, score_cache
from pipelines.training import metrics_line, selection_log
from pipelines.training.selection_log import SelectionLog
from tests.fuzz.harness import fuzz, mutated, read_or_refused, same_or_refused
from tests.pipelines.training.test_selection_log import log_of

UIDS = [f"{i * i:032x}" for i in range(50)]
GROUPS = [20, 25, 5]


def test_checkpoints(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 7)).square().sum().backward()
    optimizer.step()
    content = {"epoch": 3, "name": "x", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    state = {"step": 3, "seconds": 1.5, "log_parts": ["00000000-00000002.parquet"]}
    checkpoints.write(str(tmp_path), 3, content | {"jest": state})
    path = checkpoints.path_of(str(tmp_path), 3)
    same_or_refused("checkpoints", Path(path), lambda: checkpoints.read(path))


def of_group(g: int) -> slice:
    return slice(sum(GROUPS[:g]), sum(GROUPS[: g + 1]))


def write_catalogue(folder: Path) -> Place:
    dropped = [None if i % 3 else "caption" for i in range(len(UIDS))]
    columns = {"uid": UIDS, "dropped_by": dropped, "multiplicity": [2 * (i is None) for i in dropped]}
    table = pa.table(columns).cast(tables.CATALOGUE)
    place = Place(0, "shard.parquet", str(folder), "")
    catalogue_parts.write(place.part_path, [table[of_group(g)] for g in range(len(GROUPS))], GROUPS, 1234)
    return place


def test_catalogue_parts(tmp_path: Path):
    place = write_catalogue(tmp_path)

    def read() -> Any:
        rows = [place.rows(group) for group in range(len(GROUPS))]
        return [(uids, counts.tolist()) for uids, counts in rows], catalogue_parts.describe(place.part_path)

    same_or_refused("catalogue_parts", Path(place.part_path), read)


def test_cache_parts(tmp_path: Path):
    place, width, n = write_catalogue(tmp_path / "catalogue"), 8, len(UIDS)
    shards = [{"path": place.path, "source": 0, "bytes": 1234, "rows": n, "fingerprint": "", "counts": []}]
    storage.write_table(f"{place.directory}/shards.parquet", pa.Table.from_pylist(shards, schema=tables.SHARDS))
    groups = [{"shard": 0, "row_group": g, "rows": rows, "slots": rows} for g, rows in enumerate(GROUPS)]
    storage.write_table(f"{place.directory}/row_groups.parquet", pa.Table.from_pylist(groups, schema=tables.ROW_GROUPS))
    rng = np.random.default_rng(0)
    columns = {"uid": UIDS, "row": np.arange(n), "status": ["ok"] * n}
    for side in ("image", "text"):
        embeddings = rng.normal(size=(n, width))
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        columns[f"{side}_embedding"] = blocks.pack_halves(unit.astype(np.float16))
    columns |= {name: rng.normal(size=n) for name in ("matched_pair_loss", "cosine")}
    embedded, fragments = pa.table(columns).cast(tables.score_cache(width)), list[parts.Fragment]()
    for g in range(len(GROUPS)):
        fragments.append(parts.Fragment(of_group(g).start, f"{tmp_path}/fragments/{g}.parquet"))
        storage.write_table(fragments[g].path, embedded[of_group(g)])
    directory, config = str(tmp_path), {"width": width, "scorers": []}
    parts.write_part(directory, Catalogue(place.directory, {"index": ""}), 0, fragments, config, 0.0)
    path = score_cache.part_path(directory, 0)

    def read() -> Any:
        names = list(tables.SCORE_CACHE_COLUMNS[1:])
        cached = [score_cache.read(directory, place, g, UIDS[of_group(g)], names) for g in range(len(GROUPS))]
        return cached, parts._describe(path)

    same_or_refused("cache_parts", Path(path), read)


@pytest.mark.parametrize("prefix", ["", "steps-", "bad-"])
def test_log_parts(tmp_path: Path, prefix: str):
    run_dir = str(tmp_path)
    names = log_of(SelectionLog(run_dir, []), range(4))
    checkpoints.write(run_dir, 4, {"jest": {"step": 4, "log_parts": names}})
    readers = selection_log.read, selection_log.read_steps, selection_log.read_bad_rows, selection_log.sample
    path = tmp_path / "selection" / f"{prefix}{names[0]}"
    same_or_refused(f"log_parts.{prefix}", path, lambda: [read(run_dir) for read in readers])


@pytest.mark.parametrize("name", ["metrics.jsonl", f"selection/{commits.FILE}"])
def test_lines(tmp_path: Path, name: str):
    """Lines have no digest, as other programs write and read them too; what is not of their kind is refused."""
    names = log_of(SelectionLog(str(tmp_path), []), range(4))
    checkpoints.write(str(tmp_path), 4, {"jest": {"step": 4, "log_parts": names}})
    lines = [{"step": step, "train/loss": 1 / step, "jest/seconds": 0.5} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / name
    whole = path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        read_or_refused(path, lambda: [line["step"] + 1 for line in metrics_line.read(str(tmp_path))])
        read_or_refused(path, lambda: commits.read(str(tmp_path)))

    fuzz(f"lines.{path.stem}", 100, lambda rng: mutated(whole, rng, whole), check)


def test_manifests(tmp_path: Path):
    directory = str(tmp_path)
    manifests.finish(directory, {"stage": "x", "complete": True, "config": {"logit_scale": 9.5}, "counts": {"ok": 50}})
    path = Path(manifests.path_of(directory))
    same_or_refused("manifests", path, lambda: manifests.read(directory))
