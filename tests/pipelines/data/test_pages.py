"""Large row groups of Parquet, of which some rows are read alone."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.base import storage
from pipelines.data import catalogue_parts, page_headers, pages
from pipelines.data.layouts import open_shard, write_index
from pipelines.data.places import Place

N, GROUP = 700, 500
WRITERS = {
    "pyarrow's defaults": {},
    "second version of pages": {"data_page_version": "2.0"},
    "no dictionary": {"use_dictionary": False, "compression": "zstd"},
    "pages smaller than a picture": {"data_page_size": 10, "write_batch_size": 1},
    "pages that end anywhere": {"use_dictionary": False, "data_page_size": 3000, "write_batch_size": 7},
    "checksums, no compression": {"compression": "none", "write_page_checksum": True},
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 64 rows."""
    monkeypatch.setattr(pages, "MANY_ROWS", 128)
    monkeypatch.setattr(pages, "GROUP_ROWS", 64)


def columns(struct: bool, n: int = N) -> dict[str, pa.Array]:
    random = np.random.default_rng(0)
    images = [None if i % 7 == 3 else random.bytes(int(random.integers(1, 200))) for i in range(n)]
    return {
        "image": pa.array([{"bytes": image, "path": "x"} for image in images] if struct else images),
        "text": pa.array([f"cat {i % 50}" if i % 3 else None for i in range(n)]),
        "url": pa.array([f"u{i}" for i in range(n)]),
        "tags": pa.array([["a"] * (i % 3) for i in range(n)]),
        "width": pa.array(np.arange(n)),
    }


@pytest.mark.parametrize("struct", [False, True], ids=["bytes", "struct"])
@pytest.mark.parametrize("writer", WRITERS)
def test_groups_have_the_rows_of_the_file(writer, struct, few, tmp_path):
    path, index, table = str(tmp_path / "a.parquet"), str(tmp_path / "index"), pa.table(columns(struct))
    pq.write_table(
        table, path, row_group_size=GROUP, **({"write_batch_size": 64, "data_page_size": 1} | WRITERS[writer])
    )
    assert write_index(path, {}, index)
    whole, shard = open_shard(path), open_shard(path, {}, index)
    groups = range(len(shard.row_group_sizes))
    assert sum(shard.row_group_sizes) == N
    assert 8 < len(groups) < 20
    assert max(shard.row_group_sizes) <= 64
    assert [i for g in groups for i in shard.images(g).to_pylist()] == [
        i for g in range(2) for i in whole.images(g).to_pylist()
    ]
    assert [u for g in groups for u in shard.uids(g)] == whole.uids(0) + whole.uids(1)
    for name in table.column_names[1:]:
        assert [v for g in groups for v in shard.table(g, [name])[name].to_pylist()] == table[name].to_pylist()
    last = len(groups) - 1
    assert shard.images(last, np.array([3, 0])).to_pylist() == [
        shard.images(last)[3].as_py(),
        shard.images(last)[0].as_py(),
    ]


def test_what_needs_no_index_or_can_have_none(few, tmp_path):
    path, index, whole = str(tmp_path / "a.parquet"), str(tmp_path / "index"), columns(False)
    lists = pa.array(
        [None if image is None else list(image) for image in whole["image"].to_pylist()], pa.list_(pa.uint8())
    )
    for images, size in ((whole["image"], 128), (lists, GROUP)):
        pq.write_table(pa.table(whole | {"image": images}), path, row_group_size=size)
        assert not write_index(path, {}, index)
    pq.write_table(pa.table(whole).drop_columns("image"), path)
    assert not write_index(path, {}, index)
    assert not storage.exists(index)


