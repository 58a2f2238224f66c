"""A shard's path -> the shard, by its layout: a webdataset tar or Parquet."""

from collections.abc import Mapping

from ..base.shard_paths import is_tar
from .parquet import ParquetShard
from .shards import Shard
from .tars import TarShard


def open_shard(path: str, columns: Mapping[str, str] | None = None, index: str | None = None) -> Shard:
    """Open a shard: a tar if its name ends in .tar, else Parquet.

    columns: as data.columns. index: the path of a tar's index, if `tar_index.write_index` has made one.
    """
    return TarShard(path, columns or {}, index) if is_tar(path) else ParquetShard(path, columns or {})
