from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from jest_core.models import towers
from pipelines.base import blocks, checkpoints, cluster, storage
from pipelines.base.owner import Owned
from pipelines.data import catalogue
from pipelines.scores import calibration, reference_scores, score_cache
from pipelines.stream import super_batches
from pipelines.stream.source import open_source

pytestmark = pytest.mark.usefixtures("ray_session")


def make_reference(run, seed: int = 5) -> towers.Towers:
    pair = towers.create("jest-tiny", seed=seed)
    content = {"epoch": 1, "name": "jest-tiny", "state_dict": pair.model.state_dict(), "jest": {"step": 1}}
    checkpoints.write(run.path("reference"), 1, content)
    return pair


def test_the_cache_has_every_kept_pair_in_the_order_of_its_shard(make_run, shards):
    run = make_run("joint")
    pair = make_reference(run)
    listing = catalogue.run_stage(run)
    n_ok = 0
    manifest = reference_scores.run_stage(run)
    assert manifest["config"]["weights"] == towers.weights_hash(pair.model)
    assert storage.names(f"{run.path('scores')}/fragments") == []
    for i, path in enumerate(sorted(shards.iterdir())):
        part = storage.open_parquet(f"{run.path('scores')}/parts/{i:05d}.parquet")
        assert [part.metadata.row_group(g).num_rows for g in range(part.num_row_groups)] == [50, 50, 50]
        table, shard = part.read(), pq.read_table(path)
        assert table["uid"].to_pylist() == shard["uid"].to_pylist()
        assert table["row"].to_pylist() == list(range(150))
        n_ok += table["status"].to_pylist().count("ok")
        pixels, _ = pair.view.batch(shard["webp"].to_pylist())
        expected = pair.embed(torch.from_numpy(pixels), pair.tokens(shard["caption"].to_pylist()), batch_size=50)
        ok = np.array(table["status"].to_pylist()) == "ok"
        image = torch.from_numpy(blocks.unpack(table["image_embedding"]).astype(np.float32))
        torch.testing.assert_close(image[ok], expected.image[ok], atol=1e-3, rtol=1e-3)
        cosines = (expected.image * expected.text).sum(1)
        losses = F.softplus(-(expected.logit_scale * cosines + expected.logit_bias))
        torch.testing.assert_close(
            torch.tensor(table["matched_pair_loss"].to_pylist())[ok], losses[ok], atol=1e-4, rtol=1e-4
        )
    assert n_ok == listing.manifest["counts"]["kept"] == manifest["counts"]["ok"]


def test_a_second_run_adds_missing_parts_and_another_reference_is_refused(make_run, capsys):
    run = make_run("joint")
    make_reference(run)
    catalogue.run_stage(run)
    whole = reference_scores.run_stage(run)
    directory = run.path("scores")
    before = storage.read_bytes(f"{directory}/parts/00002.parquet")
    storage.write_json(
        f"{directory}/manifest.json", {"stage": "reference-scores", "complete": False, "config": whole["config"]}
    )
    storage.remove(f"{directory}/parts/00002.parquet")
    storage.write_bytes(f"{directory}/fragments/00002-000000000.parquet", b"left by a crash")
    assert reference_scores.run_stage(run) == whole
    assert (
        storage.open_parquet(f"{directory}/parts/00002.parquet").read().equals(pq.read_table(pa.BufferReader(before)))
    )
    make_reference(run, seed=6)
    with pytest.raises(ValueError, match=r"another configuration \(weights: there"):
        reference_scores.run_stage(run)


