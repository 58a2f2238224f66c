"""Tars as webdataset, img2dataset and DataComp write them: indexed once, then read by ranges of bytes.

Nothing is unpacked. A sample is consecutive members whose names are the same up to the first dot of the last part:
`000010005.jpg`, `000010005.txt`, `000010005.json`. Names are labels only: no path that a tar names is ever opened.
"""

import io
import json
import re
import tarfile
from collections.abc import Mapping
from typing import Any, BinaryIO, Required, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from ..base import storage
from .shards import Shard, clean

INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("member", pa.binary()),  # the picture's name in the tar; null where the sample has no picture
        ("offset", pa.int64()),  # of the picture's first byte
        ("size", pa.int64()),
        ("text", pa.string()),  # the sample's .txt
        ("json", pa.string()),  # the sample's .json, unparsed
    ]
)
GROUP_ROWS = 1024  # samples of a virtual row group
_IMAGES = {"jpg", "jpeg", "png", "webp"}
_MAX_TEXT = 1 << 20  # bytes of a .txt or .json; a longer one is left out
_HEADER = 512
_CHUNK = 1 << 20
_NAMES = b"jest.columns"  # in the index's Parquet metadata: JSON list of the keys that the .json members have


class Sample(TypedDict, total=False):
    """A row of INDEX; what the sample lacks is absent. offset and size: of the picture, in bytes of the tar."""

    key: Required[str]
    member: bytes
    offset: int
    size: int
    text: str
    json: str


def write_index(path: str, index: str) -> None:
    """Make the index of a tar in one pass over its headers and texts. Raises ValueError where the tar is not whole."""
    storage.write_bytes(index, _index(path))


def _index(path: str) -> bytes:
    samples = scan(path)
    table = pa.Table.from_pylist(samples, schema=INDEX)
    names = sorted({name for sample in samples for name in _parse(sample.get("json"))})
    table = table.replace_schema_metadata({_NAMES: json.dumps(names).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=GROUP_ROWS, compression="zstd")
    return sink.getvalue()


def scan(path: str) -> list[Sample]:
    """The samples of a tar, as rows of INDEX."""
    fs, inner = storage.filesystem(path)
    samples: list[Sample] = []
    with fs.open(inner, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
                suffixes: set[str] = set()
                for member in tar:
                    suffixes = _add(samples, suffixes, tar, member)
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                _refuse_more(file, tar.offset)
        except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
            raise ValueError(f"{path} is no tar, or is cut off or damaged: {error}; replace it") from error
    return samples


def _add(samples: list[Sample], suffixes: set[str], tar: tarfile.TarFile, member: tarfile.TarInfo) -> set[str]:
    """Add a member to the last sample, or to a new one; returns the suffixes of the sample's members so far."""
    split = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", member.name, re.DOTALL)  # as webdataset splits it
    if not (split and member.isreg()) or member.issparse():
        return suffixes
    key, kind = clean(split[1].encode("utf-8", "surrogateescape")), split[2].lower()
    if not samples or samples[-1]["key"] != key or kind in suffixes:
        samples.append({"key": key})
        suffixes = set()
    sample = samples[-1]
    if kind in _IMAGES and "member" not in sample:
        name = member.name.encode("utf-8", "surrogateescape")
        sample.update({"member": name, "offset": member.offset_data, "size": member.size})
    elif kind in ("txt", "json") and member.size <= _MAX_TEXT:
        data = tar.extractfile(member)
        text = clean(data.read() if data else None)
        sample.update({"text": text} if kind == "txt" else {"json": text})
    return suffixes | {kind}


def _refuse_more(file: BinaryIO, end: int) -> None:
    """Raises ValueError unless only zeros follow: tarfile stops, without an error, at a header that it cannot read."""
    file.seek(end)
    block = file.read(_HEADER)
    if len(block) < _HEADER:
        raise ValueError(f"no end-of-archive mark at byte {end}")
    while block:
        if block.count(0) != len(block):
            raise ValueError(f"unreadable header or data after the end, at byte {end}")
        block = file.read(_CHUNK)


class TarShard(Shard):
    """One tar; its columns are the keys of its .json members, `txt` and `key`.

    index: the path of its index; without one, the tar is indexed now, in memory.
    """

    def __init__(self, path: str, columns: Mapping[str, str], index: str | None) -> None:
        self.path, self.columns = path, columns
        opened = pq.ParquetFile(pa.BufferReader(_index(path))) if index is None else storage.open_parquet(index)
        self.index = opened
        fields: list[str] = json.loads(opened.schema_arrow.metadata[_NAMES])
        self.names = {"key", "txt", "image", *fields}
        self.row_group_sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        if self.row_group_sizes == [0]:
            self.row_group_sizes = []

    def table(self, row_group: int, columns: list[str]) -> pa.Table:
        indexed = {"key": "key", "txt": "text"}  # the other columns are keys of the .json members
        wanted = sorted({indexed.get(name, "json") for name in columns})
        part = self.index.read_row_group(row_group, columns=wanted)
        fields = [_parse(text) for text in part["json"].to_pylist()] if "json" in wanted else []
        return pa.table(
            {
                name: part[indexed[name]] if name in indexed else _column([f.get(name) for f in fields])
                for name in columns
            }
        )

    def captions(self, row_group: int) -> list[str]:
        """The .txt of each sample, else the caption of its .json."""
        named = self.columns.get("caption") or next((n for n in ("caption", "text") if n in self.names), None)
        texts = [clean(value) for value in self.table(row_group, ["txt"])["txt"].to_pylist()]
        if "caption" not in self.columns and (all(texts) or named is None):
            return texts
        others = [clean(value) for value in self.table(row_group, [str(named)])[str(named)].to_pylist()]
        return others if "caption" in self.columns else [t or o for t, o in zip(texts, others, strict=True)]

    def images(self, row_group: int) -> pa.Array:
        """Read as one range of bytes. Raises ValueError where the tar is not the one that was indexed."""
        part = self.index.read_row_group(row_group, columns=["member", "offset", "size"]).to_pylist()
        pictures = [row for row in part if row["member"] is not None]
        if not pictures:
            return pa.nulls(len(part), pa.large_binary())
        start = min(row["offset"] for row in pictures) - _HEADER
        stop = max(row["offset"] + row["size"] for row in pictures)
        fs, inner = storage.filesystem(self.path)
        data = memoryview(fs.cat_file(inner, start=start, end=stop))
        out: list[bytes | None] = []
        for row in part:
            if row["member"] is None:
                out.append(None)
                continue
            place, name = row["offset"] - start, row["member"]
            label = bytes(data[place - _HEADER : place - _HEADER + 100]).rstrip(b"\0")
            image = bytes(data[place : place + row["size"]])
            if len(image) < row["size"] or (len(name) <= 100 and name.isascii() and label != name):
                raise ValueError(
                    f"{self.path} changed since it was indexed, {name!r} is not where it was: run `jest catalogue` into"
                    " a new directory"
                )
            out.append(image)
        return pa.array(out, pa.large_binary())


def _parse(text: str | None) -> dict[str, Any]:
    """The dictionary in a sample's .json, with whatever keys its makers chose; empty where it is not a dictionary."""
    try:
        fields = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return {clean(k): v for k, v in fields.items()} if isinstance(fields, dict) else {}


def _column(values: list[Any]) -> pa.Array:
    """JSON values as a column of one type: text where they differ in type."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeError):
        return pa.array([None if value is None else clean(json.dumps(value)) for value in values])
