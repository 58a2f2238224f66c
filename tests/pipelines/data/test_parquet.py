"""Parquet shards: columns of any type, and row groups of any size."""

import contextlib
import datetime
import decimal
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.base import storage
from pipelines.data import parquet
from pipelines.data.layouts import open_shard
from pipelines.data.shards import derive_uid

BAD = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"ok"]).buffers())  # declared UTF-8, as some writers do
UNUSUAL = {
    "nanoseconds": pa.array([1, 2**62], pa.timestamp("ns")),
    "no such time zone": pa.array([1, 2], pa.timestamp("us", "Mars/Olympus")),
    "year 275000": pa.array([1, 10**8], pa.date32()),
    "duration": pa.array([1, 2**62], pa.duration("s")),
    "decimal": pa.array([decimal.Decimal(10) ** 50, None], pa.decimal256(76, 2)),
    "unsigned": pa.array([2**64 - 1, 3], pa.uint64()),
    "half": pa.array(np.array([0.5, np.nan], np.float16)),
    "dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), BAD),
    "list": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), BAD),
    "list of lists": pa.array([[["a"]], [[None]]]),
    "fixed list": pa.array([["a", "b"], None], pa.list_(pa.string(), 2)),
    "struct": pa.StructArray.from_arrays([BAD], ["en"]),
    "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int32())),
    "view": pa.array(["a", None], pa.string_view()),
    "binary view": pa.array([b"\xff", None], pa.binary_view()),
    "fixed binary": pa.array([b"\xff\0", b"ab"], pa.binary(2)),
    "UUID": pa.array([uuid.UUID(int=1).bytes, None], pa.uuid()),
    "JSON": pa.array(['{"a": 1}', None], pa.json_()),
    "boolean": pa.array([True, None]),
    "date": pa.array([datetime.date(2020, 1, 1), None]),
    "null": pa.nulls(2),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_a_column_of_any_type_is_text_and_changes_no_other(kind, tmp_path):
    table = pa.table({"url": ["u", "v"], "caption": ["a cat", "a dog"], "jpg": [b"1", b"2"], "odd": UNUSUAL[kind]})
    pq.write_table(table, tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    shard = open_shard(path)
    assert shard.uids(0) == [derive_uid("u", "a cat"), derive_uid("v", "a dog")]
    assert len(shard.strings(0, "odd")) == 2
    "".join(shard.strings(0, "odd")).encode()  # it is UTF-8
    assert any(shard.strings(0, "odd")) or kind in ("null", "no such time zone")
    named = open_shard(path, {"url": "odd"})
    assert len(set(named.uids(0))) == 2
    with contextlib.suppress(ValueError):  # two values that are no numbers are all of this column
        assert len(named.numbers(0, "odd")) == 2


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"ab", None, b"c"], pa.large_binary()),
        pa.array([b"ab", None, b"c"], pa.binary_view()),
        pa.array([list(b"ab"), None, list(b"c")], pa.list_(pa.uint8())),
        pa.array([{"bytes": b"ab", "path": "x"}, {"bytes": None, "path": "y"}, {"bytes": b"c", "path": None}]),
    ],
    ids=lambda column: str(column.type)[:12],
)
def test_pictures_are_bytes_in_any_form(column, tmp_path):
    pq.write_table(pa.table({"image": column, "url": list("abc"), "text": list("abc")}), tmp_path / "a.parquet")
    assert open_shard(str(tmp_path / "a.parquet")).images(0).to_pylist() == [b"ab", None, b"c"]


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([{"data": b"1"}] * 2), pa.array([["a"], []])])
def test_a_column_that_holds_no_pictures_is_refused_at_once(column, tmp_path):
    pq.write_table(pa.table({"image": column, "url": ["a", "b"], "text": ["a", "b"]}), tmp_path / "a.parquet")
    shard, tries = open_shard(str(tmp_path / "a.parquet")), []

    @storage.retried
    def read() -> None:
        tries.append(1)
        shard.images(0)

    with pytest.raises(ValueError, match=r"a\.parquet: column image holds .*, and pictures are bytes"):
        read()
    assert len(tries) == 1


@pytest.mark.parametrize(
    "error",
    [pa.ArrowNotImplementedError("x"), pa.ArrowInvalid("x"), RecursionError(), OverflowError(), IsADirectoryError("x")],
    ids=lambda error: type(error).__name__,
)
def test_what_no_retry_can_help_is_tried_once(error):
    tries = []

    @storage.retried
    def fail() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        fail()
    assert len(tries) == 1


