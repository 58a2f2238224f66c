"""Parquet shards: as img2dataset writes them, with Hugging Face's image struct, or with several texts for a picture, as
WebLI has them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc

from ..base import storage
from .shards import Shard


class ParquetShard(Shard):
    """One Parquet file; its row groups are the shard's."""

    def __init__(self, path: str, columns: Mapping[str, str]) -> None:
        super().__init__(path, columns)
        with _damage(path):
            self.file = storage.open_parquet(path)
        self.names = set(self.file.schema_arrow.names)
        self.row_group_sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]

    def table(self, row_group: int, columns: list[str]) -> pa.Table:
        with _damage(f"{self.path}, row group {row_group},"):
            return self.file.read_row_group(row_group, columns=columns)

    def images(self, row_group: int) -> pa.Array:
        images = self.read(row_group, "image")
        if pa.types.is_struct(images.type):  # Hugging Face: {bytes, path}
            images = pc.struct_field(images, "bytes")
        return images.cast(pa.large_binary()).combine_chunks()


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """Turn errors of damaged Parquet into a ValueError; errors of the storage stay as they are, and are retried."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError) as error:
        raise ValueError(f"{what} is damaged, or is not Parquet: {error}; replace it") from error
    except OSError as error:
        if error.errno is not None or type(error) is not OSError:
            raise
        raise ValueError(f"{what} is damaged: {error}; replace it") from error
