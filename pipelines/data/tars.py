"""Shards that are webdataset tars: the picture of a sample is a range of bytes, by the tar's index (tar_index.py)."""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..base import storage
from .local_cache import CachedFile, LocalCache
from .shards import ALIASES, WHOLE_BYTES, Shard, clean
from .tar_index import HEADER, NAMES, fields, index_of

_GAP = 1 << 20  # bytes between two pictures that are read with them: another request takes longer


class TarShard(Shard):
    """One tar; its columns are the keys of its .json members, `txt` and `key`, all of them text.

    index: the path of its index; without one, the tar is indexed now, in memory: of its first n_members, if given.
    cache: where bytes of pictures are kept.
    """

    def __init__(
        self,
        path: str,
        columns: Mapping[str, str],
        index: str | None,
        n_members: int | None = None,
        cache: LocalCache | None = None,
    ) -> None:
        super().__init__(path, columns)
        self.cache = cache
        self.file = None if index is None else storage.open_parquet(index)
        if self.file is None:
            self.samples, sizes = index_of(path, n_members)
        else:
            self.samples = self.file.schema_arrow.empty_table()
            sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.fields: list[str] = json.loads(self.samples.schema.metadata[NAMES])
        self.names = {"key", "txt", "image", *self.fields}
        self.row_group_sizes = [n for n in sizes if n]
        self._parsed: tuple[int, list[dict[str, Any]]] | None = None  # of the row group that was read last

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
        samples = self._samples_of(row_group, part["json"]) if "json" in wanted else []
        return pa.table(
            {
                name: part[indexed[name]]
                if name in indexed
                else pa.array([clean(sample.get(name)) or None for sample in samples], pa.string())
                for name in columns
            }
        )

    def _samples_of(self, row_group: int, texts: pa.ChunkedArray) -> list[dict[str, Any]]:
        """The .json members, parsed once for all columns."""
        if self._parsed is None or self._parsed[0] != row_group:
            self._parsed = row_group, [fields(text) for text in texts.to_pylist()]
        return self._parsed[1]

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
        """Only the bytes of these pictures are read, and what is between two of them that are near each other.

        Raises ValueError where the tar is not the one that was indexed.
        """
        table = self._index(row_group, ["member", "offset", "size"])
        names, starts, sizes = (table[name].to_pylist() for name in ("member", "offset", "size"))
        picked = range(len(names)) if rows is None else rows.tolist()
        members = [i for i in set(picked) if names[i] is not None]
        images: dict[int, bytes] = {}  # pyarrow never frees the memory of a memoryview
        for inside in _near(sorted((starts[i] - HEADER, starts[i] + sizes[i], i) for i in members)):
            first = inside[0][0]
            data = self._bytes(first, max(stop for _, stop, _ in inside))
            for start, stop, i in inside:
                at = start - first
                if len(data) < stop - first or not _is_label(data[at : at + 100], names[i]):
                    raise ValueError(
                        f"{self.path} changed since it was indexed, {names[i]!r} is not where it was: run `jest "
                        "catalogue` into a new directory"
                    )
                images[i] = data[at + HEADER : stop - first]
        return pa.array([images.get(i) for i in picked], pa.large_binary())

    def image_bytes(self, row_group: int) -> int:
        return int(pc.sum(self._index(row_group, ["size"])["size"]).as_py() or 0)

    def _bytes(self, start: int, stop: int) -> bytes:
        if self.cache is None:
            fs, inner = storage.filesystem(self.path)
            data: bytes = fs.cat_file(inner, start=start, end=stop)
            return data
        return self._cached.range(start, stop)

    @cached_property
    def _cached(self) -> CachedFile:
        assert self.cache is not None
        return self.cache.open(self.path)


def _near(members: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Members (start, end, row) in the order of the tar, those together that one read fetches: at most _GAP apart, and
    WHOLE_BYTES long, or one longer picture."""
    inside: list[tuple[int, int, int]] = []
    for member in members:
        if inside and (member[0] - inside[-1][1] > _GAP or member[1] - inside[0][0] > WHOLE_BYTES):
            yield inside
            inside = []
        inside.append(member)
    if inside:
        yield inside


def _is_label(label: bytes, name: bytes) -> bool:
    """Whether a header's field of 100 bytes can be of a member with this name; longer ones are elsewhere too.

    Old GNU tars end the field with a NUL, and so have but 99 bytes of a name of 100.
    """
    return len(name) > 100 or not name.isascii() or label.rstrip(b"\0")[:99] == name[:99]
