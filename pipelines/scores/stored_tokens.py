"""A caption's tokens as columns beside its scores, read by learners with the same tokenizer.

A caption may change, or `data.columns` name another column of captions, while the uids stay: each row has a checksum of
the caption that was tokenised, and where it is another one now, it is tokenised again.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jest_core import tables
from jest_core.examples.tokenizer import Tokenizer

IDS, CHECKSUM = tables.TOKEN_COLUMNS.names


def pack(tokens: NDArray[np.integer], captions: pa.ChunkedArray) -> dict[str, pa.Array]:
    """Tokens (k, L) and the captions that they are of -> TOKEN_COLUMNS, without the equal tokens that end a row."""
    same = tokens[:, ::-1] == tokens[:, -1:]
    lengths = tokens.shape[1] + 1 - np.where(same.all(1), tokens.shape[1], (~same).argmax(1))
    ids = tokens[np.arange(tokens.shape[1]) < lengths[:, None]].astype(np.uint32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    kind = tables.TOKEN_COLUMNS.field(IDS).type
    return {IDS: pa.ListArray.from_arrays(offsets, pa.array(ids), type=kind), CHECKSUM: checksums(captions)}


def unpack(stored: pa.Table, captions: pa.ChunkedArray, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """TOKEN_COLUMNS by this tokenizer, and the captions of today -> tokens (k, context_length)."""
    lists = stored[IDS].combine_chunks()
    lengths, ids = pc.list_value_length(lists).to_numpy(), lists.flatten().to_numpy()
    stale = np.flatnonzero((checksums(captions).to_numpy() != stored[CHECKSUM].to_numpy()) | (lengths == 0))
    out = np.zeros((len(lengths), tokenizer.context_length), np.int32)
    filled = lengths > 0
    out[filled] = ids[np.cumsum(lengths)[filled] - 1, None]
    out[np.arange(out.shape[1]) < lengths[:, None]] = ids
    if len(stale):
        out[stale] = tokenizer(captions.take(pa.array(stale)).to_pylist())
    return out


def checksums(captions: pa.ChunkedArray) -> pa.Array:
    """CRC-32 of each caption as UTF-8."""
    texts: Sequence[bytes] = captions.cast(pa.large_binary()).to_pylist()
    return pa.array([zlib.crc32(text) for text in texts], pa.uint32())
