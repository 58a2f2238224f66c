from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.base import manifests, storage
from pipelines.base.integrity import Damaged
from pipelines.data import catalogue
from pipelines.data.catalogue import Catalogue
from pipelines.scores import reference_scores
from pipelines.stream import super_batches
from pipelines.stream.source import open_source
from tests.pipelines.data.test_rules import write_subset
from tests.pipelines.scores.test_reference_scores import make_reference

pytestmark = pytest.mark.usefixtures("ray_session")


def parts(listing: Catalogue) -> pa.Table:
    names = storage.names(f"{listing.directory}/parts", ".parquet")
    return pa.concat_tables([storage.open_parquet(f"{listing.directory}/parts/{name}").read() for name in names])


def dropped_by(listing: Catalogue) -> dict[str, str | None]:
    """Of each uid the rule that dropped it, None for a kept row."""
    table = parts(listing)
    return dict(zip(table["uid"].to_pylist(), table["dropped_by"].to_pylist(), strict=True))


def test_stage_audits_and_runs_once(make_run, shards, capsys):
    run = make_run("joint")
    listing = catalogue.run_stage(run)
    for counts, path in zip(listing.shards["counts"].to_pylist(), sorted(shards.iterdir()), strict=True):
        status = pq.read_table(path, columns=["status"])["status"].to_pylist()
        assert dict(counts).get("status", 0) == sum(s != "success" for s in status)
        assert sum(n for _, n in counts) == 150
    assert listing.row_groups["rows"].to_pylist() == [50] * 12
    assert sum(listing.row_groups["slots"].to_pylist()) == listing.manifest["counts"]["kept"]
    assert "kept" in capsys.readouterr().out
    again = catalogue.run_stage(run)
    assert again.manifest == listing.manifest
    assert "already at" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another configuration \\(rules"):
        catalogue.run_stage(make_run("joint", "data.rules=[{rule: status}]"))


def test_each_dropped_row_counts_for_the_first_rule_that_drops_it(make_run, tmp_path):
    table = pa.table(
        {
            "uid": [f"{i:032x}" for i in range(6)],
            "caption": ["a red cat", "", None, "cat", "two dogs", "a blue bird"],
            "punsafe": pa.array([0.1, 0.1, 0.1, 0.7, None, 0.5], pa.float32()),
            "status": ["success"] * 5 + ["failed_to_download"],
        }
    )
    (tmp_path / "s").mkdir()
    pq.write_table(table, tmp_path / "s" / "a.parquet", row_group_size=4)
    texts = "{rule: status}", "{rule: unsafe}", "{rule: caption, min_words: 2, min_characters: 3}"
    expected = {
        texts: [None, "caption", "caption", "unsafe", "unsafe", "status"],
        texts[::-1]: [None, "caption", "caption", "caption", "unsafe", "unsafe"],
    }
    for i, (rules, rule_of_each) in enumerate(expected.items()):
        rule_list = f"data.rules=[{', '.join(rules)}]"
        run = make_run("x", rule_list, f"data.catalogue=c{i}", source=str(tmp_path / "s"))
        assert list(dropped_by(catalogue.run_stage(run)).values()) == rule_of_each


def test_an_interrupted_catalogue_is_completed(make_run):
    run = make_run("joint")
    whole = catalogue.run_stage(run)
    directory = run.path("catalogue")
    claim = {"stage": "catalogue", "complete": False, "config": whole.manifest["config"]}
    storage.write_json(f"{directory}/manifest.json", claim)
    storage.remove(f"{directory}/parts/00002.parquet")
    kept = storage.filesystem(f"{directory}/parts/00001.parquet")[0].modified(f"{directory}/parts/00001.parquet")
    assert catalogue.run_stage(run).manifest == whole.manifest
    assert storage.filesystem(directory)[0].modified(f"{directory}/parts/00001.parquet") == kept


def copies(shards, folder, rows: dict[int, list[int]]) -> str:
    """Write shards in row groups of 10, shard i with rows[i] of the pool's first shard; the folder."""
    folder.mkdir()
    table = pq.read_table(sorted(shards.iterdir())[0])
    for i, picked in rows.items():
        pq.write_table(table.take(pa.array(picked, pa.int64())), folder / f"{i:05d}.parquet", row_group_size=10)
    return str(folder)


def test_rules_that_keep_nothing_are_an_error_and_claim_nothing(make_run, shards, tmp_path):
    source, other = (copies(shards, tmp_path / name, {0: list(range(5))}) for name in "ab")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"keep no row \(kept 0 of 5 rows; dropped by caption 5\): correct"):
            catalogue.run_stage(make_run("x", "data.rules=[{rule: caption, min_words: 999}]", source=source))
    assert catalogue.run_stage(make_run("x", "data.rules=[]", source=other)).manifest["counts"] == {"kept": 5}


