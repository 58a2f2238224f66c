"""A window of the order -> its examples, with their cached reference embeddings: the task that reads for learners.

Nothing here imports PyTorch, for the reason that data/rows.py gives.
"""

from typing import TypedDict

import numpy as np
import pyarrow as pa

from jest_core import tables
from jest_core.examples.inputs import Inputs
from jest_core.examples.order import Piece, Window
from jest_core.examples.tokenizer import Tokenizer
from jest_core.run_file import Run

from ..base import storage
from ..data import local_cache
from ..data.catalogue import Catalogue
from ..data.places import Place
from ..data.rows import decoded, encoded, parsed, tokenised, with_tokens
from ..scores import score_cache, stored_tokens
from ..scores.score_cache import CachedRows

ENCODED_BYTES = 25_000  # of a picture as it is in its shard, where nothing says: a JPEG of 512 pixels
_BESIDE_BYTES = 200  # of an example beside its picture, pixels, tokens and embeddings: caption, uid, place


class Item(TypedDict):
    """What a task reads: a window, and the places of its shards by their numbers."""

    window: Window
    places: dict[int, Place]


def item_of(catalogue: Catalogue, window: Window) -> Item:
    return {"window": window, "places": {piece.shard: catalogue.place(piece.shard) for piece in window.pieces}}


def of_window(item: Item, run_text: str, inputs: Inputs) -> pa.Table:
    """One window -> its slots in stream order: encoded and decoded images, tokens (int32), cached reference embeddings.

    inputs: how the model prepares images and texts.
    """
    run, window, places = parsed(run_text), item["window"], item["places"]
    pieces = [_of_piece(run, piece, places[piece.shard], window.epoch, inputs.tokenizer) for piece in window.pieces]
    table = pa.concat_tables(pieces).take(pa.array(window.permutation()))
    return decoded(table, inputs.view)


def example_bytes(
    image_size: int, context_length: int, width: int = 0, encoded: float = ENCODED_BYTES
) -> dict[str, float]:
    """What an example of a window takes of Ray's object store, by part.

    image_size: of its pixels. width: of the cached embeddings; 0 where none are read. encoded: bytes of its picture.
    """
    return {
        "encoded": encoded,
        "pixels": 3 * image_size**2,
        "tokens": 4 * context_length,
        "embeddings": 2 * 2 * width,
        "beside": _BESIDE_BYTES,
    }


@storage.retried
def _of_piece(run: Run, piece: Piece, place: Place, epoch: int, tokenizer: Tokenizer) -> pa.Table:
    """The slots of a piece, in the order of the shard; a row comes as often as its multiplicity says."""
    shard = place.open(run.data.columns, local_cache.of(run))
    uids, multiplicity = place.aligned(shard, piece.row_group)
    cached = None
    if run.reads_scores:
        assert run.reference is not None
        columns = ["status", *score_cache.EMBEDDINGS, *tables.TOKEN_COLUMNS.names]
        cached = CachedRows(run.path(run.reference.scores), place, piece.row_group, uids, columns)
        multiplicity = np.where(cached.is_ok, multiplicity, 0)
    try:
        rows, occurrences = piece.rows(multiplicity, epoch)
    except ValueError as error:
        raise ValueError(
            f"{place.path}, row group {piece.row_group}: {error}; if a catalogue or score cache was made "
            "again, start the run in a new directory"
        ) from error
    table = encoded(shard, piece.shard, piece.row_group, rows, uids, occurrences, run.data.mask_duplicates == "image")
    if cached is None:
        return tokenised(table, tokenizer)
    scores = cached.take(rows)
    if cached.tokenizer is not None and cached.tokenizer == tokenizer.identity:
        table = with_tokens(table, stored_tokens.unpack(scores, table["caption"], tokenizer))
    else:
        table = tokenised(table, tokenizer)
    return table.append_column("reference_image", scores["image_embedding"]).append_column(
        "reference_text", scores["text_embedding"]
    )
