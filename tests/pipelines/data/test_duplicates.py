"""The rule `duplicate`: across shards, and where the search for them is interrupted."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.base import storage
from pipelines.data import catalogue
from tests.pipelines.data.test_catalogue import copies, parts

pytestmark = pytest.mark.usefixtures("ray_session")


def test_only_the_first_of_duplicates_across_shards_is_kept(make_run, shards, tmp_path):
    source = copies(shards, tmp_path / "d", {0: [*range(20), 3], 1: [19, 25, 0, 30], 2: [25, 40]})
    run = make_run("x", "data.rules=[{rule: status}, {rule: duplicate}]", source=source)
    listing = catalogue.run_stage(run)
    table = parts(listing)
    dropped = np.flatnonzero(np.array(table["dropped_by"].to_pylist()) == "duplicate").tolist()
    status = table["dropped_by"].to_pylist()
    again = [20, 21, 23, 25]  # of the concatenated rows
    assert dropped == [i for i in again if status[i] != "status"]
    assert listing.manifest["counts"]["duplicate"] == len(dropped)
    by_caption = make_run("x", "data.rules=[{rule: duplicate, by: [caption]}]", "data.catalogue=c2", source=source)
    captions = [c for i in range(3) for c in pq.read_table(f"{source}/{i:05d}.parquet")["caption"].to_pylist()]
    expected = len(captions) - len({c or "" for c in captions})
    assert catalogue.run_stage(by_caption).manifest["counts"].get("duplicate", 0) == expected


def test_rows_with_one_uid_but_other_content_are_no_duplicates(make_run, tmp_path, capsys):
    rows = [("a", "u1"), ("a", "u1"), ("a", "u2"), ("b", "u1"), ("", ""), (None, None)]
    table = {"uid": ["0" * 32] * 6, "caption": [c for c, _ in rows], "url": [u for _, u in rows]}
    for i in range(2):
        (tmp_path / "s").mkdir(exist_ok=True)
        pq.write_table(pa.table(table), tmp_path / "s" / f"{i}.parquet")
    run = make_run("x", "data.rules=[{rule: duplicate}]", source=str(tmp_path / "s"))
    listing = catalogue.run_stage(run)
    first = [None, "duplicate", None, None, None, "duplicate"]
    assert parts(listing)["dropped_by"].to_pylist() == [*first, *["duplicate"] * 6]
    said = " ".join(capsys.readouterr().out.split())
    assert "3 rows have the uid of another row, but another caption or URL, such as row" in said
    run = make_run("x", "data.rules=[{rule: duplicate, by: [url]}]", "data.catalogue=c2", source=str(tmp_path / "s"))
    assert catalogue.run_stage(run).manifest["counts"] == {"duplicate": 9, "kept": 3}


def test_an_interrupted_search_for_duplicates_gives_the_same_catalogue(make_run, shards, tmp_path):
    source = copies(shards, tmp_path / "d", {0: list(range(20)), 1: list(range(10, 30))})
    run = make_run("x", "data.rules=[{rule: duplicate}]", source=source)
    whole = catalogue.run_stage(run)
    before = parts(whole)
    claim = {"stage": "catalogue", "complete": False, "config": whole.manifest["config"]}
    storage.write_json(f"{whole.directory}/manifest.json", claim)
    storage.remove(f"{whole.directory}/parts/00000.parquet")  # the other part already has its duplicates marked
    assert catalogue.run_stage(run).manifest == whole.manifest
    assert parts(whole).equals(before)