def test_a_catalogue_is_of_its_lists_as_they_were(make_run, shards, tmp_path, capsys):
    source = copies(shards, tmp_path / "s", {0: list(range(5))})
    uids = pq.read_table(f"{source}/00000.parquet")["uid"].to_pylist()
    run = make_run("x", f"data.rules=[{{rule: deny, file: {tmp_path}/deny.txt}}]", source=source)
    with pytest.raises(FileNotFoundError, match=r"the rule deny names .*deny\.txt, and .* is no file: correct it"):
        catalogue.run_stage(run)
    (tmp_path / "deny.txt").write_text(uids[0])
    listing = catalogue.run_stage(run)
    assert listing.manifest["counts"]["deny"] == 1
    assert "none of the list" not in capsys.readouterr().out
    (tmp_path / "deny.txt").write_text("\n".join(uids[:2]))
    with pytest.raises(ValueError, match=r"another configuration \(lists: there"):
        catalogue.run_stage(run)
    config = {name: value for name, value in listing.manifest["config"].items() if name != "lists"}
    earlier = {name: value for name, value in listing.manifest.items() if name != "fingerprint"} | {"config": config}
    manifests.finish(listing.directory, earlier)
    assert catalogue.run_stage(run).manifest["counts"]["deny"] == 1  # one of an earlier version, which did not say


def test_a_list_that_names_no_row_is_said(make_run, shards, tmp_path, capsys):
    """Also beside one that names some, and where another rule drops these first."""
    source = copies(shards, tmp_path / "s", {0: list(range(5)), 1: list(range(5, 9))})
    uids = pq.read_table(f"{source}/00001.parquet")["uid"].to_pylist()
    (tmp_path / "some.txt").write_text(f"{uids[0]}\n")
    (tmp_path / "other.txt").write_text(f"{'f' * 32}\n{'e' * 32}\n")
    texts = [f"{{rule: deny, file: {tmp_path}/{name}.txt}}" for name in ("some", "other")]
    texts = [f"{{rule: subset, file: {source}/00001.parquet}}", *texts, "{rule: duplicate}"]
    counts = catalogue.run_stage(make_run("x", f"data.rules=[{', '.join(texts)}]", source=source)).manifest["counts"]
    assert counts == {"deny": 1, "kept": 3, "subset": 5}
    said = [line for line in capsys.readouterr().out.splitlines() if "none of the list" in line]
    assert len(said) == 1
    assert "other.txt: none of the list's 2 entries is among the 9 rows" in said[0]


def test_the_same_command_makes_damaged_files_of_a_catalogue_again(make_run, shards, tmp_path):
    source = copies(shards, tmp_path / "d", {0: list(range(20)), 1: list(range(10, 30)), 2: [40]})
    run = make_run("x", "data.rules=[{rule: duplicate}]", source=source)
    whole = catalogue.run_stage(run)
    before, uids = parts(whole), whole.place(1).rows(0)[0]
    part = whole.place(1).part_path
    data = bytearray(storage.read_bytes(part))
    column = pq.read_metadata(part).row_group(0).column(0)  # of the uids
    data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2] ^= 1
    storage.write_bytes(part, bytes(data))
    with pytest.raises(Damaged, match=rf"{part}, row group 0, is damaged.*run `jest catalogue` again, which makes"):
        whole.place(1).rows(0)
    storage.remove(whole.place(2).part_path)
    storage.write_bytes(f"{whole.directory}/row_groups.parquet", b"torn")
    with pytest.raises(Damaged, match=r"row_groups\.parquet is damaged.*run `jest catalogue` again, which makes it"):
        _ = Catalogue(whole.directory, whole.manifest).row_groups
    assert catalogue.run_stage(run).manifest == whole.manifest
    assert parts(whole).equals(before)
    assert whole.place(1).rows(0)[0] == uids
    assert not storage.names(f"{whole.directory}/parts", ".damaged")
    assert Catalogue(whole.directory, whole.manifest).row_groups.num_rows == 5


def test_a_catalogue_is_refined_by_a_threshold_on_the_score_cache(make_scored_run):
    """The refined catalogue uses the score cache of its parent; no image is read again."""
    run = make_scored_run("joint", "training.sub_batch_size=16", "training.examples_trained=16")
    parent = catalogue.open_catalogue(run.path("catalogue"))
    names = storage.names(f"{run.path('scores')}/parts")
    cache = pa.concat_tables([storage.open_parquet(f"{run.path('scores')}/parts/{n}").read() for n in names])
    middle = float(np.median(cache["cosine"].to_numpy()[np.array(cache["status"].to_pylist()) == "ok"]))
    child_run = make_scored_run(
        "joint",
        "training.sub_batch_size=16",
        "training.examples_trained=16",
        "data.refines=catalogue",
        "data.catalogue=refined",
        f"data.rules=[{{rule: score, scores: scores, at_least: {middle}}}]",
    )
    child = catalogue.run_stage(child_run)
    assert child.manifest["counts"]["kept"] == pytest.approx(parent.manifest["counts"]["kept"] / 2, abs=1)
    for uid, rule in dropped_by(parent).items():
        assert rule is None or dropped_by(child)[uid] == rule  # rows that the parent dropped keep their rule
    source = open_source(child_run)
    assert source.order.n_rows == child.manifest["counts"]["kept"]
    batch = next(super_batches.stream(child_run, source, 32, rank=0, n_learners=1, first_step=0))
    cosines = (batch.reference_image.float() * batch.reference_text.float()).sum(1)
    assert cosines.min() >= middle - 2e-3


