"""Metadata with columns of all types that Parquet has, and rows of all kinds -> lists that img2dataset can hold."""

import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jest_core import run_file
from pipelines.base import storage
from pipelines.data import url_lists
from pipelines.data.plain_columns import plain
from tests.conftest import RUN

UTC = pa.timestamp("ns", "Europe/Berlin")
DAY = datetime.date(2024, 2, 29)
NAN = float("nan")
# A column as Parquet holds it -> its values as JSON holds them; None where it is left out
COLUMNS = {
    "timestamp": (pa.array([1_500_000_000, None], UTC), ["1970-01-01 00:00:01.500000000", None]),
    "of nowhere": (pa.array([0, None], pa.timestamp("s", "Mars/Base")), ["1970-01-01 00:00:00.000", None]),
    "date": (pa.array([DAY, None]), ["2024-02-29", None]),
    "far date": (pa.array([10**9, 0], pa.date32()), ["<value out of range: 1000000000>", "1970-01-01"]),
    "time": (pa.array([1, None], pa.time64("us")), ["00:00:00.000001", None]),
    "decimal": (pa.array([decimal.Decimal("0.50"), None]), ["0.50", None]),
    "float": (pa.array([0.5, NAN]), [0.5, None]),
    "infinite": (pa.array([float("inf"), -float("inf")], pa.float32()), [None, None]),
    "half": (pa.array([0.5, None], pa.float16()), [0.5, None]),
    "large": (pa.array([2**64 - 1, None], pa.uint64()), [2**64 - 1, None]),
    "flag": (pa.array([True, None]), [True, None]),
    "nothing": (pa.nulls(2), [None, None]),
    "hash": (pa.array([b"\x00\xff", None], pa.binary(2)), ["00ff", None]),
    "uuid": (pa.array([b"\x01" * 16, None], pa.uuid()), ["01" * 16, None]),
    "binary": (pa.array([b"\xff", None]), None),
    "large binary": (pa.array([b"\xff", None], pa.large_binary()), None),
    "no UTF-8": (pa.array([b"\xed\xa0\x80a", None]).view(pa.string()), ["\ufffd\ufffd\ufffda", None]),
    "dictionary": (pa.array(["a", None]).dictionary_encode(), ["a", None]),
    "dates": (pa.array([DAY, None]).dictionary_encode(), ["2024-02-29", None]),
    "boxes": (pa.array([[[0.1, 0.9]], []]), [[[0.1, 0.9]], []]),
    "texts": (pa.array([["a", None], None]), [["a", None], None]),
    "list of dates": (pa.array([[DAY], None]), ['["2024-02-29"]', None]),
    "list of structs": (pa.array([[{"x": NAN, "day": DAY}], []]), ['[{"x": null, "day": "2024-02-29"}]', "[]"]),
    "struct": (pa.array([{"x": b"\xff", "y": True}, None]), ['{"x": "\\ufffd", "y": true}', None]),
    "map": (pa.array([[("k", DAY)], None], pa.map_(pa.string(), pa.date32())), ['[["k", "2024-02-29"]]', None]),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_is_carried_as_json_holds_it(tmp_path: Path, name: str):
    column, expected = COLUMNS[name]
    pq.write_table(pa.table({"x": column, "beside": [1, 2]}), tmp_path / "a.parquet")
    carried = plain(pq.read_table(tmp_path / "a.parquet")).to_pydict()
    json.dumps(carried, allow_nan=False)
    assert carried.pop("beside") == [1, 2]
    assert carried == ({} if expected is None else {"x": expected})


def listed(folder: Path, table: pa.Table, *settings: str) -> tuple[pa.Table, dict[str, int], set[str]]:
    """The first list of a file of metadata, its audit, and which columns are left out."""
    pq.write_table(table, folder / "m.parquet")
    part = f"ingest={{urls: m.parquet, shards: fetched{''.join(f', {each}' for each in settings)}}}"
    run = run_file.load(RUN.format(root=folder, name="x", shards="fetched"), [part])
    written = url_lists.write_file(
        run_file.dump(run), str(folder / "m.parquet"), str(folder / "fetched/urls/00000"), {}
    )
    names = url_lists.names(str(folder / "fetched"))
    audit = url_lists.read_audit(str(folder / "fetched"))
    return storage.open_parquet(f"{folder}/fetched/urls/{names[0]}").read() if names else None, audit, written.left_out


def test_one_odd_column_takes_nothing_with_it(tmp_path: Path):
    others = {name: column for name, (column, _) in COLUMNS.items()}
    table = pa.table({"URL": ["http://x/1", "http://x/2"], "TEXT": ["a", "b"], **others})
    rows, audit, left_out = listed(tmp_path, table)
    assert left_out == {"binary", "large binary"}
    assert audit == {"kept": 2, "url": 0}
    assert set(rows.column_names) == {"uid", "url", "caption"} | set(others) - left_out
    assert rows["caption"].to_pylist() == ["a", "b"]


def test_urls_and_captions_of_all_kinds(tmp_path: Path):
    urls = ["http://x/1", " HTTPS://x/2 ", None, "", "ftp://x/3", "file:///etc/hostname", "data:image/png,AA", "//x"]
    captions = ["c" * 300_000, b"\xed\xa0\x80", None, "", "d", "e", "f", "g"]
    texts = pa.array([c.encode() if isinstance(c, str) else c for c in captions]).view(pa.string())
    rows, audit, _ = listed(tmp_path, pa.table({"url": urls, "caption": texts}))
    assert rows["url"].to_pylist() == ["http://x/1", "HTTPS://x/2"]
    assert rows["caption"].to_pylist() == ["c" * 300_000, "\ufffd" * 3]
    assert audit == {"kept": 2, "url": 6}
    assert listed(tmp_path, pa.table({"url": pa.array([], pa.string()), "text": pa.array([], pa.string())}))[1] == {
        "kept": 0,
        "url": 0,
    }


def test_hashes_and_boxes_are_in_a_form_that_img2dataset_compares(tmp_path: Path):
    table = pa.table({"url": ["http://x"], "text": ["a"], "sha256": pa.array([b"\xab" * 32], pa.binary(32))})
    rows, *_ = listed(tmp_path, table, "verify_hash: true")
    assert rows["sha256"].to_pylist() == ["ab" * 32]
    rows, *_ = listed(tmp_path, table.set_column(2, "sha256", [["AB" * 32]]), "verify_hash: true")
    assert rows["sha256"].to_pylist() == ["ab" * 32]
    for boxes in ("[[0, 0, 1, 1]]", [{"left": 0.0}], b"\x00"):
        with pytest.raises(
            ValueError, match=r"column boxes: (string|binary) where lists .* correct ingest\.blur_boxes"
        ):
            listed(tmp_path, table.append_column("boxes", [[boxes]]), "blur_boxes: boxes")


def test_two_columns_of_one_name(tmp_path: Path):
    columns = [pa.array(["http://x"]), pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    rows, *_ = listed(tmp_path, pa.Table.from_arrays(columns, names=["url", "text", "note", "note"]))
    assert rows["note"].to_pylist() == ["b"]
    with pytest.raises(ValueError, match=r"m\.parquet has 2 columns url, for url: leave one of them"):
        listed(tmp_path, pa.Table.from_arrays(columns, names=["url", "text", "url", "note"]))


def test_columns_that_differ_between_files_become_text():
    tables = [pa.table({"x": [1, None], "y": [1, 2], "z": ["a", "b"]}), pa.table({"x": ["one"], "y": [0.5]})]
    assert url_lists._joined(tables).to_pylist() == [
        {"x": "1", "y": "1", "z": "a"},
        {"x": None, "y": "2", "z": "b"},
        {"x": "one", "y": "0.5", "z": None},
    ]
    assert url_lists._joined([table.select(["y"]) for table in tables])["y"].to_pylist() == [1.0, 2.0, 0.5]
