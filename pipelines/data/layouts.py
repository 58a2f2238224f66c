"""A shard's path -> the shard, in whichever layout it is."""

from collections.abc import Mapping

from .parquet import ParquetShard
from .shards import Shard
from .tars import TarShard


def open_shard(path: str, columns: Mapping[str, str] | None = None, index: str | None = None) -> Shard:
    """A shard by its name; index: the path of a tar's, where there is one (`tars.write_index`)."""
    return TarShard(path, columns or {}, index) if path.endswith(".tar") else ParquetShard(path, columns or {})