def test_a_reference_may_score_at_another_resolution(make_run, shards):
    run = make_run("joint", "reference.score_patch_size=16")
    pair = make_reference(run)
    catalogue.run_stage(run)
    reference_scores.run_stage(run)
    reference_scores.verify_cache(run)
    table = storage.open_parquet(f"{run.path('scores')}/parts/00000.parquet").read()
    pixels, _ = pair.view.batch(pq.read_table(sorted(shards.iterdir())[0])["webp"].to_pylist())
    tokens = torch.zeros(len(pixels), 16, dtype=torch.int64)
    seen = pair.embed(torch.from_numpy(pixels), tokens, batch_size=50, resolution=pair.resolution(patch_size=16)).image
    ok = np.array(table["status"].to_pylist()) == "ok"
    image = torch.from_numpy(blocks.unpack(table["image_embedding"]).astype(np.float32))
    torch.testing.assert_close(image[ok], seen[ok], atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"another configuration .*resolution: there .*patches of 16"):
        reference_scores.run_stage(make_run("joint"))
    with pytest.raises(ValueError, match=r"pixels do not divide into patches of 12.*reference\.score_patch_size"):
        reference_scores.run_stage(make_run("joint", "reference.score_patch_size=12"))


def damaged(shards, folder, rows: int) -> str:
    folder.mkdir()
    for path in sorted(shards.iterdir()):
        table = pq.read_table(path)
        images = [data[:20] if data and i < rows else data for i, data in enumerate(table["webp"].to_pylist())]
        index = table.schema.get_field_index("webp")
        pq.write_table(
            table.set_column(index, "webp", pa.array(images, pa.binary())), folder / path.name, row_group_size=50
        )
    return str(folder)


def test_rows_that_do_not_decode_are_counted_and_left_out_of_the_stream(make_run, shards, tmp_path):
    run = make_run(
        "joint",
        "data.max_bad_share=0.05",
        "training.sub_batch_size=16",
        "training.examples_trained=16",
        source=damaged(shards, tmp_path / "d", 2),
    )
    pair = make_reference(run)
    catalogue.run_stage(run)
    manifest = reference_scores.run_stage(run)
    logged = storage.open_parquet(f"{run.path('scores')}/bad_rows.parquet").read()
    bad = set(zip(logged["shard"].to_pylist(), logged["row"].to_pylist(), strict=True))
    assert len(bad) >= 6
    assert set(logged["reason"].to_pylist()) <= {"damaged", "no_image"}
    assert all(len(uid) == 32 for uid in logged["uid"].to_pylist())
    assert score_cache.n_bad(manifest["counts"]) == len(bad)
    source = open_source(run)
    assert source.order.n_rows == manifest["counts"]["ok"]
    size = pair.view.image_size
    batch = next(super_batches.stream(run, source, size, rank=0, n_learners=1, first_step=0))
    assert batch.valid.all()
    assert not bad & set(zip(batch.rows["shard"].to_pylist(), batch.rows["row"].to_pylist(), strict=True))
    norms = batch.reference_image.float().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(len(norms)), atol=2e-3, rtol=0)


def test_too_many_bad_rows_fail_with_the_counts(make_run, shards, tmp_path):
    run = make_run("joint", "data.max_bad_share=0.05", source=damaged(shards, tmp_path / "d", 30))
    make_reference(run)
    catalogue.run_stage(run)
    with pytest.raises(Exception, match=r"kept rows are bad \(.*30.*\), more than data\.max_bad_share 0\.05"):
        reference_scores.run_stage(run)


def test_a_cache_of_another_catalogue_is_refused_by_training(make_scored_run):
    other = make_scored_run("joint", "data.rules=[{rule: status}]", "data.catalogue=other")
    catalogue.run_stage(other)
    with pytest.raises(ValueError, match="scored for another catalogue"):
        open_source(other)