def test_a_score_cache_of_another_catalogue_sets_no_threshold(make_scored_run):
    make_run, rule = make_scored_run, "data.rules=[{rule: score, scores: scores, at_least: 0}]"
    nowhere = "data.rules=[{rule: score, scores: nowhere, at_least: 0}]"
    with pytest.raises(FileNotFoundError, match="run `jest reference-scores` first"):
        catalogue.run_stage(make_run("joint", nowhere, "data.catalogue=c1", "data.refines=catalogue"))
    with pytest.raises(ValueError, match=r"another catalogue than data\.refines None"):
        catalogue.run_stage(make_run("joint", rule, "data.catalogue=c2"))
    catalogue.run_stage(make_run("joint", "data.rules=[]", "data.catalogue=c3"))
    with pytest.raises(ValueError, match=r"another catalogue than data\.refines c3"):
        catalogue.run_stage(make_run("joint", rule, "data.catalogue=c4", "data.refines=c3"))


def test_refining_a_catalogue_of_other_shards_is_refused(make_run, shards, tmp_path):
    catalogue.run_stage(make_run("a"))
    source = copies(shards, tmp_path / "d", {0: [0, 1, 2]})
    with pytest.raises(ValueError, match=r"data\.refines catalogue is a catalogue of other shards"):
        catalogue.run_stage(make_run("b", "data.refines=catalogue", "data.catalogue=refined", source=source))


def test_a_subset_repeats_rows_and_a_metadata_catalogue_works_as_one(make_run, shards, tmp_path):
    uids = pq.read_table(sorted(shards.iterdir())[0])["uid"].to_pylist()
    write_subset(tmp_path / "s.npy", [uids[0], uids[1], uids[1], uids[120], uids[1]])
    run = make_run(
        "uniform",
        f"data.rules=[{{rule: subset, file: {tmp_path}/s.npy}}]",
        "selection.method=uniform",
        "training.sub_batch_size=8",
        "training.examples_trained=40",
        "data.n_streams=1",
    )
    listing = catalogue.run_stage(run)
    assert listing.manifest["counts"] == {"kept": 3, "subset": 597}
    source = open_source(run)
    assert source.order.n_rows == 5
    offered: Counter[tuple[int, int]] = Counter()
    for batch in super_batches.stream(run, source, 32, rank=0, n_learners=1, first_step=0):
        offered.update(zip(batch.rows["row"].to_pylist(), batch.rows["occurrence"].to_pylist(), strict=True))
    assert set(offered.values()) == {1}
    assert Counter(row for row, _ in offered) == {0: 8, 1: 24, 120: 8}

    metadata = tmp_path / "metadata"
    metadata.mkdir()
    pq.write_table(pa.table({"uid": uids[:50], "text": ["a b c"] * 25 + ["a"] * 25}), metadata / "m.parquet")
    rule = "data.rules=[{rule: caption, min_words: 3}]"
    catalogue.run_stage(make_run("m", rule, "data.catalogue=chosen", source=str(metadata)))
    rule = f"data.rules=[{{rule: subset, file: {tmp_path}/chosen}}]"
    of_metadata = catalogue.run_stage(make_run("n", rule, "data.catalogue=c3"))
    assert of_metadata.manifest["counts"]["kept"] == 25


def test_source_weights_scale_the_rows_of_an_epoch(make_run, shards):
    paths = sorted(str(path) for path in shards.iterdir())
    overrides = [
        "selection.method=uniform",
        f"data.shards='{paths[0]}::{paths[1]}'",
        "data.weights=[2, 0.25]",
        "data.rules=[]",
        "training.sub_batch_size=4",
        "training.examples_trained=336",
        "data.n_streams=2",
    ]
    run = make_run("uniform", *overrides)
    catalogue.run_stage(run)
    source = open_source(run)
    assert source.order.n_rows == 2 * 150 + 38
    seen: Counter[int] = Counter()
    for batch in super_batches.stream(run, source, 32, rank=0, n_learners=1, first_step=0):
        seen.update(batch.rows["shard"].to_pylist())
    assert seen[0] == pytest.approx(300, abs=2)
    with pytest.raises(ValueError, match=r"data\.weights has 1 numbers for 2 sources"):
        make_run("uniform", *overrides, "data.weights=[2]")


def test_an_empty_shard_is_no_error(make_run, shards, tmp_path):
    source = copies(shards, tmp_path / "d", {0: [], 1: list(range(40)), 2: []})
    run = make_run("x", "data.rules=[]", "training.sub_batch_size=8", "training.examples_trained=16", source=source)
    make_reference(run)
    assert catalogue.run_stage(run).manifest["counts"] == {"kept": 40}
    counts = reference_scores.run_stage(run).get("counts")
    assert sum(counts.values()) == 40
    batches = super_batches.stream(run, open_source(run), 32, rank=0, n_learners=1, first_step=0)
    assert len(list(batches)) == 2
