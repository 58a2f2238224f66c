"""Parquet and tars that others wrote: rows, or an error that names the file; no row is lost without a word."""

import datetime
import decimal
import io
import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.random import Generator

from pipelines.data.layouts import open_shard
from pipelines.data.tar_index import write_index
from tests import layouts
from tests.fuzz.harness import fuzz, mutated, one_of, read_or_refused, same_or_refused
from tests.layouts import Pair

Row = tuple[str, str, bytes | None]  # uid, caption, image


def rows_of(path: Path, index: str | None = None) -> list[Row]:
    shard = open_shard(str(path), index=index)
    rows: list[Row] = []
    for group in range(len(shard.row_group_sizes)):
        columns = shard.uids(group), shard.captions(group), shard.images(group).to_pylist()
        rows += zip(*columns, strict=True)
        for name in ("unsafe", "similarity"):
            if shard.actual(name):
                assert len(shard.numbers(group, name)) == len(columns[0])
        if shard.actual("nsfw"):
            assert len(shard.strings(group, "nsfw")) == len(columns[0])
    assert len(rows) == sum(shard.row_group_sizes)
    return rows


@cache
def pairs() -> list[Pair]:
    return [Pair(p.uid, p.caption, p.image[:600], p.suffix, p.metadata) for p in layouts.make_pairs()[:12]]


def rows() -> list[Row]:
    return [(pair.uid, pair.caption, pair.image) for pair in pairs()]


# -- Parquet --


@pytest.fixture(scope="module")
def parquets(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("parquet")
    files = [layouts.hugging_face(folder / "a", pairs()), layouts.webli(folder / "b", pairs())]
    out = [next(file.iterdir()).read_bytes() for file in files]
    for options in ({"compression": "zstd", "row_group_size": 5}, {"data_page_version": "2.0"}):
        sink = io.BytesIO()
        pq.write_table(table_of({}), sink, **options)
        out.append(sink.getvalue())
    return out


def table_of(more: dict[str, Any]) -> pa.Table:
    uids, captions, images = zip(*rows(), strict=True)
    return pa.table({"uid": uids, "caption": captions, "image": images} | more)


def fuzz_files(target: str, n_cases: int, whole: list[bytes], path: Path) -> None:
    """Mutations of whole shards are read, or refused with their path."""

    def check(data: bytes) -> None:
        path.write_bytes(data)
        read_or_refused(path, lambda: rows_of(path))

    fuzz(target, n_cases, lambda rng: mutated(one_of(whole, rng), rng, one_of(whole, rng)), check)


def test_parquet(parquets: list[bytes], tmp_path: Path):
    fuzz_files("parquet", 400, parquets, tmp_path / "shard.parquet")


def odd_values(rng: Generator, depth: int = 0) -> pa.Array:
    """A value for each row, all of one of the types that Parquet files have."""
    n = len(pairs())
    numbers, texts, times = rng.normal(size=n), ["é\0", ""] * (n // 2), [datetime.datetime(2026, 1, 1)] * n
    kinds: list[Any] = [
        pa.array(numbers.astype(one_of([np.float16, np.float32, np.int8, np.uint64, np.bool_], rng))),
        pa.array([decimal.Decimal("0.5")] * n, pa.decimal128(9, 4)),
        pa.array(times, one_of([pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.date32(), pa.date64()], rng)),
        pa.array([1] * n).cast(one_of([pa.duration("s"), pa.time64("us")], rng)),
        pa.array([rng.bytes(4) for _ in range(n)], one_of([pa.binary(), pa.large_binary(), pa.binary(4)], rng)),
        pa.array(texts, one_of([pa.string(), pa.large_string(), *[pa.string_view()] * (depth == 0)], rng)),
        pa.array(texts).dictionary_encode(),
        pa.nulls(n),
        pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64())),
    ]
    if depth < 2:
        inner = odd_values(rng, depth + 1)
        kinds += [pa.StructArray.from_arrays([inner], names=["a"]), pa.ListArray.from_arrays(np.arange(n + 1), inner)]
    return one_of(kinds, rng)


