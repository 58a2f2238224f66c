"""A finished score cache: reading it, and refusing one that does not belong to the catalogue or the reference."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from jest_core import run_file
from jest_core.models import configurations
from pipelines.base import blocks, checkpoints, storage
from pipelines.base.integrity import Damaged
from pipelines.data import rows
from pipelines.data.catalogue import open_catalogue
from pipelines.data.places import Place
from pipelines.scores import calibration, parts, reference_scores, score_cache
from pipelines.scores.embedder import Embedder, load_reference
from pipelines.stream import super_batches
from pipelines.stream.source import open_source


def in_a_copy(run, tmp_path, *overrides):
    """The run with a copy of its files, which a test may damage."""
    shutil.copytree(run.root, tmp_path / "copy")
    return run_file.load(run_file.dump(run), [f"root={tmp_path / 'copy'}", *overrides])


def test_a_joined_block_is_split_by_row_group():
    block = pa.table({"unit": [7, 7, 3, 9, 9, 9], "row": [0, 1, 0, 4, 5, 6]})
    assert [part["row"].to_pylist() for part in blocks.runs(block, "unit")] == [[0, 1], [0], [4, 5, 6]]
    assert [len(part) for part in blocks.runs(block.slice(0, 2), "unit")] == [2]


def test_verify_accepts_a_correct_cache(scored, capsys):
    reference_scores.verify_cache(scored)
    assert "256 pairs embedded again" in capsys.readouterr().out


def test_verify_refuses_embeddings_of_other_images(scored, tmp_path):
    run = in_a_copy(scored, tmp_path)
    path = Path(score_cache.part_path(run.path("scores"), 2))
    table = pq.read_table(path)
    images = np.roll(blocks.unpack(table["image_embedding"]), 1, axis=0)
    index = table.schema.get_field_index("image_embedding")
    table = table.set_column(index, "image_embedding", blocks.pack(images))
    storage.write_table(str(path), table, [50, 50, 50])
    with pytest.raises(ValueError, match="is not what jest-tiny gives: 256 pairs embedded again"):
        reference_scores.verify_cache(run)


def test_a_part_of_another_cache_is_refused_at_the_end(scored, tmp_path):
    run = in_a_copy(scored, tmp_path)
    manifest = score_cache.opened(run.path("scores"))
    config = manifest["config"] | {"precision": "bf16 forward, float16 embeddings"}
    with pytest.raises(ValueError, match=r"00000\.parquet was written with another configuration at the same time"):
        parts.finish(run.path("scores"), open_catalogue(run.path("catalogue")), config, -10.0)


def test_rows_are_read_by_position_and_checked_by_uid(tmp_path):
    uids = [f"{i:032x}" for i in range(5)]
    table = pa.table({"uid": uids, "cosine": np.arange(5.0)})
    storage.write_table(score_cache.part_path(str(tmp_path), 3), table, [3, 2])
    place = Place(3, "3.parquet", "catalogue", "")
    cached = score_cache.read(str(tmp_path), place, 1, uids[3:], ["cosine"])
    assert cached["cosine"].to_pylist() == [3.0, 4.0]
    for group, others in ((1, [uids[4], uids[3]]), (0, uids[:2])):
        with pytest.raises(ValueError, match=f"does not line up with 3.parquet, row group {group}"):
            score_cache.read(str(tmp_path), place, group, others, ["cosine"])
    with pytest.raises(Damaged, match=r"ends before row group 2 of 3\.parquet; run `jest reference-scores` again"):
        score_cache.read(str(tmp_path), place, 2, uids[:2], ["cosine"])


def test_embeddings_that_are_none_are_named_with_their_rows(tmp_path):
    directory, place, uids = str(tmp_path), Place(3, "3.parquet", "catalogue", ""), [f"{i:032x}" for i in range(40)]
    whole = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    whole /= np.linalg.norm(whole, axis=1, keepdims=True)
    whole[7] = 0  # a row whose picture did not decode

    def read_with(bad: slice, factor: float, name: str = "image_embedding") -> pa.Table:
        columns = {"image_embedding": whole.copy(), "text_embedding": whole.copy()}
        columns[name][bad] *= factor
        packed = {key: blocks.pack(value.astype(np.float16)) for key, value in columns.items()}
        storage.write_table(score_cache.part_path(directory, 3), pa.table({"uid": uids, **packed}))
        return score_cache.read(directory, place, 0, uids, list(columns))

    assert read_with(slice(0), 1).num_rows == 40
    for bad, factor, said in (
        (slice(0, None, 20), np.nan, "in 2 of 40 rows (0, 20)"),
        (slice(3, 4), np.inf, "in 1 of 40 rows (3)"),
        (slice(None), 30.0, "in 39 of 40 rows (0, 1, 2, 3, 4, ...)"),
        (slice(5, 6), 0.5, "in 1 of 40 rows (5)"),
    ):
        for name in ("image_embedding", "text_embedding"):
            with pytest.raises(Damaged, match=re.escape(said)) as raised:
                read_with(bad, factor, name)
            assert f"00003.parquet, row group 0: {name} is NaN" in str(raised.value)
            assert "run `jest reference-scores` again, which makes" in str(raised.value)


def test_where_no_note_can_be_left_the_part_is_removed_by_hand(tmp_path):
    part = Path(score_cache.part_path(str(tmp_path), 3))
    part.with_name("00003.parquet.damaged").mkdir(parents=True)
    part.write_bytes(b"torn")
    with pytest.raises(Damaged, match=r"remove \S+00003\.parquet, and run `jest reference-scores` again"):
        score_cache.read(str(tmp_path), Place(3, "3.parquet", "catalogue", ""), 0, [], ["cosine"])


def test_the_same_command_makes_damaged_files_of_a_cache_again(scored, tmp_path, capsys):
    run = in_a_copy(scored, tmp_path)
    directory, catalogue = run.path("scores"), open_catalogue(run.path("catalogue"))
    parts_before = [pq.read_table(score_cache.part_path(directory, i)) for i in range(4)]
    columns = ["image_embedding", "text_embedding"]
    for number in (1, 2):
        path = Path(score_cache.part_path(directory, number))
        data = bytearray(path.read_bytes())
        chunk = pq.read_metadata(path).row_group(1).column(parts_before[1].schema.get_field_index("image_embedding"))
        data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 16
        path.write_bytes(data if number == 1 else data[:1000])
        place = catalogue.place(number)
        uids = place.rows(1)[0]
        with pytest.raises(Damaged, match=rf"{path}.*run `jest reference-scores` again, which makes {path} again"):
            score_cache.read(directory, place, 1, uids, columns)
    Path(score_cache.part_path(directory, 3)).unlink()
    for table in ("row_groups", "bad_rows"):
        Path(directory, f"{table}.parquet").write_bytes(b"torn")
    assert score_cache.missing(directory, catalogue).tolist() == [1, 2, 3]
    before = score_cache.opened(directory)
    assert reference_scores.run_stage(run) == before
    assert "4 shards (1 done)" in capsys.readouterr().out
    assert [pq.read_table(score_cache.part_path(directory, i)) for i in range(4)] == parts_before
    assert len(score_cache.good_slots(directory)) == 12
    assert not storage.names(f"{directory}/parts", ".damaged")
    reference_scores.run_stage(run)
    assert "already at" in capsys.readouterr().out


def test_a_reference_that_gives_nan_costs_the_rows_alone_or_is_named(scored, tmp_path):
    run = in_a_copy(scored, tmp_path)
    units = ray.put(np.array([[0, 0, 0]]))
    inputs = configurations.inputs_of(run.model)
    (block,) = rows.of_row_group({"id": np.array([0])}, units, run_file.dump(run), inputs, 64)
    pair, tokens = load_reference(run, run.reference), blocks.unpack(block["tokens"])
    token = next(token for token in tokens[0] if 0 < (tokens == token).any(1).sum() < 25)  # a word of a few captions
    of_word = (tokens == token).any(1)
    with torch.no_grad():
        pair.model.token_embedding.weight[int(token)] = torch.nan
    checkpoints.write(run.path("reference"), 1, {"state_dict": pair.model.state_dict(), "jest": {"step": 1}})
    embedded = Embedder(run_file.dump(run), run.reference.model_dump_json())(block)
    bad = np.array(embedded["status"].to_pylist()) == "damaged"
    assert (bad == of_word).all()
    for name in ("image_embedding", "text_embedding"):
        norms = np.linalg.norm(blocks.unpack(embedded[name]).astype(np.float32), axis=1)
        np.testing.assert_allclose(norms, ~bad, atol=1e-3)
    with torch.no_grad():
        pair.model.visual.ln_post.weight.fill_(torch.nan)
    checkpoints.write(run.path("reference"), 1, {"state_dict": pair.model.state_dict(), "jest": {"step": 1}})
    with pytest.raises(ValueError, match="the reference jest-tiny gives embeddings that are NaN or infinite"):
        Embedder(run_file.dump(run), run.reference.model_dump_json())(block)


def test_a_cache_serves_the_decoder_that_it_was_scored_with(scored, tmp_path):
    run = in_a_copy(scored, tmp_path, "data.decoder=simplejpeg")
    with pytest.raises(
        ValueError, match=r"scores was scored with data\.decoder pillow, and data\.decoder is simplejpeg"
    ):
        open_source(run)
    with pytest.raises(ValueError, match=r"another configuration .*decoder: there null, here .simplejpeg."):
        reference_scores.run_stage(run)
    storage.remove_tree(run.path("scores"))
    manifest = reference_scores.run_stage(run)
    assert manifest["config"]["preprocessing"].startswith("Decoder(simplejpeg); Resize")
    assert manifest["counts"] == score_cache.opened(scored.path("scores"))["counts"]
    reference_scores.verify_cache(run)
    source, size = open_source(run), configurations.image_size(run.model.name)
    batch = next(super_batches.stream(run, source, size, rank=0, n_learners=1, first_step=0))
    view = configurations.inputs_of(run.model, run.data.decoder).view
    pixels, _ = view.batch(batch.rows["image"].to_pylist())
    assert (batch.pixels.numpy() == pixels).all()
    with pytest.raises(ValueError, match=r"scored with data\.decoder simplejpeg, and data\.decoder is pillow"):
        open_source(run_file.load(run_file.dump(run), ["data.decoder=pillow"]))
    config = manifest["config"] | {"weights": None}  # another tool embedded, by pixels that are not known
    score_cache.refuse_other_decoder({**manifest, "config": config}, "pillow", "scores")


def test_a_calibration_sample_has_unit_norm_embeddings(scored):
    image, text = calibration.sample(scored.path("scores"), open_catalogue(scored.path("catalogue")), seed=0, n=100)
    assert image.shape == text.shape == (100, 32)
    np.testing.assert_allclose(image.norm(dim=1), np.ones(100), atol=1e-3)
