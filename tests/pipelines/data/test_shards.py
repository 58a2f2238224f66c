"""All layouts give the same examples, from disk and from S3, whichever tool wrote them."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.base import shard_paths, storage
from pipelines.data import catalogue, tar_index
from pipelines.data.layouts import open_shard
from pipelines.data.shards import clean
from pipelines.stream import super_batches
from pipelines.stream.source import open_source
from tests import layouts

# layout -> the value of data.shards, relative to its folder
LAYOUTS = {
    "img2dataset-parquet": "*.parquet",
    "img2dataset-tars": "{00000..00001}.tar",
    "webdataset": "",
    "hugging-face": "train-*.parquet",
    "webli": "webli.parquet",
    "datacomp": "",
}


@pytest.fixture(scope="module")
def pairs() -> list[layouts.Pair]:
    return layouts.make_pairs()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pairs) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    with ThreadPoolExecutor() as pool:  # img2dataset mostly waits
        parquet = pool.submit(layouts.img2dataset, root / "parquet", pairs, "parquet")
        tars = pool.submit(layouts.img2dataset, root / "tars", pairs, "webdataset")
    return {
        "img2dataset-parquet": parquet.result(),
        "img2dataset-tars": tars.result(),
        "webdataset": layouts.webdataset_tar(root / "webdataset", pairs),
        "hugging-face": layouts.hugging_face(root / "hugging-face", pairs),
        "webli": layouts.webli(root / "webli", pairs),
        "datacomp": layouts.datacomp(root / "datacomp", pairs, tars.result()),
    }


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_give_the_same_examples(layout, where, folders, pairs, make_run, s3, tmp_path):
    folder, root = str(folders[layout]), str(tmp_path)
    if where == "s3":
        folder, root = f"{s3}/{layout}/data", f"{s3}/{layout}"
        fs, inner = storage.filesystem(folder)
        fs.put(f"{folders[layout]}/", inner, recursive=True)
    run = make_run(
        "uniform",
        "selection.method=uniform",
        "training.sub_batch_size=8",
        f"training.examples_trained={layouts.N_PAIRS}",
        "data.rules=[{rule: status}]" if layout == "img2dataset-parquet" else "data.rules=[]",
        f"data.shards={folder}/{LAYOUTS[layout]}",
        "data.n_streams=1",
        root=root,
    )
    kept = catalogue.run_stage(run).manifest["counts"]
    assert kept["kept"] == layouts.N_PAIRS
    got = {}
    for batch in super_batches.stream(run, open_source(run), 32, rank=0, n_learners=1, first_step=0):
        assert batch.valid.all()
        for row in batch.rows.to_pylist():
            got[f"{row['uid_high']:016x}{row['uid_low']:016x}"] = (row["caption"], row["image"])
    assert {uid: caption for uid, (caption, _) in got.items()} == {pair.uid: pair.caption for pair in pairs}
    for pair in pairs:
        data = got[pair.uid][1]
        if pair.suffix == "jpg" or layout in ("webdataset", "hugging-face", "webli"):
            assert data == pair.image
        else:  # img2dataset converts all pictures to JPEG
            assert data[:3] == b"\xff\xd8\xff"
            distances = {other.uid: np.abs(pixels(data) - pixels(other.image)).mean() for other in pairs}
            assert min(distances, key=distances.__getitem__) == pair.uid


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


@pytest.mark.usefixtures("ray_session")  # not for itself: img2dataset has fetched the folders for the test above
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "datacomp"])
def test_metadata_is_available_under_the_names_that_rules_use(layout, folders, pairs):
    by_uid = {pair.uid: pair.metadata for pair in pairs}
    for path in shard_paths.expand([f"{folders[layout]}/{LAYOUTS[layout]}".rstrip("/")], ""):
        shard = open_shard(path)
        for group in range(len(shard.row_group_sizes)):
            rows = [i for i, uid in enumerate(shard.uids(group)) if uid in by_uid]
            expected = [by_uid[shard.uids(group)[i]] for i in rows]
            for name, column in (("unsafe", "punsafe"), ("similarity", "similarity"), ("width", "original_width")):
                values = [e[column] for e in expected]
                np.testing.assert_allclose(shard.numbers(group, name)[rows], values, rtol=1e-6)
            assert [shard.strings(group, "nsfw")[i] for i in rows] == [e["NSFW"] for e in expected]


@pytest.mark.usefixtures("ray_session")
def test_a_catalogue_of_datacomps_metadata_selects_from_its_shards(folders, pairs, make_run):
    """A catalogue of metadata/*.parquet is a subset of shards/*.tar, by uid."""
    rule = "data.rules=[{rule: similarity, at_least: 0.4}]"
    metadata = f"data.shards={folders['datacomp']}/metadata/*.parquet"
    catalogue.run_stage(make_run("m", rule, metadata, "data.catalogue=chosen"))
    rule = "data.rules=[{rule: subset, file: chosen}]"
    run = make_run("s", rule, f"data.shards={folders['datacomp']}")
    chosen = catalogue.run_stage(run)
    names = storage.names(f"{chosen.directory}/parts")
    parts = pa.concat_tables([storage.open_parquet(f"{chosen.directory}/parts/{n}").read() for n in names])
    kept = {u for u, m in zip(parts["uid"].to_pylist(), parts["multiplicity"].to_pylist(), strict=True) if m}
    assert kept == {pair.uid for pair in pairs if pair.metadata["similarity"] >= np.float32(0.4)}


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.float64(), pa.string()])
def test_types_that_drift_between_parts_are_read_alike(kind, tmp_path):
    """LAION's WIDTH is int32 in some parts and float64 in others; some mirrors have strings."""
    table = pa.table({"URL": ["a", "b"], "TEXT": ["x", "y"], "WIDTH": pa.array([640, None], pa.int32()).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    width = open_shard(str(tmp_path / "a.parquet")).numbers(0, "width")
    assert width[0] == 640
    assert np.isnan(width[1])


def test_captions_with_nul_or_invalid_utf8_are_cleaned(tmp_path):
    texts = [b"caf\xe9 \x00noir", b"plain", None, b"\xff\xfe"]
    kinds = {"binary": pa.binary(), "string": pa.string()}
    for name, kind in kinds.items():
        column = pa.array(texts, pa.binary()).cast(kind, safe=False) if kind != pa.string() else as_string(texts)
        pq.write_table(pa.table({"url": list("abcd"), "caption": column}), tmp_path / f"{name}.parquet")
        shard = open_shard(str(tmp_path / f"{name}.parquet"))
        assert shard.captions(0) == ["caf\ufffd noir", "plain", "", "\ufffd\ufffd"]
        assert len(set(shard.uids(0))) == 4


def as_string(texts: list[bytes | None]) -> pa.Array:
    """An array that is declared UTF-8 and is not, as some writers produce."""
    binary = pa.array(texts, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(binary), binary.buffers())


def test_clean_returns_the_first_text_that_is_not_blank():
    assert clean(["", "  ", None, "a cat", "b"]) == "a cat"
    assert clean([]) == clean(None) == ""
    assert clean(0) == "0"


def tar_of(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_hostile_tar_member_names_are_only_labels(tmp_path, pairs):
    """Nothing is written, no path is followed, and links and devices are not read as samples."""
    inside = tmp_path / "inside"
    inside.mkdir()
    names = ["../../evil", "/etc/passwd", "C:\\evil", "a\x00b", "dir/./x", "c\udcff", "-rf", "x" * 300]
    members = [(f"{name}.jpg", pairs[0].image) for name in names] + [
        ("no-suffix", b"x"),
        (".hidden", b"x"),
        ("d/", b""),
    ]
    path = tar_of(inside / "a.tar", members)
    before = sorted(tmp_path.rglob("*"))
    shard = open_shard(path)
    images = shard.images(0).to_pylist()
    assert images.count(pairs[0].image) >= len(names) - 2  # tar ends names at NUL, and normalises `x/.`
    assert sorted(tmp_path.rglob("*")) == before
    links = tar_of(inside / "b.tar", [("link.jpg", b"")], tarfile.SYMTYPE)
    assert open_shard(links).row_group_sizes == []


def test_incomplete_tar_samples_stay_rows(tmp_path, pairs):
    members = [
        ("a.jpg", pairs[0].image), ("a.txt", b"first"),
        ("b.txt", b"no picture"),
        ("c.png", pairs[1].image),
        ("d.jpg", pairs[0].image), ("d.json", b'{"caption": "of json", "uid": null}'),
        ("e.jpg", pairs[0].image), ("e.json", b"{broken"), ("e.txt", b"e"),
        ("f.jpg", pairs[0].image), ("f.txt", b"x" * (2 << 20)),
        ("f.jpg", pairs[1].image), ("f.txt", b"again"),
        ("g.seg.png", pairs[0].image), ("g.jpg", pairs[1].image),
    ]  # fmt: skip
    shard = open_shard(tar_of(tmp_path / "a.tar", members))
    assert shard.captions(0) == ["first", "no picture", "", "of json", "e", "x" * (1 << 20), "again", ""]
    expected = [0, None, 1, 0, 0, 0, 1, 1]
    assert shard.images(0).to_pylist() == [None if i is None else pairs[i].image for i in expected]
    assert len(set(shard.uids(0))) == 8


def test_large_tars_have_several_row_groups_and_only_requested_ranges_are_read(tmp_path, pairs, monkeypatch):
    monkeypatch.setattr(tar_index, "GROUP_ROWS", 10)
    members = [(f"{i:04d}.{end}", data) for i in range(25) for end, data in (("jpg", pairs[i].image), ("txt", b"t"))]
    path = tar_of(tmp_path / "a.tar", members)
    index = str(tmp_path / "index.parquet")
    tar_index.write_index(path, index)
    shard = open_shard(path, {}, index)
    assert shard.row_group_sizes == [10, 10, 5]
    data = bytearray(Path(path).read_bytes())
    third = next(i for i in range(0, len(data), 512) if data[i : i + 8] == b"0020.jpg")
    data[:third] = bytes(third)
    Path(path).write_bytes(data)
    assert shard.images(2).to_pylist() == [pair.image for pair in pairs[20:25]]  # bytes before it are not read
    with pytest.raises(ValueError, match="changed since it was indexed"):
        shard.images(0)


@pytest.mark.parametrize("cut", [100, 512, 3000, -1024, -10240])
def test_a_truncated_tar_is_an_error(cut, tmp_path, pairs):
    path = Path(tar_of(tmp_path / "a.tar", [(f"{i}.jpg", pair.image) for i, pair in enumerate(pairs[:5])]))
    data = path.read_bytes()
    end = data.rstrip(b"\0")
    path.write_bytes(data[:cut] if cut > 0 else end[:cut])
    with pytest.raises(ValueError, match=r"a\.tar is no tar, or is cut off or damaged"):
        open_shard(str(path))


def test_an_unreadable_tar_header_is_not_mistaken_for_the_end(tmp_path, pairs):
    path = Path(tar_of(tmp_path / "a.tar", [(f"{i}.jpg", pair.image) for i, pair in enumerate(pairs[:5])]))
    data = bytearray(path.read_bytes())
    place = next(i for i in range(0, len(data), 512) if data[i : i + 5] == b"2.jpg")
    data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="unreadable header or data after the end, at byte"):
        open_shard(str(path))


def test_a_json_value_of_another_type_changes_no_other(tmp_path, pairs):
    fields = [{"a": 1, "n": 3}, {"a": "x", "n": None}, {"n": 2.5}]
    members = [
        (f"{i}.{end}", data)
        for i, f in enumerate(fields)
        for end, data in (("jpg", pairs[i].image), ("json", json.dumps(f).encode()))
    ]
    shard = open_shard(tar_of(tmp_path / "a.tar", members))
    assert shard.strings(0, "a") == ["1", "x", ""]
    np.testing.assert_array_equal(shard.numbers(0, "n"), [3, np.nan, 2.5])


def test_only_requested_columns_are_read_from_storage(s3, tmp_path, pairs):
    """A rule on captions costs the captions' bytes, not the pictures'."""
    from s3fs import S3FileSystem

    images = [np.random.default_rng(i).bytes(100_000) for i in range(40)]
    table = pa.table({"url": [str(i) for i in range(40)], "caption": ["a cat"] * 40, "jpg": images})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=10)
    storage.write_bytes(f"{s3}/columns/a.parquet", sink.getvalue())
    read = 0
    original = S3FileSystem._cat_file

    async def counted(self, path, version_id=None, start=None, end=None, **options):
        nonlocal read
        data = await original(self, path, version_id=version_id, start=start, end=end, **options)
        read += len(data)
        return data

    import s3fs.core

    fetch = s3fs.core._fetch_range

    def counted_range(*arguments, **options):
        nonlocal read
        data = fetch(*arguments, **options)
        read += len(data)
        return data

    S3FileSystem._cat_file, s3fs.core._fetch_range = counted, counted_range
    try:
        shard = open_shard(f"{s3}/columns/a.parquet")
        assert sum(len(shard.uids(group)) for group in range(4)) == 40
        assert 0 < read < 100_000
        shard.images(2)
        assert 1_000_000 <= read < 1_200_000
    finally:
        S3FileSystem._cat_file, s3fs.core._fetch_range = original, fetch
