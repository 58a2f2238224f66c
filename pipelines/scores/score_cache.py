"""The score cache: the reference's embeddings of every kept pair, in a part for each shard with a row for each row.

<scores>/ has parts/, row_groups.parquet and bad_rows.parquet, which are made of what the parts say, and manifest.json.
This file reads it; `parts` writes it.
"""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jest_core.tables import SlotStatus

from ..base import blocks, damage, manifests, storage
from ..base.integrity import Damaged
from ..data.catalogue import Catalogue
from ..data.places import Place
from ..data.shards import part_name

STAGE = "reference-scores"
EMBEDDINGS = ("image_embedding", "text_embedding")
TOKENIZER = b"jest.tokenizer"  # key of a part's Parquet metadata: the identity of the one whose tokens it has
_ROUNDING = 0.02  # of the square of a norm, in float16 or coarser


class Config(TypedDict):
    """What decides a score cache's content: another value of any of these makes another cache.

    catalogue: its fingerprint. weights: SHA-256 in hex of the model's parameters; None where another tool embedded.
    decoder: of pictures, where not Pillow (preprocessing names it too). resolution: pixels and patches, where not the
    model's usual ones. precision: of the forward pass and the embeddings.
    loss: that the reference was trained with. logit_scale: the multiplier. logit_bias: None where the reference has
    none. width: of both embeddings. scorers: those of the run file, with their options.
    """

    catalogue: str
    model: str
    weights: str | None
    preprocessing: str
    decoder: NotRequired[str]
    resolution: NotRequired[str]
    precision: str
    loss: str
    logit_scale: float
    logit_bias: float | None
    width: int
    scorers: list[dict[str, Any]]


class Manifest(manifests.Manifest[Config]):
    """The manifest of a finished score cache.

    shards_fingerprint: of the catalogue's shards. counts: rows of each status. logit_bias: the reference's, or the one
    that fits its pairs best. tokenizer: the identity of the one whose tokens all parts have.
    """

    shards_fingerprint: str
    counts: dict[str, int]
    logit_bias: float
    tokenizer: NotRequired[str]


def part_path(directory: str, shard: int) -> str:
    """The path of a shard's part (columns: tables.score_cache)."""
    return f"{directory}/parts/{part_name(shard)}"


def opened(directory: str) -> Manifest:
    """The manifest of a finished cache. Raises FileNotFoundError, with the remedy, where there is none."""
    return manifests.finished(directory, STAGE, Manifest, "run `jest reference-scores` first")


def refuse_other(manifest: Manifest, catalogue: Catalogue, directory: str) -> None:
    """Raises ValueError unless the cache was made for this catalogue, or for one that it refines."""
    if not catalogue.lines_up_with(manifest["config"]["catalogue"]):
        raise ValueError(
            f"{directory} was scored for another catalogue than {catalogue.directory}, and for none that it refines: "
            "run `jest reference-scores` into a new directory"
        )


def refuse_other_decoder(manifest: Manifest, decoder: str, directory: str) -> None:
    """Raises ValueError unless the cached embeddings are of the pixels that `decoder` makes (data.decoder). Those of
    another tool are of pixels that are not known."""
    config = manifest["config"]
    scored = config.get("decoder", "pillow")
    if config["weights"] is not None and scored != decoder:
        raise ValueError(
            f"{directory} was scored with data.decoder {scored}, and data.decoder is {decoder}: learner and reference "
            f"have to see the same pixels; set data.decoder to {scored}, or score into a new directory"
        )


def scale_and_bias(manifest: Manifest) -> tuple[float, float]:
    """The reference's logit_scale (the multiplier) and logit_bias."""
    return manifest["config"]["logit_scale"], manifest["logit_bias"]


def missing(directory: str, catalogue: Catalogue) -> NDArray[np.int64]:
    """Numbers of the shards that have no part yet, or one that a reader has found damaged."""
    whole = damage.whole(f"{directory}/parts")
    return np.array([i for i in range(len(catalogue.shards)) if part_name(i) not in whole], dtype=np.int64)


def is_whole(directory: str, todo: NDArray[np.int64]) -> bool:
    """Whether a finished cache needs nothing made again: todo, the parts; or the tables that are made of them."""
    try:
        for name in ("row_groups", "bad_rows"):
            storage.open_parquet(f"{directory}/{name}.parquet").read()
    except (Damaged, FileNotFoundError):
        return False
    return not len(todo)