def test_an_index_of_another_file_is_refused_and_a_damaged_page_named(few, tmp_path):
    path, index = str(tmp_path / "a.parquet"), str(tmp_path / "index")
    options = {
        "compression": "none",
        "write_page_checksum": True,
        "write_batch_size": 64,
        "data_page_size": 1,
        "use_dictionary": False,
    }
    pq.write_table(pa.table(columns(False)), path, **options)
    write_index(path, {}, index)
    data = bytearray(storage.read_bytes(path))
    picture = columns(False)["image"][200].as_py()
    data[data.index(picture)] ^= 1
    storage.write_bytes(path, bytes(data))
    shard = open_shard(path, {}, index)
    shard.images(0)
    with pytest.raises(ValueError, match=r"a\.parquet, row group 0, is damaged"):
        [shard.images(g) for g in range(len(shard.row_group_sizes))]
    pq.write_table(pa.table(columns(False, 600)), path, **options)
    with pytest.raises(ValueError, match=r"a\.parquet changed since it was catalogued"):
        open_shard(path, {}, index)


@pytest.mark.parametrize("seed", range(40))
def test_headers_of_random_bytes_are_no_pages(seed):
    random = np.random.default_rng(seed)
    path = io.BytesIO()
    pq.write_table(pa.table(columns(False)), path)
    chunk, data = pq.ParquetFile(path).metadata.row_group(0).column(0), bytearray(path.getvalue())
    assert page_headers.pages_of(io.BytesIO(data), chunk, N)
    start = page_headers.chunk_start(chunk)
    for at in random.integers(start, start + 40, 3):
        data[at] = random.integers(256)
    found = page_headers.pages_of(io.BytesIO(data), chunk, N)  # ends, without an error
    assert not found or sum(page.n_rows for page in found) == N


class _Counted(io.BytesIO):
    n = 0

    def read(self, size: int | None = -1) -> bytes:
        out = super().read(size)
        self.n += len(out)
        return out


def test_a_window_reads_the_bytes_of_its_rows_wherever_they_are(few, tmp_path):
    """First, middle and last window of a row group of 122,880: bytes read, counted at the file."""
    n, path, index = 122_880, str(tmp_path / "a.parquet"), str(tmp_path / "index")
    random = np.random.default_rng(0).bytes(n + 100)
    table = pa.table({"jpg": [random[i : i + 100] for i in range(n)], "txt": [f"a cat {i}" for i in range(n)]})
    pq.write_table(
        table, path, row_group_size=n, compression="none", use_dictionary=False, write_batch_size=64, data_page_size=64
    )
    assert write_index(path, {}, index)
    shard = open_shard(path, {}, index)
    assert shard.row_group_sizes == [64] * (n // 64)
    for group in (0, n // 128, n // 64 - 1):
        source = _Counted(storage.read_bytes(path))
        shard = open_shard(path, {}, index)
        shard.pages.source = source
        assert shard.captions(group) == [f"a cat {64 * group + i}" for i in range(64)]
        assert shard.images(group).to_pylist() == [random[i : i + 100] for i in range(64 * group, 64 * group + 64)]
        assert source.n < 1.3 * 64 * (100 + 4 + 16)


def test_a_catalogue_has_the_groups_and_one_that_refines_it_too(few, make_run, tmp_path):
    run, path = make_run("x", "data.rules=[]"), str(tmp_path / "a.parquet")
    pq.write_table(pa.table(columns(True)), path, row_group_size=GROUP, write_batch_size=64, data_page_size=1)
    place = Place(0, path, run.path("catalogue"), run.path("catalogue/index"))
    written = catalogue_parts._write_shard({"place": place, "done": False}, run, {}, None)
    described = json.loads(written["description"])
    assert described["is_paged"]
    assert max(described["group_rows"]) <= 64
    paged = replace(place, is_paged=True)
    shard = paged.open({})
    assert [uid for g in range(len(shard.row_group_sizes)) for uid in paged.aligned(shard, g)[0]] == [
        uid for g in range(2) for uid in open_shard(path).uids(g)
    ]
    refined = replace(paged, directory=run.path("refined"))
    again = catalogue_parts._write_shard({"place": refined, "done": False}, run, {}, place.directory)
    assert json.loads(again["description"])["group_rows"] == described["group_rows"]
    before = replace(place, directory=run.path("before"))  # of an earlier version, of which a part is made again
    whole = catalogue_parts._write_shard({"place": before, "done": False}, run, {}, None, whole=True)
    assert json.loads(whole["description"])["group_rows"] == [GROUP, N - GROUP]