def test_scorers_add_columns_and_the_precision_can_be_chosen(make_run, tmp_path):
    """Embedded by actors, as on clusters and machines with more cores; in the other tests this process embeds."""
    torch.save({"weight": torch.ones(1, 32), "bias": torch.zeros(1)}, tmp_path / "head.pt")
    words = "{name: words, scorer: 'tests.core.models.test_scorers:word_count', options: {at_most: 5}}"
    run = make_run(
        "joint",
        f"reference.scorers=[{{name: beauty, scorer: linear_head, options: {{path: head.pt}}}}, {words}]",
        "reference.precision=bf16",
        "reference.n_actors=2",
    )
    make_reference(run)
    catalogue.run_stage(run)
    manifest = reference_scores.run_stage(run)
    reference_scores.verify_cache(run)
    assert [scorer["name"] for scorer in manifest["config"]["scorers"]] == ["beauty", "words"]
    assert manifest["config"]["precision"].startswith("bf16")
    part = storage.open_parquet(score_cache.part_path(run.path("scores"), 1)).read()
    ok = np.array(part["status"].to_pylist()) == "ok"
    sums = blocks.unpack(part["image_embedding"]).astype(np.float32).sum(1)
    np.testing.assert_allclose(part["beauty"].to_numpy()[ok], sums[ok], atol=0.01)
    place = catalogue.open_catalogue(run.path("catalogue")).place(1)
    captions = [c for g in range(3) for c in place.open({}).captions(g)]
    expected = [min(len(c.split()), 5) for c in captions]
    assert part["words"].to_numpy()[ok].tolist() == np.array(expected)[ok].tolist()
    with pytest.raises(ValueError, match=r"another configuration \(precision: there \"bf16"):
        reference_scores.run_stage(make_run("joint", "reference.precision=fp32", f"reference.scorers=[{words}]"))


def test_machines_with_few_cores_embed_without_actors(make_run, monkeypatch):
    spec = make_run("joint").reference
    for n_cores, n_actors in ((2, 0), (4, 0), (8, 8)):
        monkeypatch.setattr(cluster, "n_cores", lambda n=n_cores: n)
        assert reference_scores._n_actors(spec) == n_actors
        assert reference_scores._n_actors(spec.model_copy(update={"n_actors": 3})) == 3


def test_more_row_groups_than_tasks_make_the_same_cache(make_run, monkeypatch):
    """A task then reads several of the twelve, and Ray Data joins its output. By this process and by an actor."""
    monkeypatch.setattr(reference_scores, "_FEW_CORES", 1 << 10)  # without actors this process embeds
    caches = []
    for name, most, n_actors in (("each", 5_000, "null"), ("together", 3, "null"), ("together-by-an-actor", 3, "1")):
        monkeypatch.setattr(reference_scores, "_MOST_TASKS", most)
        run = make_run("joint", f"reference.scores={name}", f"reference.n_actors={n_actors}")
        make_reference(run)
        catalogue.run_stage(run)
        reference_scores.run_stage(run)
        caches.append([storage.read_bytes(f"{run.path(name)}/parts/{i:05d}.parquet") for i in range(4)])
    assert caches[0] == caches[1] == caches[2]


def test_a_softmax_reference_gets_a_calibrated_logit_bias(make_run, capsys):
    run = make_run("joint", "reference.model.name=jest-tiny-softmax", "training.examples_trained=32")
    pair = towers.create("jest-tiny-softmax", seed=5)
    assert pair.loss == "softmax"
    checkpoints.write(run.path("reference"), 1, {"state_dict": pair.model.state_dict()})
    catalogue.run_stage(run)
    manifest = reference_scores.run_stage(run)
    scale, bias = score_cache.scale_and_bias(manifest)
    assert scale == pytest.approx(np.exp(3.0), rel=1e-4)
    assert "has no logit_bias" in capsys.readouterr().out
    image, text = calibration.sample(run.path("scores"), catalogue.open_catalogue(run.path("catalogue")), seed=0)
    assert torch.sigmoid(scale * image @ text.T + bias).sum().item() == pytest.approx(len(image), rel=1e-3)
    assert open_source(run).scale_and_bias == (scale, bias)
    given = make_run("joint", "reference.model.name=jest-tiny-softmax", "reference.logit_bias=-7", "reference.scores=b")
    assert reference_scores.run_stage(given)["logit_bias"] == -7


def test_the_second_of_two_writers_is_refused_and_the_first_makes_a_valid_cache(make_run):
    run = make_run("joint")
    make_reference(run)
    catalogue.run_stage(run)
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(reference_scores.run_stage, run) for _ in range(2)]
    (refused,) = (error for error in (writer.exception() for writer in writers) if error)
    assert isinstance(refused, Owned)
    assert reference_scores.run_stage(run)["counts"]["ok"] == 599
    assert not storage.exists(f"{run.path('scores')}/fragments")
    reference_scores.verify_cache(run)
