"""Where a shard and its part of a catalogue are: what a task that reads the shard needs of the catalogue."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..base import damage, storage
from ..base.shard_paths import is_tar
from .layouts import open_shard
from .local_cache import LocalCache
from .shards import Shard, part_name


@dataclass(frozen=True)
class Place:
    """One shard of a catalogue, by its number and its paths.

    number: of the shard in the catalogue. path: of the shard. directory: of the catalogue. index: folder of the
    indices. is_paged: it is a Parquet file with an index; every tar has one.
    """

    number: int
    path: str
    directory: str
    index: str
    is_paged: bool = False

    @property
    def index_path(self) -> str | None:
        """The path of the shard's index; None where it has none."""
        return f"{self.index}/{part_name(self.number)}" if is_tar(self.path) or self.is_paged else None

    @property
    def part_path(self) -> str:
        """The path of the shard's part of the catalogue (columns: tables.CATALOGUE)."""
        return f"{self.directory}/parts/{part_name(self.number)}"

    def open(self, columns: dict[str, str], cache: LocalCache | None = None) -> Shard:
        """The shard; columns: data.columns of the run file. cache: where its bytes are kept."""
        return open_shard(self.path, columns, self.index_path, cache)

    def rows(self, row_group: int) -> tuple[list[str], NDArray[np.int64]]:
        """uid and multiplicity of each row of a row group, as the catalogue has them."""
        with damage.noted(self.part_path, "catalogue"):
            part = storage.open_parquet(self.part_path).read_row_group(row_group, columns=["uid", "multiplicity"])
        return part["uid"].to_pylist(), part["multiplicity"].to_numpy().astype(np.int64)

    def aligned(self, shard: Shard, row_group: int) -> tuple[list[str], NDArray[np.int64]]:
        """The same. Raises ValueError where the shard is not the one that was catalogued."""
        uids, multiplicity = self.rows(row_group)
        if row_group >= len(shard.row_group_sizes) or shard.uids(row_group) != uids:
            raise ValueError(
                f"{self.path}, row group {row_group}, changed since it was catalogued, or an earlier version of jest "
                "named rows without a URL, or read captions, otherwise: run `jest catalogue` into a new directory"
            )
        return uids, multiplicity


@dataclass(frozen=True)
class Places:
    """The same of all shards of a catalogue, in columns, which Ray tasks share without a copy.

    paths (n,): of the shards. is_paged (n,): as in Place.
    """

    paths: pa.StringArray
    directory: str
    index: str
    is_paged: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.paths)

    def place(self, number: int) -> Place:
        """That of shard `number`."""
        path, is_paged = self.paths[number].as_py(), bool(self.is_paged[number])
        return Place(number, path, self.directory, self.index, is_paged)