class CachedRows:
    """The cached rows of a row group of a shard, with some of the columns; embeddings are lists of D float16.

    uids: of the row group's rows in the shard. tokenizer: the identity of the one whose tokens the part has. Of a row
    group that the part has in several, `take` reads those that it needs. Raises Damaged where the part is, lacks the
    row group, or has embeddings that are none; ValueError where it has other uids.
    """

    def __init__(self, directory: str, place: Place, row_group: int, uids: list[str], columns: list[str]) -> None:
        self._path, self._name, self._columns = part_path(directory, place.number), f"row group {row_group}", columns
        with damage.noted(self._path, STAGE):
            self._file = storage.open_parquet(self._path)
            groups = self._file.cut_groups()
            if row_group >= len(groups):
                raise Damaged(f"{self._path} ends before row group {row_group} of {place.path}")
            tokenizer = (self._file.schema_arrow.metadata or {}).get(TOKENIZER)
        self._groups, self.tokenizer = np.array(groups[row_group]), tokenizer and tokenizer.decode()
        self._whole = self._read(self._groups, ["uid", *columns] if len(self._groups) == 1 else ["uid", "status"])
        if not self._whole["uid"].equals(pa.chunked_array([pa.array(uids, pa.string())])):
            raise ValueError(
                f"the score cache does not line up with {place.path}, row group {row_group}: score it again into a new "
                "directory"
            )

    @property
    def is_ok(self) -> NDArray[np.bool_]:
        """Of each row, whether it has embeddings; `status` is one of the columns."""
        return pc.equal(self._whole["status"], SlotStatus.OK.label).to_numpy()

    def all(self) -> pa.Table:
        """Every row, with its uid."""
        if len(self._groups) == 1:
            return self._whole
        return self._read(self._groups, ["uid", *self._columns])

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """The rows with these numbers."""
        if len(self._groups) == 1:
            return self._whole.take(pa.array(rows))
        sizes = np.array([self._file.metadata.row_group(group).num_rows for group in self._groups.tolist()])
        stops = np.cumsum(sizes)
        wanted, which = np.unique(np.searchsorted(stops, rows, side="right"), return_inverse=True)
        firsts = np.cumsum(sizes[wanted]) - sizes[wanted]  # among the rows that are read
        table = self._read(self._groups[wanted], self._columns)
        return table.take(pa.array(rows - (stops - sizes)[wanted][which] + firsts[which]))

    def _read(self, groups: NDArray[np.int64], columns: list[str]) -> pa.Table:
        with damage.noted(self._path, STAGE):
            table = self._file.read_row_groups(groups.tolist(), columns=columns)
            for name in set(EMBEDDINGS).intersection(table.column_names):
                if pa.types.is_fixed_size_list(table[name].type):  # `parts` of a version before did not look
                    refuse_unsound(table[name], f"{self._path}, {self._name}: {name}")
        return with_lists(table)


def with_lists(part: pa.Table) -> pa.Table:
    """Rows of a part with embeddings as lists of D float16; copies nothing of a table of one row group."""
    for name in EMBEDDINGS:
        if name in part.column_names:
            part = part.set_column(part.schema.get_field_index(name), name, blocks.halves(part[name]))
    return part


@storage.retried
def read(directory: str, place: Place, row_group: int, uids: list[str], columns: list[str]) -> pa.Table:
    """These columns of all rows of a row group, with their uids; see CachedRows."""
    return CachedRows(directory, place, row_group, uids, columns).all()


def refuse_unsound(column: pa.ChunkedArray | pa.Array, what: str) -> None:
    """Raises Damaged where an embedding is neither of unit norm, nor zero, as it is of a row that has none."""
    embeddings = blocks.unpack(column).astype(np.float32)
    norms = np.einsum("ij,ij->i", embeddings, embeddings)
    unsound = np.flatnonzero(~((np.abs(norms - 1) < _ROUNDING) | (norms == 0)))
    if len(unsound):
        rows = ", ".join(map(str, unsound[:5].tolist())) + ", ..." * (len(unsound) > 5)
        raise Damaged(f"{what} is NaN, infinite or not of unit norm in {len(unsound)} of {len(norms)} rows ({rows})")


def good_slots(directory: str) -> NDArray[np.int64]:
    """For each row group of the catalogue, the slots (sum of multiplicities) of its rows that have embeddings."""
    with damage.made_again_by(STAGE):
        slots: NDArray[np.int64] = storage.open_parquet(f"{directory}/row_groups.parquet").read()["slots"].to_numpy()
    return slots


def n_bad(counts: Mapping[str, int]) -> int:
    """Kept rows that did not decode."""
    return sum(n for status, n in counts.items() if status not in ("ok", "dropped"))


def reasons(counts: Mapping[str, int]) -> str:
    """How many rows are bad for each reason, the most frequent first."""
    bad = [(reason, n) for reason, n in counts.items() if reason not in ("ok", "dropped")]
    return ", ".join(f"{reason} {n:,}" for reason, n in sorted(bad, key=lambda item: -item[1]))


def summary(manifest: Manifest) -> str:
    """A finished cache in one line."""
    counts, (scale, bias) = manifest["counts"], scale_and_bias(manifest)
    bad = f"{n_bad(counts):,} bad" + (f" ({reasons(counts)})" if n_bad(counts) else "")
    return f"{counts.get('ok', 0):,} pairs scored, {bad}; logit_scale {scale:.2f}, logit_bias {bias:.2f}"
