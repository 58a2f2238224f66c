"""A shard's path -> the shard, and its index, by its layout: a webdataset tar or Parquet."""

from collections.abc import Mapping

from ..base.shard_paths import is_tar
from . import tar_index
from .local_cache import LocalCache
from .parquet import ParquetShard
from .shards import Shard
from .tars import TarShard


def write_index(path: str, columns: Mapping[str, str], index: str) -> bool:
    """Write the index of a tar, or of a Parquet file with large row groups; returns whether the shard has one."""
    if is_tar(path):
        tar_index.write_index(path, index)
        return True
    return ParquetShard(path, columns, None).write_index(index)


def open_shard(
    path: str,
    columns: Mapping[str, str] | None = None,
    index: str | None = None,
    cache: LocalCache | None = None,
) -> Shard:
    """Open a shard: a tar if its name ends in .tar, else Parquet.

    columns: as data.columns. index: the path of its index, if `write_index` has made one. cache: where
    its bytes are kept.
    """
    return (
        TarShard(path, columns or {}, index, cache=cache)
        if is_tar(path)
        else ParquetShard(path, columns or {}, index, cache)
    )
