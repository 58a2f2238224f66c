"""Shards that are webdataset tars: the picture of a sample is a range of bytes, by the tar's index (tar_index.py)."""

import json
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..base import storage
from .shards import ALIASES, WHOLE_BYTES, Shard, clean
from .tar_index import HEADER, NAMES, fields, index_of


class TarShard(Shard):
    """One tar; its columns are the keys of its .json members, `txt` and `key`, all of them text.

    index: the path of its index; without one, the tar is indexed now, in memory: of its first n_members, if given.
    """

    def __init__(self, path: str, columns: Mapping[str, str], index: str | None, n_members: int | None = None) -> None:
        super().__init__(path, columns)
        self.file = None if index is None else storage.open_parquet(index)
        if self.file is None:
            self.samples, sizes = index_of(path, n_members)
        else:
            self.samples = self.file.schema_arrow.empty_table()
            sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.fields: list[str] = json.loads(self.samples.schema.metadata[NAMES])
        self.names = {"key", "txt", "image", *self.fields}
        self.row_group_sizes = [n for n in sizes if n]
        self._start, self._data = 0, memoryview(b"")  # the bytes that were last read, and their place in the tar

    def _index(self, row_group: int, columns: list[str]) -> pa.Table:
        """The index of a row group."""
        if self.file is not None:
            return self.file.read_row_group(row_group, columns=columns)
        start = sum(self.row_group_sizes[:row_group])
        return self.samples.select(columns).slice(start, self.row_group_sizes[row_group])

    def table(self, row_group: int, columns: list[str]) -> pa.Table:
        """A value of a .json member as text, a list as its first text that is not empty: each by itself, so that an
        unusual value changes no other."""
        indexed = {"key": "key", "txt": "text"}  # the other columns are keys of the .json members
        wanted = sorted({indexed.get(name, "json") for name in columns})
        part = self._index(row_group, wanted)
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
        if "digest" not in self.samples.schema.names:  # of an earlier version
            return ids
        digests = self._index(row_group, ["digest"])["digest"].to_pylist()
        return [f"{name}\x1f{digest}" if digest else name for name, digest in zip(ids, digests, strict=True)]

    def images(self, row_group: int, rows: NDArray[np.int64] | None = None) -> pa.Array:
        """Read as one range of bytes, or several of WHOLE_BYTES where an earlier version made the row group larger.

        Raises ValueError where the tar is not the one that was indexed.
        """
        samples = self._index(row_group, ["member", "offset", "size"]).to_pylist()
        stop = max((s["offset"] + s["size"] for s in samples if s["member"] is not None), default=0)
        picked = samples if rows is None else [samples[i] for i in rows]
        out: list[bytes | None] = [None] * len(picked)
        with_picture = (i for i, sample in enumerate(picked) if sample["member"] is not None)
        for i in sorted(with_picture, key=lambda i: picked[i]["offset"]):
            name, size = picked[i]["member"], HEADER + picked[i]["size"]
            member = self._bytes(picked[i]["offset"] - HEADER, size, stop)
            if len(member) < size or not _is_label(member[:100], name):
                raise ValueError(
                    f"{self.path} changed since it was indexed, {name!r} is not where it was: run `jest catalogue` into"
                    " a new directory"
                )
            out[i] = member[HEADER:]
        return pa.array(out, pa.large_binary())

    def _bytes(self, first: int, size: int, stop: int) -> bytes:
        """Bytes of the tar from `first`, which are read with those after them, but none after `stop`."""
        if not self._start <= first <= first + size <= self._start + len(self._data):
            fs, inner = storage.filesystem(self.path)
            end = max(first + size, min(first + WHOLE_BYTES, stop))
            self._start, self._data = first, memoryview(fs.cat_file(inner, start=first, end=end))
        return bytes(self._data[first - self._start : first - self._start + size])


def _is_label(label: bytes, name: bytes) -> bool:
    """Whether a header's field of 100 bytes can be of a member with this name; longer ones are elsewhere too.

    Old GNU tars end the field with a NUL, and so have but 99 bytes of a name of 100.
    """
    return len(name) > 100 or not name.isascii() or label.rstrip(b"\0")[:99] == name[:99]
