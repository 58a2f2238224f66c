"""Image shards -> rows: Parquet as img2dataset writes it, with the column names of the LAION family."""

import hashlib

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage

# What jest calls a column <- what the ecosystem calls it, first match wins
ALIASES = {
    "uid": ("uid",),
    "url": ("url", "URL", "image_url"),
    "caption": ("caption", "TEXT", "text", "txt", "top_caption"),
    "unsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "image": ("jpg", "jpeg", "png", "webp", "image"),
    "status": ("status",),
}


class Shard:
    """One Parquet shard, open for reading; columns are asked for by jest's names."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = storage.open_parquet(path)
        self.columns = set(self.file.schema_arrow.names)

    @property
    def row_group_sizes(self) -> list[int]:
        return [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]

    def actual(self, name: str) -> str | None:
        """The shard's own name of a column, or None where it has none."""
        return next((alias for alias in ALIASES[name] if alias in self.columns), None)

    def read(self, row_group: int, *names: str) -> dict[str, pa.ChunkedArray]:
        """Columns of a row group by jest's names. Raises ValueError where the shard lacks one."""
        found = {name: self.actual(name) for name in names}
        if lacking := [name for name, actual in found.items() if actual is None]:
            wanted = " or ".join(ALIASES[lacking[0]])
            raise ValueError(f"{self.path} has no column {wanted}; it has {', '.join(sorted(self.columns))}")
        table = self.file.read_row_group(row_group, columns=[str(actual) for actual in found.values()])
        return {name: table[actual] for name, actual in found.items()}

    def captions(self, row_group: int) -> list[str]:
        """Captions of a row group; a missing one is the empty string."""
        return pc.fill_null(self.read(row_group, "caption")["caption"], "").to_pylist()

    def uids(self, row_group: int) -> list[str]:
        """uids of a row group: the shard's own, or the first 128 bits of BLAKE2b over `url`, 0x1F, `caption`."""
        if self.actual("uid") is not None:
            values: list[str] = self.read(row_group, "uid")["uid"].to_pylist()
            if bad := [u for u in values if u is None or len(u) != 32]:
                raise ValueError(f"{self.path}, row group {row_group}: uid {bad[0]!r} does not have 32 hex digits")
            return values
        urls = pc.fill_null(self.read(row_group, "url")["url"], "").to_pylist()
        return [derive_uid(url, caption) for url, caption in zip(urls, self.captions(row_group), strict=True)]

    def images(self, row_group: int) -> pa.ChunkedArray:
        """Encoded images of a row group; null where img2dataset has none."""
        images = self.read(row_group, "image")["image"]
        if pa.types.is_struct(images.type):  # Hugging Face: {bytes, path}
            images = pc.struct_field(images, "bytes")
        return images.cast(pa.large_binary())


def derive_uid(url: str, caption: str) -> str:
    """The uid of a pair that comes without one: a function of its URL and caption alone."""
    return hashlib.blake2b(f"{url}\x1f{caption}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def part_name(shard: int) -> str:
    """The name of a shard's part file in a catalogue or a score cache."""
    return f"{shard:05d}.parquet"
