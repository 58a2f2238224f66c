import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jest_core.config import CaptionRule, StatusRule, UnsafeRule
from pipelines import catalogue, storage
from pipelines.shards import Shard, derive_uid

LAION = pa.table(
    {
        "URL": [f"http://x/{i}.jpg" for i in range(6)],
        "TEXT": ["a red cat", "", None, "cat", "two dogs", "a blue bird"],
        "punsafe": pa.array([0.1, 0.1, 0.1, 0.7, None, 0.5], pa.float32()),
        "status": ["success", "success", "success", "success", "success", "failed_to_download"],
        "jpg": [b"x"] * 6,
    }
)


@pytest.fixture
def laion(tmp_path):
    pq.write_table(LAION, tmp_path / "00000.parquet", row_group_size=4)
    return Shard(str(tmp_path / "00000.parquet"))


def dropped(shard: Shard, *rules) -> list[str | None]:
    return [rule for i in range(2) for rule in catalogue._apply(shard, i, list(rules))["dropped_by"]]


def test_each_row_is_charged_to_the_first_rule_that_drops_it(laion):
    rules = (
        StatusRule(rule="status"),
        UnsafeRule(rule="unsafe"),
        CaptionRule(rule="caption", min_words=2, min_characters=3),
    )
    assert dropped(laion, *rules) == [None, "caption", "caption", "unsafe", "unsafe", "status"]
    assert dropped(laion, *rules[::-1]) == [None, "caption", "caption", "caption", "unsafe", "unsafe"]


def test_uids_are_derived_where_the_shard_has_none(laion):
    found = laion.uids(0)
    assert found[0] == derive_uid("http://x/0.jpg", "a red cat")
    assert len(found[0]) == 32
    assert len(set(found)) == 4
    assert found[2] == derive_uid("http://x/2.jpg", "")


def test_a_rule_on_a_missing_column_names_it(tmp_path):
    pq.write_table(LAION.drop_columns(["punsafe"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column punsafe or nsfw_score_opennsfw2; it has TEXT, URL"):
        catalogue._apply(Shard(str(tmp_path / "a.parquet")), 0, [UnsafeRule(rule="unsafe")])


def test_stage_audits_and_runs_once(ray_session, make_run, shards, capsys):
    run = make_run("joint")
    manifest = catalogue.run_stage(run)
    counts = [shard["counts"] for shard in manifest["shards"]]
    statuses = [pq.read_table(p, columns=["status"])["status"].to_pylist() for p in sorted(shards.iterdir())]
    for found, status in zip(counts, statuses, strict=True):
        assert found.get("status", 0) == sum(s != "success" for s in status)
        assert sum(found.values()) == 150
    assert "kept" in capsys.readouterr().out
    assert catalogue.run_stage(run) == manifest
    assert "already at" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another configuration \\(rules"):
        catalogue.run_stage(make_run("joint", "data.rules=[{rule: status}]"))


def test_a_catalogue_cut_short_is_completed(ray_session, make_run):
    run = make_run("joint")
    whole = catalogue.run_stage(run)
    directory = run.path("catalogue")
    storage.write_json(
        f"{directory}/manifest.json", {"stage": "catalogue", "complete": False, "config": whole["config"]}
    )
    storage.remove(f"{directory}/parts/00002.parquet")
    kept = storage.filesystem(f"{directory}/parts/00001.parquet")[0].modified(f"{directory}/parts/00001.parquet")
    assert catalogue.run_stage(run) == whole
    assert storage.filesystem(directory)[0].modified(f"{directory}/parts/00001.parquet") == kept
