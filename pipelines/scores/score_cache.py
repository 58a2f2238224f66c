"""The score cache: the reference's embeddings of every kept pair, in a part for each shard with a row for each row.

<scores>/ has parts/, row_groups.parquet and bad_rows.parquet, which are made of what the parts say, and manifest.json.
This file reads it; `parts` writes it.
"""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..base import blocks, damage, manifests, storage
from ..base.integrity import Damaged
from ..data.catalogue import Catalogue
from ..data.places import Place
from ..data.shards import part_name

STAGE = "reference-scores"
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
    that fits its pairs best.
    """

    shards_fingerprint: str
    counts: dict[str, int]
    logit_bias: float


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


@storage.retried
def read(directory: str, place: Place, row_group: int, uids: list[str], columns: list[str]) -> pa.Table:
    """Columns of the cached rows of a row group. uids: of the row group's rows in the shard.

    Raises Damaged where the part is, lacks the row group, or has embeddings that are none; ValueError where it has
    other uids.
    """
    path = part_path(directory, place.number)
    with damage.noted(path, STAGE):
        file = storage.open_parquet(path)
        if row_group >= file.num_row_groups:
            raise Damaged(f"{path} ends before row group {row_group} of {place.path}")
        rows = file.read_row_group(row_group, columns=["uid", *columns])
        for name in ("image_embedding", "text_embedding"):
            if name in columns:
                _refuse_unsound(rows[name], f"{path}, row group {row_group}: {name}")
    if not rows["uid"].equals(pa.chunked_array([pa.array(uids, pa.string())])):
        raise ValueError(
            f"the score cache does not line up with {place.path}, row group {row_group}: score it again into a new "
            "directory"
        )
    return rows


def _refuse_unsound(column: pa.ChunkedArray, what: str) -> None:
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
