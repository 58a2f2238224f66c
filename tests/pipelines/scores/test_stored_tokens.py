"""Tokens beside the scores are those of the tokenizer, whatever became of the captions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from jest_core import run_file
from jest_core.examples.tokenizer import ClipTokenizer
from jest_core.models import configurations
from pipelines.base import blocks, storage
from pipelines.base.integrity import Damaged
from pipelines.data.catalogue import open_catalogue
from pipelines.scores import parts, score_cache, stored_tokens
from pipelines.stream import windows
from pipelines.stream.source import open_source


def column(captions: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(captions, pa.large_string())])


@given(st.lists(st.text(max_size=40), min_size=1, max_size=6), st.sampled_from([1, 2, 3, 8, 77]))
@settings(max_examples=100, deadline=None)
def test_tokens_come_back_as_they_were(captions: list[str], length: int):
    captions = [text.encode("utf-8", "ignore").decode() for text in captions]
    tokenizer = ClipTokenizer(length)
    tokens = tokenizer(captions)
    stored = pa.table(stored_tokens.pack(tokens, column(captions)))
    assert np.array_equal(stored_tokens.unpack(stored, column(captions), tokenizer), tokens)


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=6))
def test_any_padding_is_left_out_and_comes_back(rows: list[list[int]]):
    """Also one of another number than 0, or of the number of a word, as tokenizers of Hugging Face have."""
    captions = column(["a"] * len(rows))
    stored = pa.table(stored_tokens.pack(np.array(rows), captions))
    for ids, row in zip(stored["token_ids"].to_pylist(), rows, strict=True):
        assert len(ids) == 1 or ids[-1] != ids[-2]
        assert ids + ids[-1:] * (5 - len(ids)) == row
    assert stored_tokens.unpack(stored, captions, ClipTokenizer(5)).tolist() == rows


def test_a_caption_that_is_another_one_now_is_tokenised_again():
    before, now, tokenizer = ["a dog", "a cat", "a cow"], ["a dog", "the cat", "a cow"], ClipTokenizer(8)
    stored = pa.table(stored_tokens.pack(tokenizer(before) + 1, column(before)))  # no tokenizer's, so that it is seen
    expected = np.where(np.array([[0], [1], [0]]), tokenizer(now), tokenizer(before) + 1)
    assert np.array_equal(stored_tokens.unpack(stored, column(now), tokenizer), expected)
    assert np.array_equal(stored_tokens.unpack(stored[1:], column(now[1:]), tokenizer), expected[1:])


def tokens_of(run, place=lambda place: place, inputs=None) -> tuple[NDArray[np.int32], list[str]]:
    """Tokens and captions of the first window of a run."""
    table = first_window(run, place, inputs)
    return blocks.unpack(table["tokens"]), table["caption"].to_pylist()


def first_window(run, place=lambda place: place, inputs=None) -> pa.Table:
    source = open_source(run)
    window = next(source.order.windows(0, 0))
    places = {piece.shard: place(source.catalogue.place(piece.shard)) for piece in window.pieces}
    item: windows.Item = {"window": window, "places": places}
    return windows.of_window(item, run_file.dump(run), inputs or configurations.inputs_of(run.model))


def test_the_bytes_of_an_example_are_those_of_a_window(scored):
    table, inputs = first_window(scored), configurations.inputs_of(scored.model)
    images = pa.chunked_array(table["image"].chunks).nbytes - 8 * (len(table) + 1)  # without their offsets
    width = score_cache.opened(scored.path("scores"))["config"]["width"]
    said = windows.example_bytes(inputs.view.image_size, inputs.tokenizer.context_length, width)
    for part, columns in (
        ("pixels", ["pixels"]),
        ("tokens", ["tokens"]),
        ("embeddings", ["reference_image", "reference_text"]),
    ):
        assert table.select(columns).nbytes == said[part] * len(table)
    rest = table.nbytes - images - len(table) * (said["pixels"] + said["tokens"] + said["embeddings"])
    assert 57 < rest / len(table) < said["beside"]  # caption, uid and numbers


def test_a_learner_with_the_references_tokenizer_reads_its_tokens(make_scored_run, tmp_path):
    run = make_scored_run("joint")
    inputs = configurations.inputs_of(run.model)
    tokens, captions = tokens_of(run)
    assert np.array_equal(tokens, inputs.tokenizer(captions))
    assert score_cache.opened(run.path("scores"))["tokenizer"] == inputs.tokenizer.identity

    other = [list(range(100 + i, 103 + i)) for i in range(150)]  # stored in their place, so that it is seen who reads
    for number in range(4):
        path = score_cache.part_path(run.path("scores"), number)
        part = pq.read_table(path)
        ids = pa.array(other, part.schema.field("token_ids").type)
        part = part.set_column(part.schema.get_field_index("token_ids"), part.schema.field("token_ids"), ids)
        storage.write_table(path, part, [50, 50, 50])
    read, _ = tokens_of(run)
    assert (read[:, 1] - read[:, 0] == 1).all()
    assert (read[:, 2:] == read[:, :1] + 2).all()

    longer = replace(inputs, tokenizer=ClipTokenizer(inputs.tokenizer.context_length + 1))
    tokens, captions = tokens_of(run, inputs=longer)
    assert np.array_equal(tokens, longer.tokenizer(captions))

    def rewritten(place):
        table = pq.read_table(place.path)
        texts = pa.array([f"now {text}" for text in table["caption"].to_pylist()])
        path = str(tmp_path / Path(place.path).name)
        table = table.set_column(table.schema.get_field_index("caption"), "caption", texts)
        pq.write_table(table, path, row_group_size=50)
        return replace(place, path=path)

    tokens, captions = tokens_of(run, rewritten)
    assert all(text.startswith("now ") for text in captions)
    assert np.array_equal(tokens, inputs.tokenizer(captions))


def test_of_a_large_row_group_only_the_needed_rows_are_read(make_scored_run):
    """Those of a damaged page do not matter then."""
    run = make_scored_run("joint")
    place, group = open_catalogue(run.path("catalogue")).place(1), 1
    uids, _ = place.rows(group)
    columns = ["status", *score_cache.EMBEDDINGS, "cosine"]
    whole = score_cache.read(run.path("scores"), place, group, uids, columns)
    path = score_cache.part_path(run.path("scores"), 1)
    part = pq.read_table(path)
    storage.write_table(path, part, [50, 50, 50], most_rows=16)
    assert score_cache.read(run.path("scores"), place, group, uids, columns).equals(whole)

    data = bytearray(Path(path).read_bytes())
    chunk = pq.read_metadata(path).row_group(4 + 2).column(part.schema.get_field_index("image_embedding"))
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 16
    Path(path).write_bytes(data)
    cached = score_cache.CachedRows(run.path("scores"), place, group, uids, columns)
    for rows in ([49, 3, 3, 15, 16, 48], [20], [], [31, 0]):
        assert cached.take(np.array(rows, np.int64)).equals(whole.select(columns).take(pa.array(rows, pa.int64())))
    with pytest.raises(Damaged, match="is damaged"):
        cached.take(np.array([3, 32]))


def test_a_part_has_a_large_row_group_in_several(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_MOST_ROWS", 16)
    run, catalogue = scored, open_catalogue(scored.path("catalogue"))
    config = score_cache.opened(run.path("scores"))["config"]
    before = pq.read_table(score_cache.part_path(run.path("scores"), 1))
    fragments = []
    for start in (0, 50, 100):
        fragments.append(parts.Fragment(start, f"{tmp_path}/fragments/{start}.parquet"))
        storage.write_table(fragments[-1].path, before[start : start + 50].replace_schema_metadata(None))
    parts.write_part(str(tmp_path), catalogue, 1, fragments, config, 1.0, "a tokenizer")
    path = score_cache.part_path(str(tmp_path), 1)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [16, 16, 16, 2] * 3
    assert pq.read_table(path).equals(before)
    uids, _ = catalogue.place(1).rows(2)
    cached = score_cache.CachedRows(str(tmp_path), catalogue.place(1), 2, uids, ["row"])
    assert cached.tokenizer == "a tokenizer"
    assert cached.take(np.array([33, 0]))["row"].to_pylist() == [133, 100]


def test_embeddings_that_are_none_are_not_written(scored, tmp_path):
    catalogue = open_catalogue(scored.path("catalogue"))
    config = score_cache.opened(scored.path("scores"))["config"]
    before = pq.read_table(score_cache.part_path(scored.path("scores"), 1)).replace_schema_metadata(None)
    twice = blocks.pack_halves(2 * blocks.unpack(before["text_embedding"]))
    table = before.set_column(before.schema.get_field_index("text_embedding"), "text_embedding", twice)
    storage.write_table(f"{tmp_path}/f.parquet", table[:50])
    with pytest.raises(ValueError, match=r"what is to be .*, row group 0: text_embedding is NaN, infinite or not of"):
        parts.write_part(str(tmp_path), catalogue, 1, [parts.Fragment(0, f"{tmp_path}/f.parquet")], config, 1.0, "a")
