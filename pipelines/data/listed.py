"""Lists of uids, URLs or hashes that people and other programs write -> their entries.

Text in any Unicode encoding with an entry a line, CSV, TSV, Parquet and .npy, also compressed. Of several columns the
one with a name of what is listed counts, else the first whose values have the form of it.
"""

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..base import progress, storage
from .plain_columns import plain
from .shards import ALIASES, clean

Rows = list[list[str]]  # of a list's columns

# What an entry of each kind looks like, and how it is described
_FORMS = {
    "uid": (r"[0-9a-f]{32}", "uid (32 hex digits)"),
    "url": (r"[^\s/]*[/.]\S*", "URL"),
    "hash": (r"-?[0-9a-f]+|[\w+/-]{20,}=*", "hash"),  # in hex, a number, or in base 64
}
_LONGEST = 100_000  # characters of a line that count
_SAMPLE = 100  # rows by whose form a column is chosen
_COMPRESSED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\0": lzma.decompress}
_ZSTD = b"\x28\xb5\x2f\xfd"
_ENCODINGS = {  # UTF-32 before UTF-16, which begins in the same way
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def key(value: str, by: str) -> str:
    """What two uids, URLs or hashes are compared by: a uid may be written as a UUID, and a hash in either case."""
    if by == "url":
        return value.strip()
    lower = value.strip().lower()
    return lower.removeprefix("urn:uuid:").removeprefix("0x").strip("{}").replace("-", "") if by == "uid" else lower


def entries(path: str, by: str) -> list[str]:
    """The entries of a list of uids, URLs or hashes, each as `key` has it. Those of another form are said, and
    left out of uids.

    Raises ValueError where all have another form, since such a list matches nothing.
    """
    data = read(path)
    with _damage(path):
        if data.startswith(b"PAR1"):
            column = _of_parquet(data, by)
        elif data.startswith(np.lib.format.MAGIC_PREFIX):
            column = [clean(value) for value in np.load(io.BytesIO(data), allow_pickle=False).ravel().tolist()]
        else:
            column = _of_text(data, path, by)
    values = [value for text in column if (value := key(text, by))]
    odd = [value for value in values if not _has_form(value, by)]
    other = next((f", or set `by: {kind}`" for kind in _FORMS if kind != by and odd and _has_form(odd[0], kind)), "")
    if odd and len(odd) == len(values) and (other or by != "url"):  # data.columns may name another column for the URL
        raise ValueError(
            f"{path}: none of its {len(values):,} entries is a {_FORMS[by][1]}, such as {odd[0][:80]!r}, so it matches "
            f"nothing: correct the list{other}"
        )
    if odd:
        what = f"{len(odd):,} of {len(values):,} entries are no {_FORMS[by][1]}, such as {odd[0][:80]!r}"
        progress.warn("lists", f"{path}: {what}")
    return [value for value in values if _has_form(value, by)] if odd and by == "uid" else values


def read(path: str) -> bytes:
    """The bytes of a file, decompressed."""
    data = storage.read_bytes(path)
    with _damage(path):
        if data.startswith(_ZSTD):
            return bytes(pa.CompressedInputStream(pa.BufferReader(data), "zstd").read())
        decompress = next((each for magic, each in _COMPRESSED.items() if data.startswith(magic)), bytes)
        return decompress(data)


@contextmanager
def _damage(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise ValueError(f"{path} is damaged, or not what its first bytes say: {error}; replace it") from error


def _has_form(value: str, by: str) -> bool:
    return re.fullmatch(_FORMS[by][0], value) is not None


def _of_parquet(data: bytes, by: str) -> list[str]:
    file = pq.ParquetFile(pa.BufferReader(data))
    names = file.schema_arrow.names
    named = _named(names, by)
    table = file.read(columns=None if named is None else [names[named]])
    columns = [_texts(column) for column in table.columns]
    return columns[0] if named is not None else _best([list(row) for row in zip(*columns, strict=True)], by)


def _texts(column: pa.ChunkedArray) -> list[str]:
    carried = plain(pa.table({"": column}))  # without text that is stored as bytes
    return [clean(value) for value in (carried[""] if carried.column_names else column).to_pylist()]


def _of_text(data: bytes, path: str, by: str) -> list[str]:
    encoding = next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), None)
    text = data.decode(encoding, "replace").removeprefix("\ufeff") if encoding else clean(data)
    lines = [line.strip() for line in clean(text).splitlines() if line.strip()]
    if not lines:
        return []
    # URLs may have commas and spaces, so that only some lists of them are of several columns
    several = by != "url" or re.search(r"\.[ct]sv\b", path) or lines[0].startswith('"')
    sample = "\n".join(lines[:_SAMPLE])
    delimiter = next((each for each in ("\t,; " if several else "\t") if each in sample), None)
    if delimiter is None and not lines[0].startswith('"'):
        return lines
    rows = [
        row for line in lines for row in csv.reader([line[:_LONGEST]], delimiter=delimiter or ",")
    ]  # text may break
    named = _named(rows[0], by)
    return _best(rows, by) if named is None else [row[named] for row in rows[1:] if named < len(row)]


def _named(names: Sequence[str], by: str) -> int | None:
    """The number of the column that has a name of what is listed."""
    called = {name.lower() for name in ALIASES[by]}
    return next((i for i, name in enumerate(names) if name.strip().lower() in called), None)


def _best(rows: Rows, by: str) -> list[str]:
    """The first of the columns whose values have the form of what is listed most often; of hashes the longest such, as
    a row's number looks like one too."""
    sample = rows[:_SAMPLE]
    width = max((len(row) for row in sample), default=0)
    fits = [sum(_has_form(key(row[i], by), by) for row in sample if i < len(row)) for i in range(width)]
    lengths = [sum(len(row[i]) for row in sample if i < len(row)) * (by == "hash") for i in range(width)]
    best = max(range(width), key=lambda i: (fits[i], lengths[i]), default=0)
    return [row[best] for row in rows if best < len(row)]
