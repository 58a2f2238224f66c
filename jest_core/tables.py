"""Columns of every table on disk, with their types and units; the status of a slot; the two ways to write a uid."""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class SlotStatus(IntEnum):
    """Whether a slot of a super-batch can be selected, and if not, why. In memory its number, on disk its label."""

    OK = 0  # a pair whose image decoded
    MISSING = 1  # no bytes
    NO_IMAGE = 2  # bytes of none of the formats that are read
    TOO_LARGE = 3  # more pixels than are decoded
    DAMAGED = 4  # an image that does not decode
    DUPLICATE = 5  # a pair whose image decoded, and which an earlier slot of the super-batch has too

    @property
    def label(self) -> str:
        """The name in lower case, as tables on disk have it."""
        return self.name.lower()


_LABELS = {int(status): status.label for status in SlotStatus}


def status_labels(numbers: Iterable[int] | NDArray[Any]) -> list[str]:
    """The labels of statuses given by their numbers."""
    return [_LABELS[number] for number in numbers]


# The slots of a super-batch, as a learner receives them (in memory; uid as two 64-bit halves)
EXAMPLE = pa.schema(
    [
        ("uid_high", pa.uint64()),
        ("uid_low", pa.uint64()),
        ("occurrence", pa.int64()),  # how often this row came earlier in the stream
        ("shard", pa.int32()),  # number of the shard in the catalogue
        ("row", pa.int32()),  # row of the shard
        ("image", pa.large_binary()),  # encoded, as in the shard
        ("caption", pa.large_string()),
        ("content", pa.int64()),  # hash of the image's bytes with data.mask_duplicates `image`, else 0
        ("status", pa.uint8()),  # number of a SlotStatus
    ]
)

# <catalogue>/parts/00000.parquet: one row per row of the shard, in its order and its row groups
CATALOGUE = pa.schema(
    [
        ("uid", pa.string()),  # 32 hex digits
        ("dropped_by", pa.string()),  # the first rule that dropped it; null = kept
        ("multiplicity", pa.int32()),  # how many slots it has in an epoch of its source at weight 1; 0 = dropped
    ]
)

# <catalogue>/shards.parquet: one row per shard, in the order of data.shards
SHARDS = pa.schema(
    [
        ("path", pa.string()),
        ("source", pa.int32()),  # which of the patterns of data.shards named it
        ("bytes", pa.int64()),
        ("rows", pa.int64()),
        ("fingerprint", pa.string()),  # of its size, its row count, and its uids in order
        ("counts", pa.map_(pa.string(), pa.int64())),  # kept, and each rule's drops
        ("is_paged", pa.bool_()),  # a Parquet file whose large row groups are read in parts; absent before 0.1.0
    ]
)

# <catalogue>/row_groups.parquet: one row per row group of every shard
ROW_GROUPS = pa.schema(
    [
        ("shard", pa.int32()),
        ("row_group", pa.int32()),
        ("rows", pa.int32()),
        ("slots", pa.int64()),  # sum of the multiplicities
    ]
)


SCORE_CACHE_COLUMNS = ("uid", "row", "status", "image_embedding", "text_embedding", "matched_pair_loss", "cosine")
TOKEN_COLUMNS = pa.schema(
    [
        ("token_ids", pa.list_(pa.field("element", pa.uint32(), nullable=False))),  # the last stands for all after it
        ("caption_crc32", pa.uint32()),  # CRC-32 of the caption that they are of, as UTF-8
    ]
)


def score_cache(width: int, scorers: Sequence[str] = (), *, tokens: bool = False) -> pa.Schema:
    """<scores>/parts/00000.parquet: one row per row of the shard, in its order and its row groups.

    width: of both embeddings; scorers: names of further columns; tokens: whether it has TOKEN_COLUMNS.
    """
    types = (
        pa.string(),
        pa.int32(),
        pa.string(),  # label of a SlotStatus, or "dropped" (by the catalogue); the other columns are zero unless "ok"
        pa.binary(2 * width),  # float16, little-endian, unit norm; a list of D float16 in caches of versions before
        pa.binary(2 * width),
        pa.float32(),  # of the pair by the reference, nats: its sigmoid loss, or minus its logit if trained by softmax
        pa.float32(),
    )
    fixed = list(zip(SCORE_CACHE_COLUMNS, types, strict=True))
    return pa.schema([*fixed, *(TOKEN_COLUMNS if tokens else ()), *((name, pa.float32()) for name in scorers)])


# <scores>/row_groups.parquet: one row per row group of every shard
SCORED = pa.schema(
    [
        ("shard", pa.int32()),
        ("row_group", pa.int32()),
        ("ok", pa.int64()),  # kept rows that decoded
        ("slots", pa.int64()),  # sum of their multiplicities
    ]
)

# <run>/selection/*.parquet: a row per selected example, and per example of the refused sample
SELECTION = pa.schema(
    [
        ("step", pa.int64()),
        ("position", pa.int64()),  # in the global super-batch
        ("uid", pa.string()),
        ("occurrence", pa.int64()),
        ("chunk", pa.int32()),  # the draw it came from; -1 = refused, 0 for uniform batches
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("learner_loss", pa.float32()),  # matched-pair losses, nats; NaN where not computed
        ("reference_loss", pa.float32()),
        ("draw_score", pa.float64()),  # conditional score at its draw (refused: at the last), nats; NaN for uniform
        ("selected", pa.bool_()),
    ]
)

# <run>/selection/steps-*.parquet: a row per step
STEPS = pa.schema(
    [
        ("step", pa.int64()),
        ("n_offered", pa.int64()),  # valid examples of the super-batch
        ("n_selected", pa.int64()),
        ("n_bad", pa.int64()),  # slots that cannot be selected because their image did not decode
        (
            "n_duplicates",
            pa.int64(),
        ),  # slots that cannot be selected because an earlier one is the same (data.mask_duplicates)
        ("super_batch_matched_score", pa.float64()),  # mean matched-pair criterion over the super-batch, nats
        ("sub_batch_matched_score", pa.float64()),  # the same over the selected
        ("sub_batch_score", pa.float64()),  # exact score of the set per example, all pairs, nats
        ("loss", pa.float64()),  # sigmoid loss of the sub-batch, nats per example
    ]
)

# <run>/selection/bad-*.parquet and <scores>/bad_rows.parquet: a row per image that did not decode
BAD_ROWS = pa.schema(
    [
        ("step", pa.int64()),  # -1 in the table of the score cache
        ("uid", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("reason", pa.string()),  # label of a SlotStatus
    ]
)


def uid_to_hex(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> list[str]:
    """Two 64-bit halves -> 32 hex digits."""
    return [f"{h:016x}{v:016x}" for h, v in zip(high.tolist(), low.tolist(), strict=True)]


def uid_from_hex(uids: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """32 hex digits -> two 64-bit halves."""
    data = np.frombuffer(bytes.fromhex("".join(uids)), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    if len(data) != len(uids):
        raise ValueError("a uid does not have 32 hex digits")
    return data[:, 0], data[:, 1]
