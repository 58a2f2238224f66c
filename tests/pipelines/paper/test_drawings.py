"""The committed drawings: size, licences, layout and splits."""

import json
from importlib.resources import files
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jest_core.examples.decode import View
from pipelines.paper.drawings import build

SMALL = Path(str(files("jest_deploy") / "data" / "small"))
ALLOWED = {
    "MIT",
    "Apache-2.0",
    "CC0-1.0",
    "ISC",
    "CC-BY-4.0",
    "CC-BY-3.0",
    "public-domain",
    "BSD-3-Clause",
    "Unicode-3.0",
}
SPLITS = ("pool", "curated", "eval-fluent-flat", "eval-fluent-high-contrast", "eval-clipart")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return {
        name: [r for p in sorted((SMALL / name).glob("*.parquet")) for r in pq.read_table(p).to_pylist()]
        for name in SPLITS
    }


def test_the_data_is_small_and_freely_licensed(splits):
    assert sum(p.stat().st_size for p in SMALL.rglob("*") if p.is_file()) <= 16_000_000
    assert {row["licence"] for rows in splits.values() for row in rows} <= ALLOWED
    attribution = (SMALL / "ATTRIBUTION.md").read_text()
    for vendor in {row["source"].split(":")[-1] for rows in splits.values() for row in rows if ":" in row["source"]}:
        assert f"({vendor})" in attribution


def test_shards_are_laid_out_as_img2dataset_writes_them(splits):
    schema = pq.read_schema(SMALL / "pool" / "00000.parquet")
    tail = ["caption", "url", "key", "status", "error_message", "width", "height", "original_width", "original_height"]
    assert schema.names[-12:] == [*tail, "exif", "sha256", "webp"]
    for name in SPLITS:
        for path in (SMALL / name).glob("*.parquet"):
            stats = json.loads(path.with_name(path.stem + "_stats.json").read_text())
            table = pq.read_table(path, columns=["status", "webp"])
            assert stats["count"] == len(table)
            assert (
                stats["successes"]
                == table["status"].to_pylist().count("success")
                == len(table) - table["webp"].null_count
            )


def test_uids_are_unique_and_pictures_decode(splits):
    uids = [row["uid"] for rows in splits.values() for row in rows]
    assert len(set(uids)) == len(uids)
    assert all(len(uid) == 32 for uid in uids)
    view = View(64)
    for rows in splits.values():
        for row in rows[::97]:
            assert (view.batch([row["webp"]])[1][0] == 0) == (row["status"] == "success")


def test_no_vendor_is_in_both_training_and_evaluation(splits):
    training = {row["source"] for name in ("pool", "curated") for row in splits[name]}
    assert not [source for source in training if "fluent" in source or "openmoji" in source]
    novel = {row["concept"] for row in splits["eval-fluent-flat"] if row["noise"] == "novel"}
    assert novel
    assert not novel & {row["concept"] for row in splits["curated"]}


def test_an_unknown_tier_is_named(tmp_path):
    with pytest.raises(ValueError, match="tier 'huge' is unknown; choose one of"):
        build.build("huge", tmp_path / "out", raw=tmp_path / "raw")
