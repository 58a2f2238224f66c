"""The headers of the pages of a Parquet file: how many bytes and rows each page has.

They are structs in Thrift's compact protocol, whose fields have numbers: PageHeader in
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from dataclasses import dataclass
from typing import Any, BinaryIO

_HEADER_BYTES = (1 << 10, 1 << 14, 1 << 21)  # that are read of a header, until it is whole: it may quote two values
_DICTIONARY_PAGE = 2
_DICTIONARIES = (2, 8)  # encodings whose values are in the dictionary: PLAIN_DICTIONARY and RLE_DICTIONARY


@dataclass(frozen=True)
class Page:
    """A page of a column of a row group.

    first_row: number of its first row within the row group; -1 where it is the dictionary. offset: of its header in the
    file. size: with the header. uses_dictionary: its values are numbers of values of the dictionary.
    """

    first_row: int
    n_rows: int
    offset: int
    size: int
    uses_dictionary: bool


def pages_of(source: BinaryIO, chunk: Any, n_rows: int) -> list[Page]:
    """The pages of a column that is no list; none where their headers do not add up to the column's rows."""
    pages: list[Page] = []
    row, at, end = 0, chunk_start(chunk), chunk_start(chunk) + chunk.total_compressed_size
    while row < n_rows:
        if at >= end or (header := _header(source, at, end)) is None:
            return []
        fields, length = header
        size = length + _number(fields, 3)
        is_dictionary = fields.get(1) == _DICTIONARY_PAGE
        data = fields.get(8) or fields.get(5) or {}  # of the second version, or of the first
        n = 0 if is_dictionary else _number(data, 3 if 8 in fields else 1)
        encoding = data.get(4 if 8 in fields else 2)
        if min(_number(fields, 3), n, end - at - size) < 0:
            return []
        if is_dictionary or n:
            pages.append(Page(-1 if is_dictionary else row, n, at, size, encoding in _DICTIONARIES))
        row, at = row + n, at + size
    return pages if row == n_rows else []


def chunk_start(chunk: Any) -> int:
    """Where the first page of a column is."""
    return min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)


def read_range(source: BinaryIO, start: int, stop: int) -> bytes:
    """Bytes start to stop of a file."""
    source.seek(start)
    return source.read(stop - start)


def _header(source: BinaryIO, at: int, end: int) -> tuple[dict[int, Any], int] | None:
    """The fields of the page header at a place, and its length; None where there is none."""
    for n in _HEADER_BYTES:
        data = read_range(source, at, min(at + n, end))
        try:
            return _struct(data, 0)
        except IndexError:  # it is longer
            continue
        except ValueError:
            return None
    return None


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while head := data[at]:
        at += 1
        number += head >> 4
        if not head >> 4:
            number, at = _integer(data, at)
        kind = head & 15
        if kind in (1, 2):  # true, false
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            fields[number], at = _integer(data, at)
        elif kind == 8:  # bytes
            length, at = _varint(data, at)
            at += length
        elif kind == 12 and depth < 4:
            fields[number], at = _struct(data, at, depth + 1)
        else:
            raise ValueError(f"a field of type {kind}, which no page header has")
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("no integer of 64 bits")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _number(fields: dict[int, Any], number: int) -> int:
    value = fields.get(number)
    return value if isinstance(value, int) else -1
