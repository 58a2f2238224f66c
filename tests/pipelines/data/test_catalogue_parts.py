"""A part of a catalogue, without Ray: what is unusual in a shard is counted, and many empty captions are an error."""

import json
from pathlib import Path
from typing import Any

import pytest

from jest_core.run_file import Run
from pipelines.data import catalogue_parts
from pipelines.data.catalogue_parts import Description
from pipelines.data.places import Place
from tests.pipelines.data.test_first_shards import PAIRS, N, parquet
from tests.pipelines.data.test_tars import picture, samples, tar_of


def part_of(run: Run, path: str) -> Description:
    place = Place(0, path, run.path("catalogue"), run.path("catalogue/index"))
    written = catalogue_parts._write_shard({"place": place, "done": False}, run, {}, None)
    described: Description = json.loads(written["description"])
    return described


def say_notes(run: Run, described: list[Description]) -> None:
    notes = catalogue_parts._Notes()
    for description in described:
        notes.add(description)
    notes.say(run)


def shard_with(tmp_path: Path, **columns: Any) -> str:
    return f"{parquet(tmp_path / 's', **columns)}/a.parquet"


@pytest.mark.parametrize("layout", ["parquet", "tar", "tar of captions elsewhere"])
def test_a_shard_without_captions_is_an_error_with_an_example(layout, make_run, tmp_path):
    run = make_run("x", "data.rules=[]")
    if layout == "parquet":
        path = shard_with(tmp_path, caption=[None] * 13 + [" "] * 13 + ["cat"] * 14)
        match = (
            r"a\.parquet: 26 of 40 rows .*max_empty_captions 0\.5, such as row 0 of .* the columns caption, jpg, url"
        )
    elif layout == "tar":
        path = tar_of(tmp_path / "a.tar", [(f"{i}.jpg", picture(i)) for i in range(30)])
        match = r"a\.tar: 30 of 30 rows"
    else:
        path = tar_of(tmp_path / "a.tar", samples([{"Beschriftung": f"Katze {i}"} for i in range(30)]))
        match = "30 of 30 rows .*which has the columns Beschriftung, image, key, txt: name the column of captions"
    with pytest.raises(ValueError, match=match):
        part_of(run, path)
    n = part_of(make_run("x", "data.rules=[]", "data.max_empty_captions=1"), path)["notes"]
    assert n["kept rows without a caption"][0] == (26 if layout == "parquet" else 30)


def test_rows_that_a_rule_drops_need_no_caption(make_run, tmp_path):
    run = make_run("x", "data.rules=[{rule: caption, min_words: 1}]")
    described = part_of(run, shard_with(tmp_path, caption=[""] * 30 + ["cat"] * 10))
    assert described["counts"] == {"caption": 30, "kept": 10}
    assert described["notes"] == {}


def test_few_empty_captions_are_counted_over_all_shards(make_run, tmp_path, capsys):
    run = make_run("x", "data.rules=[]")
    shards = [part_of(run, shard_with(tmp_path, caption=[""] * n + ["cat"] * (N - n))) for n in (3, 19, 0)]
    say_notes(run, shards)
    out = capsys.readouterr().out
    assert "22 kept rows without a caption (such as row 0 of " in out
    small = [part_of(run, tar_of(tmp_path / "a.tar", [("a.jpg", picture(0))]))] * 30  # each too small to say anything
    with pytest.raises(ValueError, match="the catalogue: 30 of 30 rows are kept without a caption"):
        say_notes(run, small)


def test_values_that_are_no_numbers_and_uids_that_come_again_are_counted(make_run, tmp_path, capsys):
    run = make_run("x", "data.rules=[{rule: unsafe}]")
    scores = ["0.1"] * 30 + ["n/a", "", None, "high", "nan"] + ["0.2"] * 5
    urls = ["http://a/same"] * 3 + PAIRS["url"][3:]
    described = part_of(run, shard_with(tmp_path, punsafe=scores, url=urls, caption=["cat"] * N))
    assert described["counts"] == {"kept": 35, "unsafe": 5}
    say_notes(run, [described])
    out = capsys.readouterr().out
    assert "2 values of column punsafe that are no numbers count as missing (such as 'n/a' in row group 0 of" in out
    assert "2 rows with the uid of an earlier row of their shard (such as row 1 of" in out


def test_a_part_of_an_earlier_version_has_no_notes(make_run, tmp_path, capsys):
    described = part_of(make_run("x", "data.rules=[]"), shard_with(tmp_path))
    del described["notes"]
    say_notes(make_run("x"), [described])
    assert not capsys.readouterr().out
