"""What a setting got wrong is an error before Ray starts: a fast test that starts it would fail."""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import catalogue, first_shards
from pipelines.data.layouts import open_shard
from tests.conftest import MakeRun
from tests.pipelines.data.test_tars import picture, samples, tar_of

N = 40
PAIRS: dict[str, Any] = {
    "url": [f"http://a/{i}" for i in range(N)],
    "caption": [f"cat {i}" for i in range(N)],
    "jpg": [picture(i) for i in range(N)],
}


def parquet(folder: Path, name: str = "a.parquet", **columns: Any) -> str:
    folder.mkdir(exist_ok=True)
    table = {key: value for key, value in (PAIRS | columns).items() if value is not None}
    pq.write_table(pa.table(table), folder / name)
    return str(folder)


def refused(make_run: MakeRun, source: str, *overrides: str, match: str) -> None:
    started = time.process_time()
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        catalogue.run_stage(make_run("x", "data.rules=[]", *overrides, f"data.shards={source}"))
    assert time.process_time() - started < 2
    assert not Path(make_run("x").path("catalogue/manifest.json")).exists()  # it serves the corrected run file


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (
            "caption: my_text",
            r"names my_text for caption, and .*a\.parquet has no such column; it has caption, jpg, url",
        ),
        ("caption: captoin", r"did you mean caption\?"),
        ("uid: urll", r"did you mean url\?"),
        ("similarity: clip", "name another column for similarity, or leave it out"),
        ("image: picture", "names picture for image"),
    ],
)
@pytest.mark.parametrize("layout", ["parquet", "tar"])
def test_a_column_that_is_not_there_is_refused(columns, match, layout, make_run, tmp_path):
    source = f"{parquet(tmp_path / 's')}/*.parquet"
    if layout == "tar":
        fields = [{"caption": f"cat {i}", "url": str(i), "jpg": 1} for i in range(3)]
        source = tar_of(tmp_path / "a.tar", samples(list(fields)))
        match = match.replace(r"a\.parquet", r"a\.tar").replace(
            "it has caption, jpg, url", "it has caption, image, jpg"
        )
    refused(make_run, source, f"data.columns={{{columns}}}", match=match)


def test_columns_of_one_source_or_of_few_samples_are_there(make_run, tmp_path):
    """Absent columns of uids and URLs are how uids are derived from something else."""
    parquet(tmp_path / "a", my_text=PAIRS["caption"], caption=None)
    parquet(tmp_path / "b", my_text=PAIRS["caption"], link=PAIRS["url"], url=None)
    fields = [{"my_text": "c", "link": str(i)} | ({"blur": 1} if i == 700 else {}) for i in range(701)]
    tar_of(tmp_path / "c.tar", samples(list(fields)))
    by_source = [[f"{tmp_path}/a/a.parquet"], [f"{tmp_path}/b/a.parquet"], [f"{tmp_path}/c.tar"]]
    columns = "data.columns={caption: my_text, url: link, similarity: blur, uid: none}"
    run = make_run("x", "data.rules=[{rule: similarity, at_least: 0}]", columns)
    first_shards.refuse_columns(run.data.columns, [open_shard(path[0], run.data.columns) for path in by_source])
    with pytest.raises(ValueError, match=r"a/a\.parquet has no column blur"):
        first_shards.check(run, by_source)
    first_shards.check(run, by_source[2:])
    first_shards.check(make_run("x", "data.rules=[]", columns), by_source)


def test_none_is_an_absent_column_for_which_no_tar_is_read_whole(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(first_shards, "open_shard", None)
    path = tar_of(tmp_path / "a.tar", samples([{"caption": "a", "name": "b", "nose": 1}] * 5))
    for column in ("uid", "id", "url"):
        first_shards.check(make_run("x", "data.rules=[]", f"data.columns={{{column}: none}}"), [[path]])


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ("{rule: unsafe}", "has no column punsafe or nsfw_score_opennsfw2"),
        ("{rule: similarity, at_least: 0.3, column: caption}", "no numbers, such as 'cat 0'"),
        ("{rule: duplicate, by: [hash]}", "has no column hash"),
        ("{rule: language, keep: [en]}", "has no column LANGUAGE"),
    ],
)
def test_what_a_rule_reads_is_looked_for(rule, match, make_run, tmp_path):
    refused(make_run, parquet(tmp_path / "s"), f"data.rules=[{rule}]", match=match)


def test_what_is_no_shard_and_what_has_no_captions_is_refused(make_run, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.jpg").write_bytes(picture(0))
    refused(make_run, f"{tmp_path}/s/*.jpg", match=r"there are 1 \.jpg")
    (tmp_path / "s" / "a.parquet").write_bytes(picture(0))
    refused(make_run, f"{tmp_path}/s", match=r"a\.parquet is damaged, or is not Parquet")
    (tmp_path / "s" / "a.tar").write_bytes(b"<html>")
    refused(make_run, f"{tmp_path}/s", match=r"a\.tar is no tar")
    source = parquet(tmp_path / "u", caption=None, Beschriftung=PAIRS["caption"])
    refused(make_run, source, match=r"has no column txt or caption .*it has Beschriftung, jpg, url.*data\.columns")
    parquet(tmp_path / "v", "0.parquet", url=[], caption=[], jpg=[])  # an empty shard says nothing
    refused(make_run, parquet(tmp_path / "v", "1.parquet", caption=None), match=r"1\.parquet has no column txt or")


@pytest.mark.parametrize("ids", ["restarting", "of a class", "sound"])
def test_ids_that_come_again_name_no_row(ids, make_run, tmp_path):
    for shard in range(12):
        of = {"restarting": range(N), "of a class": [shard % 3] * N, "sound": range(shard * N, shard * N + N)}[ids]
        parquet(tmp_path / "s", f"{shard:02d}.parquet", url=None, id=list(of), caption=["cat"] * N)
    paths = sorted(map(str, (tmp_path / "s").iterdir()))
    if ids != "sound":
        again = {"restarting": "200 of the first 240", "of a class": "237 of the first 240"}[ids]
        match = rf"00\.parquet and .* by the column id, .*{again} rows .*\{{id: none\}}"
        refused(make_run, f"{tmp_path}/s", match=match)
    first_shards.check(make_run("x", "data.rules=[]", "data.columns={id: none}"), [paths])
    if ids == "sound":
        first_shards.check(make_run("x", "data.rules=[]"), [paths])