def test_rows_without_a_url_are_named_by_their_id_or_their_picture(tmp_path):
    columns = {
        "url": ["u", None, "", None, None],
        "id": [1, 2, None, None, None],
        "jpg": [b"0", b"1", b"2", b"3", None],
    }
    pq.write_table(pa.table(columns | {"caption": ["cat"] * 5}), tmp_path / "a.parquet")
    names: list[str | bytes] = ["u", "2", b"2", b"3", b""]
    assert open_shard(str(tmp_path / "a.parquet")).uids(0) == [derive_uid(name, "cat") for name in names]
    pq.write_table(pa.table({"url": [None, "v"], "caption": ["a", "b"]}), tmp_path / "b.parquet")  # metadata alone
    assert open_shard(str(tmp_path / "b.parquet")).uids(0) == [derive_uid("", "a"), derive_uid("v", "b")]


@pytest.fixture
def large(tmp_path, monkeypatch) -> tuple[str, list[bytes | None]]:
    """Two row groups, which are read in order, some rows at a time."""
    monkeypatch.setattr(parquet, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 4000)
    random = np.random.default_rng(0)
    images = [None if i % 7 == 3 else random.bytes(int(random.integers(1, 200))) for i in range(300)]
    column = pa.array([{"bytes": image, "path": None} for image in images])
    pq.write_table(pa.table({"image": column, "text": ["cat"] * 300}), tmp_path / "a.parquet", row_group_size=200)
    return str(tmp_path / "a.parquet"), images


def test_rows_of_a_large_row_group_are_those_of_a_small_one(large):
    path, images = large
    shard = open_shard(path)
    assert shard.images(0).to_pylist() + shard.images(1).to_pylist() == images
    for rows in ([0], [199], [5, 6, 190], [190, 3, 3, 77], list(range(50, 60)), [60], [61], [0], []):
        got = shard.images(0, np.array(rows, dtype=np.int64)).to_pylist()
        assert got == [images[i] for i in rows]
    assert len(set(shard.uids(0))) == 200 - 28  # pictures are missing


def test_a_large_row_group_is_read_once_in_order_and_again_after_an_error(large, monkeypatch):
    path, images = large
    shard, opened, fails = open_shard(path), [], [False]
    original = pq.ParquetFile.iter_batches

    def counted(self, *args, **options):
        opened.append(1)
        for batch in original(self, *args, **options):
            if fails[0]:
                fails[0] = False
                raise ConnectionError("the storage hung up")
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr(storage, "_BACKOFF", lambda state: 0)
    read = storage.retried(shard.images)
    for start in range(0, 200, 25):
        fails[0] |= start == 100
        assert read(0, np.arange(start, start + 25)).to_pylist() == images[start : start + 25]
    assert len(opened) == 2


MEASURE = """
import resource, sys, numpy as np
from pipelines.data.layouts import open_shard
shard = open_shard(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 >> (10 if sys.platform == "darwin" else 0)
before, n = peak(), shard.row_group_sizes[0]
rows = [0, 1, n // 2, n - 1]
starts = [image[:4] for image in shard.images(0, np.array(rows)).to_pylist()]
assert starts == [(i % 50).to_bytes(4, "big") for i in rows]
for start in range(0, n, 20):
    assert len(shard.images(0, np.arange(start, min(n, start + 20)))) == min(n, start + 20) - start
print((peak() - before) >> 20)
"""


@pytest.mark.long
def test_memory_does_not_follow_the_row_group(tmp_path: Path):
    """2.3 GB of pictures in one row group of a struct, which Arrow reads into no array: it was called damaged."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    filling = np.random.default_rng(0).bytes(1 << 20)
    images = pa.array([{"bytes": i.to_bytes(4, "big") + filling, "path": None} for i in range(50)], kind)
    table = pa.table({"image": pa.chunked_array([images] * 46), "text": ["cat"] * 2300})  # 50 MiB in memory
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2300, compression="none", use_dictionary=False)
    assert pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).num_rows == 2300
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a.parquet")]
    out = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 2300 / 3, f"{out.stdout} MiB for 20 pictures of 1 MiB at a time, in pages of 50 MiB"
