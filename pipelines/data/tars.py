"""Shards that are webdataset tars: the picture of a sample is a range of bytes, by the tar's index (tar_index.py)."""

import json
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from ..base import storage
from .shards import ALIASES, Shard, clean
from .tar_index import HEADER, NAMES, fields, index_of


class TarShard(Shard):
    """One tar; its columns are the keys of its .json members, `txt` and `key`, all of them text.

    index: the path of its index; without one, the tar is indexed now, in memory: of its first n_members, if given.
    """

    def __init__(self, path: str, columns: Mapping[str, str], index: str | None, n_members: int | None = None) -> None:
        super().__init__(path, columns)
        if index is None:
            opened = pq.ParquetFile(pa.BufferReader(index_of(path, n_members)))
        else:
            opened = storage.open_parquet(index)
        self.index = opened
        self.fields: list[str] = json.loads(opened.schema_arrow.metadata[NAMES])
        self.names = {"key", "txt", "image", *self.fields}
        sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        self.row_group_sizes = [n for n in sizes if n]

    def table(self, row_group: int, columns: list[str]) -> pa.Table:
        """A value of a .json member as text, a list as its first text that is not empty: each by itself, so that an
        unusual value changes no other."""
        indexed = {"key": "key", "txt": "text"}  # the other columns are keys of the .json members
        wanted = sorted({indexed.get(name, "json") for name in columns})
        part = self.index.read_row_group(row_group, columns=wanted)
        samples = [fields(text) for text in part["json"].to_pylist()] if "json" in wanted else []
        return pa.table(
            {
                name: part[indexed[name]]
                if name in indexed
                else pa.array([clean(sample.get(name)) or None for sample in samples], pa.string())
                for name in columns
            }
        )

    def captions(self, row_group: int) -> list[str]:
        """The .txt of each sample, else the first text of its .json under a name of captions; with data.columns only
        the one that it names."""
        if "caption" in self.columns:
            return self.strings(row_group, "caption")
        texts = [clean(text) for text in self.table(row_group, ["txt"])["txt"].to_pylist()]
        for name in ALIASES["caption"]:
            if name in self.fields and not all(map(str.strip, texts)):
                others = self.table(row_group, [name])[name].to_pylist()
                texts = [text if text.strip() else other or text for text, other in zip(texts, others, strict=True)]
        return texts

    def ids(self, row_group: int) -> list[str]:
        """With the digest of the picture, where the index has one: keys may start again in each tar of a set."""
        ids = super().ids(row_group)
        if "digest" not in self.index.schema_arrow.names:  # of an earlier version
            return ids
        digests = self.index.read_row_group(row_group, columns=["digest"])["digest"].to_pylist()
        return [f"{name}\x1f{digest}" if digest else name for name, digest in zip(ids, digests, strict=True)]

    def images(self, row_group: int) -> pa.Array:
        """Read as one range of bytes. Raises ValueError where the tar is not the one that was indexed."""
        part = self.index.read_row_group(row_group, columns=["member", "offset", "size"]).to_pylist()
        pictures = [row for row in part if row["member"] is not None]
        if not pictures:
            return pa.nulls(len(part), pa.large_binary())
        start = min(row["offset"] for row in pictures) - HEADER
        stop = max(row["offset"] + row["size"] for row in pictures)
        fs, inner = storage.filesystem(self.path)
        data = memoryview(fs.cat_file(inner, start=start, end=stop))
        out: list[bytes | None] = []
        for row in part:
            if row["member"] is None:
                out.append(None)
                continue
            place, name = row["offset"] - start, row["member"]
            image = bytes(data[place : place + row["size"]])
            if len(image) < row["size"] or not _is_label(bytes(data[place - HEADER : place - HEADER + 100]), name):
                raise ValueError(
                    f"{self.path} changed since it was indexed, {name!r} is not where it was: run `jest catalogue` into"
                    " a new directory"
                )
            out.append(image)
        return pa.array(out, pa.large_binary())


def _is_label(label: bytes, name: bytes) -> bool:
    """Whether a header's field of 100 bytes can be of a member with this name; longer ones are elsewhere too.

    Old GNU tars end the field with a NUL, and so have but 99 bytes of a name of 100.
    """
    return len(name) > 100 or not name.isascii() or label.rstrip(b"\0")[:99] == name[:99]
