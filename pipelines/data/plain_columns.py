"""Columns of any Parquet type -> columns that JSON can hold: numbers, text, and lists of these.

img2dataset writes the columns of a row as JSON beside its picture; a value that JSON lacks would take the picture with
it.
"""

import json
import math
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

from .shards import clean


def plain(table: pa.Table) -> pa.Table:
    """The table without what JSON cannot hold; of columns with one name, the first.

    Times (of UTC), dates and decimals become text, binary values of a fixed size (hashes, UUIDs) hex, structs and maps
    JSON, NaN and infinite numbers null. Other binary columns are left out, and those that have a value that cannot be
    converted.
    """
    columns: dict[str, pa.ChunkedArray] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        with suppress(pa.ArrowException, OverflowError):  # such as a date after the year 9999 in a list
            if name not in columns and (converted := _plain(column)) is not None:
                columns[name] = converted
    return pa.table(columns)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type))
    if types.is_dictionary(kind):
        return _plain(column.cast(kind.value_type))
    if types.is_floating(kind):
        numbers = column.cast(pa.float32()) if types.is_float16(kind) else column
        return pc.if_else(pc.is_finite(numbers), numbers, None)
    if _is_numeric(kind):
        return column
    if types.is_fixed_size_binary(kind):
        return _text([None if value is None else value.hex() for value in column.to_pylist()])
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return None
    if types.is_timestamp(kind) and kind.tz:
        return _plain(column.cast(pa.timestamp(kind.unit)))  # of UTC; a name of a time zone may be one that is not here
    values = [None if value is None else _json(value) for value in column.cast(_readable(kind)).to_pylist()]
    if not types.is_nested(kind):
        return _text(values)
    if _is_list(kind) and _is_text(kind.value_type):
        return pa.chunked_array([pa.array(values, pa.list_(pa.string()))])
    return _text([None if value is None else json.dumps(value) for value in values])


def _text(values: list[str | None]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, pa.string())])


def _readable(kind: pa.DataType) -> pa.DataType:
    """The type that a column is read as: text as bytes, as it need not be UTF-8; times, dates and decimals as text."""
    if _is_text(kind):
        return pa.large_binary()
    if types.is_temporal(kind) or types.is_decimal(kind):
        return pa.string()
    if _is_list(kind):
        return pa.large_list(_readable(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([(field.name, _readable(field.type)) for field in kind])
    return kind


def _json(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, dict):
        return {clean(name): _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else clean(value)


def _is_numeric(kind: pa.DataType) -> bool:
    """Whether img2dataset can write the values as they are: numbers, and lists of them, such as boxes."""
    if _is_list(kind):
        return _is_numeric(kind.value_type) or types.is_float32(kind.value_type) or types.is_float64(kind.value_type)
    return bool(types.is_boolean(kind) or types.is_integer(kind) or types.is_null(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
