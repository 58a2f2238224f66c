"""A window of the order -> its examples, with their cached reference embeddings: the task that reads for learners.

Nothing here imports PyTorch, for the reason that data/rows.py gives.
"""

from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jest_core.examples.inputs import Inputs
from jest_core.examples.order import Piece, Window
from jest_core.run_file import Run
from jest_core.tables import SlotStatus

from ..base import storage
from ..data import local_cache
from ..data.places import Place
from ..data.rows import decoded, encoded, parsed
from ..scores import score_cache


class Item(TypedDict):
    """What a task reads: a window, and the places of its shards by their numbers."""

    window: Window
    places: dict[int, Place]


def of_window(item: Item, run_text: str, inputs: Inputs) -> pa.Table:
    """One window -> its slots in stream order: encoded and decoded images, tokens, cached reference embeddings.

    inputs: how the model prepares images and texts.
    """
    run, window, places = parsed(run_text), item["window"], item["places"]
    pieces = [_of_piece(run, piece, places[piece.shard], window.epoch) for piece in window.pieces]
    table = pa.concat_tables(pieces).take(pa.array(window.permutation()))
    return decoded(table, inputs)


@storage.retried
def _of_piece(run: Run, piece: Piece, place: Place, epoch: int) -> pa.Table:
    """The slots of a piece, in the order of the shard; a row comes as often as its multiplicity says."""
    shard = place.open(run.data.columns, local_cache.of(run))
    uids, multiplicity = place.aligned(shard, piece.row_group)
    cached = None
    if run.reads_scores:
        assert run.reference is not None
        columns = ["status", "image_embedding", "text_embedding"]
        cached = score_cache.read(run.path(run.reference.scores), place, piece.row_group, uids, columns)
        multiplicity = np.where(pc.equal(cached["status"], SlotStatus.OK.label).to_numpy(), multiplicity, 0)
    try:
        rows, occurrences = piece.rows(multiplicity, epoch)
    except ValueError as error:
        raise ValueError(
            f"{place.path}, row group {piece.row_group}: {error}; if a catalogue or score cache was made "
            "again, start the run in a new directory"
        ) from error
    table = encoded(shard, piece.shard, piece.row_group, rows, uids, occurrences, run.data.mask_duplicates == "image")
    if cached is None:
        return table
    cached = cached.take(pa.array(rows))
    return table.append_column("reference_image", cached["image_embedding"]).append_column(
        "reference_text", cached["text_embedding"]
    )
