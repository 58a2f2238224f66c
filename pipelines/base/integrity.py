"""Whether a file is as it was written: digests in the Parquet files that jest writes, checksums in PyTorch's zips.

A page of a Parquet file may have a checksum, its footer has none: a sealed file has the footer's digest right before
it, where no reader of Parquet looks. Files of users and of earlier versions are not sealed, and are read as they are.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

_TAIL = 1 << 16  # bytes read at the end of a Parquet file, which mostly hold its footer
_END = 8  # bytes after the footer: its length, and PAR1
_SEAL = b"jest footer SHA-256 "  # then the digest
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size
CUT = b"jest.row_groups"  # key of a file's metadata: into how many each row group was cut, as JSON
_IS_FOLDER = 0x10  # attribute of a zip's record: PyTorch then reads nothing, and takes what is in memory for its values


class Damaged(ValueError):
    """A file lacks bytes, or has others than were written to it; the message names it."""


def seal(file: io.BytesIO) -> None:
    """Put the digest of its footer into a whole Parquet file."""
    data = file.getbuffer()
    start = len(data) - _footer_bytes(data)
    footer = bytes(data[start:])
    data.release()  # a BytesIO with a view of it cannot grow
    file.seek(start)
    file.write(_SEAL + hashlib.sha256(footer).digest() + footer)


class ParquetFile(pq.ParquetFile):  # type: ignore[misc]  # pyarrow has no types
    """A Parquet file of which damage is a Damaged with its path, and errors of the storage stay as they are.

    Of a sealed file every byte that is used is verified. Reads fetch only the bytes of the columns and row groups asked
    for, close ranges in one.
    """

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path = path
        with naming(path):
            tail = _tail(file)
            super().__init__(
                file,
                metadata=pq.read_metadata(pa.BufferReader(tail)),
                pre_buffer=True,
                page_checksum_verification=True,  # where a page has one, also in files of others
            )

    def read(self, *args: Any, **options: Any) -> pa.Table:
        with naming(self.path):
            return super().read(*args, **options)

    def read_row_group(self, i: int, *args: Any, **options: Any) -> pa.Table:
        with naming(f"{self.path}, row group {i},"):
            return super().read_row_group(i, *args, **options)

    def cut_groups(self) -> list[range]:
        """For each row group that `storage.write_table` was given, the row groups of the file that have its rows."""
        stored = (self.schema_arrow.metadata or {}).get(CUT)
        counts = json.loads(stored) if stored else [1] * self.num_row_groups
        return [range(stop - n, stop) for n, stop in zip(counts, accumulate(counts), strict=True)]

    def read_row_groups(self, row_groups: Iterable[int], *args: Any, **options: Any) -> pa.Table:
        with naming(self.path):
            return super().read_row_groups(list(row_groups), *args, **options)


def _tail(file: BinaryIO) -> bytes:
    """The end of a Parquet file with its footer. Raises ArrowInvalid where the footer is not the one of its digest."""
    size = file.seek(0, io.SEEK_END)
    tail = _last(file, min(size, _TAIL))
    wanted = _footer_bytes(tail) + _SEAL_BYTES
    if len(tail) < wanted and _footer_bytes(tail) <= size:
        tail = _last(file, min(wanted, size))
    seal, footer = tail[-wanted : _SEAL_BYTES - wanted], tail[_SEAL_BYTES - wanted :]
    is_sealed = len(tail) >= wanted and seal.startswith(_SEAL)
    if is_sealed and seal != _SEAL + hashlib.sha256(footer).digest():
        raise pa.ArrowInvalid("its footer is not the one that was written")
    return tail


def _last(file: BinaryIO, n: int) -> bytes:
    file.seek(-n, io.SEEK_END)
    return file.read(n)


def _footer_bytes(data: bytes | memoryview) -> int:
    """Size of the footer that ends the data, with what follows it."""
    return int.from_bytes(data[-_END : -_END // 2], "little") + _END


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors of damaged Parquet as Damaged with the name of what is read; errors of the storage stay as they are."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError, UnicodeDecodeError) as error:
        raise Damaged(f"{what} is damaged, or is not Parquet: {error}; replace it") from error
    except OSError as error:
        if error.errno is not None or type(error) is not OSError:  # of the storage
            raise
        raise Damaged(f"{what} is damaged: {error}; replace it") from error


def refuse_damaged_zip(path: str, data: bytes) -> None:
    """Raises Damaged where the content of a zip, as PyTorch writes it, is not the one that its checksums were made of.

    PyTorch writes these checksums, and ignores them. Data that is no zip, such as PyTorch's format before 1.6, passes.
    """
    if not data.startswith(b"PK"):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            damaged = file.testzip()
            folders = [record.filename for record in file.infolist() if record.external_attr & _IS_FOLDER]
    except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise Damaged(f"{path} is damaged, or cut off: {error}") from error
    if damaged or folders:
        raise Damaged(
            f"{path} is damaged: {damaged or folders[0]} is not what was written; restore it, or save it again where "
            "PyTorch wrote it without checksums (torch.serialization.set_crc32_options)"
        )
