"""Image shards -> rows: what all layouts have in common, and the names and types of columns.

Rows come in row groups; images stay encoded.
"""

import contextlib
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# jest's name of a column <- names that datasets use, the first that is there wins; data.columns overrides them
ALIASES = {
    "uid": ("uid",),
    "id": ("SAMPLE_ID", "id", "key"),
    "url": ("url", "URL", "image_url"),
    "caption": ("txt", "caption", "TEXT", "text", "top_caption", "alt_texts", "texts", "captions"),
    "image": ("jpg", "jpeg", "png", "webp", "image", "gif", "bmp", "tif", "tiff", "avif"),
    "status": ("status",),
    "unsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "nsfw": ("NSFW", "nsfw"),
    "watermark": ("pwatermark", "watermark_score"),
    "similarity": ("similarity", "clip_l14_similarity_score", "clip_similarity_vitl14", "alignment"),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score_laion_v2"),
    "language": ("LANGUAGE", "language", "lang"),
    "width": ("original_width", "WIDTH", "width"),
    "height": ("original_height", "HEIGHT", "height"),
    "hash": ("hash", "md5", "sha256", "sha512", "image_phash"),
}
WHOLE_BYTES = 256 << 20  # of the pictures of a row group that are read at once
_AT_ONCE = 1024  # pictures that are hashed at once
_UID = re.compile("[0-9a-fA-F]{32}")
_FEW = 16  # values of a row group, beside others, that say nothing on what a column is
# What Arrow raises on a value that Python's type of it cannot have
_UNUSUAL = (ValueError, LookupError, OverflowError, NotImplementedError, pa.ArrowException)


class Shard(ABC):
    """One shard, open for reading; columns are named by jest's names.

    columns: jest's name -> the shard's name, for columns that ALIASES lacks.
    """

    names: set[str]  # of the columns in the file
    row_group_sizes: list[int]

    def __init__(self, path: str, columns: Mapping[str, str]) -> None:
        self.path, self.columns = path, columns
        self.no_numbers: dict[
            tuple[str, int], list[str]
        ] = {}  # (column, row group) -> the values that `numbers` left out

    @abstractmethod
    def table(self, row_group: int, columns: list[str]) -> pa.Table:
        """Columns of a row group, by their names in the file and with their types there."""

    @abstractmethod
    def images(self, row_group: int, rows: NDArray[np.int64] | None = None) -> pa.Array:
        """Encoded images of a row group, large_binary; null where there is none. rows: numbers of those to read.

        Of a row group with more than WHOLE_BYTES of pictures only the rows asked for are in memory.
        """

    @abstractmethod
    def image_bytes(self, row_group: int) -> int:
        """Bytes of the pictures of a row group, roughly."""

    def actual(self, name: str) -> str | None:
        """The name in the file of a column, None where the shard lacks the column."""
        if name in self.columns:
            return self.columns[name] if self.columns[name] in self.names else None
        return next((alias for alias in ALIASES.get(name, (name,)) if alias in self.names), None)

    def read(self, row_group: int, name: str) -> pa.ChunkedArray:
        """A column of a row group by jest's name. Raises ValueError where the shard lacks it."""
        actual = self.actual(name)
        if actual is None:
            wanted = [self.columns[name]] if name in self.columns else ALIASES.get(name, (name,))
            raise ValueError(
                f"{self.path} has no column {' or '.join(wanted)}; it has {self.listed()}: "
                f"name the right one in data.columns, as {{{name}: ...}}"
            )
        table = self.table(row_group, [actual])
        if table.num_columns > 1:
            raise ValueError(f"{self.path} has {table.num_columns} columns {actual}, for {name}: leave one of them")
        return table[actual]

    def numbers(self, row_group: int, name: str) -> NDArray[np.float64]:
        """A column as float64, whatever type it has in this file; NaN where a value is missing or no number.

        Raises ValueError where more than half of the values are no numbers: then it is another column that is meant.
        """
        column = self.read(row_group, name)
        try:
            return pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeError):
            texts = _texts(column)
        values = np.array([_number(text) for text in texts])
        odd = [text for text, value in zip(texts, values, strict=True) if np.isnan(value) and not _is_missing(text)]
        few = len(values) < _FEW and len(self.row_group_sizes) > 1
        if 2 * len(odd) > len(values) and not few:
            raise ValueError(
                f"{self.path}, column {self.actual(name)}: {len(odd):,} of the {len(values):,} values of row group "
                f"{row_group} are no numbers, such as {odd[0][:80]!r}; name a numeric column for {name} in data.columns"
            )
        self.no_numbers[str(self.actual(name)), row_group] = odd
        return values

    def strings(self, row_group: int, name: str) -> list[str]:
        """A column as text: the first item of a list that is not empty; an empty string where a value is missing."""
        return _texts(self.read(row_group, name))

    def captions(self, row_group: int) -> list[str]:
        """The texts that the examples are trained with."""
        return self.strings(row_group, "caption")

    def ids(self, row_group: int) -> list[str]:
        """What names each row where it has no URL; an empty string where nothing does."""
        return (
            self.strings(row_group, "id") if self.actual("id") is not None else [""] * self.row_group_sizes[row_group]
        )

    def uids(self, row_group: int) -> list[str]:
        """uids of a row group, 32 hex digits each: those in the file, else derived (`derive_uid`) from the caption and
        the picture's URL, or the row's id, or the picture's bytes. Raises ValueError where a uid in the file is not 32
        hex digits."""
        stored = self.strings(row_group, "uid") if self.actual("uid") is not None else []
        stored = [u.replace("-", "") if len(u) == 36 else u for u in stored]  # a UUID with its dashes
        if bad := [u for u in stored if u and not _is_uid(u)]:
            raise ValueError(
                f"{self.path}, row group {row_group}: uid {bad[0][:80]!r} does not have 32 hex digits; name the column "
                "that does in data.columns, or an absent one to derive uids"
            )
        if stored and all(stored):
            return [u.lower() for u in stored]
        derived = self._derived_uids(row_group)
        return [u.lower() or d for u, d in zip(stored, derived, strict=True)] if stored else derived

    def _derived_uids(self, row_group: int) -> list[str]:
        """Each row by what it has: a row without a URL by its id, one without an id by its picture."""
        named_by = [""] * self.row_group_sizes[row_group]
        if self.actual("url") is not None:
            named_by = self.strings(row_group, "url")
        if not all(named_by):
            named_by = [name or other for name, other in zip(named_by, self.ids(row_group), strict=True)]
        captions = self.captions(row_group)
        uids = [derive_uid(name, text) for name, text in zip(named_by, captions, strict=True)]
        nameless = np.array([i for i, name in enumerate(named_by) if not name], dtype=np.int64)
        if self.actual("image") is not None:
            for start in range(0, len(nameless), _AT_ONCE):
                rows = nameless[start : start + _AT_ONCE]
                for row, image in zip(rows, self.images(row_group, rows).to_pylist(), strict=True):
                    uids[row] = derive_uid(image or b"", captions[row])
        return uids

    def listed(self) -> str:
        """The names of its columns, for a message."""
        names = sorted(self.names)
        return ", ".join(names[:60]) + (f" and {len(names) - 60:,} more" if len(names) > 60 else "")