def test_parquet_columns_of_any_type(tmp_path: Path):
    """A column that is not needed changes nothing; one that is needed is read, or its error names the file."""
    path = tmp_path / "shard.parquet"
    needed = ["punsafe", "similarity", "NSFW"]

    def make(rng: Generator) -> tuple[bytes, str]:
        sink = io.BytesIO()
        name = one_of(["exif", "faces", "key", "url", "status", "width", "caption", "uid", *needed], rng)
        pq.write_table(table_of({name: odd_values(rng)}), sink)
        return sink.getvalue(), name

    def check(case: tuple[bytes, str]) -> None:
        path.write_bytes(case[0])
        found = read_or_refused(path, lambda: rows_of(path))
        if case[1] not in {"uid", "caption", *needed}:
            assert found == rows()
        assert found is None or [row[2] for row in found] == [row[2] for row in rows()]

    fuzz("columns", 200, make, check)


# -- tars --


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """As webdataset writes them, and as tarfile does, with names that are too long for a header."""
    out = [(layouts.webdataset_tar(tmp_path_factory.mktemp("tars") / "a", pairs()) / "00000.tar").read_bytes()]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        sink, folder = io.BytesIO(), "x" * (90 if form == tarfile.USTAR_FORMAT else 200)
        with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
            for i, pair in enumerate(pairs()):
                fields = {"uid": pair.uid, **pair.metadata}
                members = {pair.suffix: pair.image, "txt": pair.caption.encode(), "json": json.dumps(fields).encode()}
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{folder}/é{i:04d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        out.append(sink.getvalue())
    return out


def test_tars(tars: list[bytes], tmp_path: Path):
    fuzz_files("tars", 300, tars, tmp_path / "shard.tar")


def test_indices_of_tars(tars: list[bytes], tmp_path: Path):
    path, index = tmp_path / "shard.tar", tmp_path / "index.parquet"
    path.write_bytes(tars[0])
    write_index(str(path), str(index))
    same_or_refused("indices", index, lambda: rows_of(path, str(index)))


def test_one_member_of_a_tar_changes_one_row(tars: list[bytes], tmp_path: Path):
    """Whatever a member has in it, or is called, or is, the other samples are read as they are."""
    path = tmp_path / "shard.tar"

    def make(rng: Generator) -> tuple[bytes, int, bool]:
        data = bytearray(one_of(tars, rng))
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = [member for member in tar if member.size]
        number = int(rng.integers(len(members)))
        body, header = members[number].offset_data, members[number].offset_data - 512
        change = int(rng.integers(4))
        match change:
            case 0 | 1:
                size = members[number].size
                data[body : body + size] = mutated(bytes(data[body : body + size]), rng)[:size].ljust(size, b"\0")
            case 2:
                names = [rng.bytes(99), b"\xff.png", *b"a .jpg ../a.jpg /a.txt a.b.c.json 0000000003.jpg".split()]
                data[header : header + 100] = one_of(names, rng).ljust(100, b"\0")
            case 3:
                data[header + 156] = one_of(list(b"\0001234567ZA\xff"), rng)
        label = bytes(data[header : header + 148]) + b" " * 8 + bytes(data[header + 156 : header + 512])
        data[header + 148 : header + 156] = b"%06o\0 " % sum(label)
        return bytes(data), number // 3, change < 2 and members[number].name.endswith(("jpg", "png", "webp"))

    def check(case: tuple[bytes, int, bool]) -> None:
        path.write_bytes(case[0])
        found = read_or_refused(path, lambda: rows_of(path))
        others = [row for i, row in enumerate(rows()) if i != case[1]]
        assert found is not None or not case[2], "a picture does not decide whether a tar is read"
        assert found is None or [row for row in found if row in others] == others

    fuzz("member", 100, make, check)
