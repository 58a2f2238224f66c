"""A finished score cache: reading it, and refusing one that does not belong to the catalogue or the reference."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jest_core import run_file
from pipelines.base import blocks, storage
from pipelines.data.catalogue import open_catalogue
from pipelines.data.places import Place
from pipelines.scores import calibration, parts, reference_scores, score_cache


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
    rows = score_cache.read(str(tmp_path), place, 1, uids[3:], ["cosine"])
    assert rows["cosine"].to_pylist() == [3.0, 4.0]
    for group, others in ((1, [uids[4], uids[3]]), (0, uids[:2])):
        with pytest.raises(ValueError, match=f"does not line up with 3.parquet, row group {group}"):
            score_cache.read(str(tmp_path), place, group, others, ["cosine"])
    with pytest.raises(ValueError, match="ends before row group 2"):
        score_cache.read(str(tmp_path), place, 2, uids[:2], ["cosine"])


def test_a_calibration_sample_has_unit_norm_embeddings(scored):
    image, text = calibration.sample(scored.path("scores"), open_catalogue(scored.path("catalogue")), seed=0, n=100)
    assert image.shape == text.shape == (100, 32)
    np.testing.assert_allclose(image.norm(dim=1), np.ones(100), atol=1e-3)