def clean(value: Any) -> str:
    """A value of any type as text: bytes or surrogates that are not UTF-8 are replaced, NULs are left out; of a list
    the first text that is not blank. A missing value, NaN also, is an empty text."""
    if isinstance(value, list):
        return next((text for item in value if (text := clean(item)).strip()), "")
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").replace("\0", "")
    if value is None or (isinstance(value, float) and value != value):
        return ""
    text = str(value)
    if not text.isascii():  # JSON may have half of a surrogate pair, which no column of text can
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text.replace("\0", "")


def derive_uid(name: str | bytes, caption: str) -> str:
    """The uid of a pair that has none, as 32 hex digits: 128-bit BLAKE2b of its name (the URL, if any), 0x1F, and its
    caption. Text is encoded as UTF-8."""
    data = name if isinstance(name, bytes) else name.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data + b"\x1f" + caption.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def part_name(shard: int) -> str:
    """The file name of a shard's part in a catalogue or a score cache."""
    return f"{shard:05d}.parquet"


def _texts(column: pa.ChunkedArray) -> list[str]:
    """A column of any type as text: where Python has no such value (a date in the year 12000), as Arrow writes it."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        return [clean(value) for value in _bytes_where_text(column).to_pylist()]
    except _UNUSUAL:
        return [_text(scalar) for scalar in column]


def _text(scalar: pa.Scalar) -> str:
    with contextlib.suppress(*_UNUSUAL):
        return clean(scalar.as_py())
    with contextlib.suppress(*_UNUSUAL):
        return clean(scalar.cast(pa.string()).as_py())
    return ""


def _bytes_where_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A string column as bytes: strings in a file need not be UTF-8, so `clean` decodes them."""
    kind = column.type
    if _is_text(kind):
        return column.cast(pa.large_binary())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return column.cast(pa.large_list(pa.large_binary())) if _is_text(kind.value_type) else column
    return column


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _number(text: str) -> float:
    try:
        return float({"True": "1", "False": "0"}.get(text, text))
    except ValueError:
        return float("nan")


def _is_missing(text: str) -> bool:
    return text.strip().lower() in ("", "nan", "none", "null")


def _is_uid(value: str) -> bool:
    return _UID.fullmatch(value) is not None
