"""A window of the order -> its examples, with their cached reference embeddings: what tasks that read for learners do.

Nothing here imports PyTorch, as nothing in data/rows.py does.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jest_core import run_file
from jest_core.examples.inputs import Inputs
from jest_core.examples.order import Piece
from jest_core.run_file import Run
from jest_core.tables import SlotStatus
from pipelines.base import storage
from pipelines.data.catalogue import Place
from pipelines.data.rows import decoded, encoded
from pipelines.scores import score_cache


def of_window(batch: dict[str, np.ndarray], run_text: str, takes: Inputs) -> pa.Table:
    """One window -> its slots in stream order: encoded and decoded images, tokens, cached reference embeddings."""
    run, window, places = run_file.load(run_text), batch["window"][0], batch["places"][0]
    pieces = [_of_piece(run, piece, places[piece.shard], window.epoch) for piece in window.pieces]
    table = pa.concat_tables(pieces).take(pa.array(window.permutation()))
    return decoded(table, takes)


@storage.retried
def _of_piece(run: Run, piece: Piece, place: Place, epoch: int) -> pa.Table:
    """The slots of a piece, laid end to end."""
    shard = place.open(run.data.columns)
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
            f"{place.path}, row group {piece.row_group}: {error}; was a catalogue or cache written anew?"
        ) from error
    table = encoded(shard, piece.shard, piece.row_group, rows, uids, occurrences)
    if cached is None:
        return table
    cached = cached.take(pa.array(rows))
    return table.append_column("reference_image", cached["image_embedding"]).append_column(
        "reference_text", cached["text_embedding"]
    )
