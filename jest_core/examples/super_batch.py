"""A learner's share of a super-batch: examples as columns, decoded once, with the reference's cached embeddings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from jest_core import tables
from jest_core.collectives import Learners
from jest_core.tables import SlotStatus


@dataclass(frozen=True)
class Examples:
    """Aligned columns of k examples.

    rows has the columns of `tables.EXAMPLE`: with the encoded image and the caption, which are what is sent to other
    learners. reference_image and reference_text are None where no score cache was read.
    """

    rows: pa.Table
    pixels: UInt8[Tensor, "k 3 H W"]
    tokens: Int[Tensor, "k L"]
    reference_image: Float[Tensor, "k D"] | None = None
    reference_text: Float[Tensor, "k D"] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def column(self, name: str) -> Int[Tensor, " k"]:
        """An integer column of rows, as int64."""
        return torch.from_numpy(self.rows[name].to_numpy().astype(np.int64))

    @property
    def valid(self) -> Bool[Tensor, " k"]:
        """Which slots may be selected."""
        return self.column("status") == SlotStatus.OK

    @property
    def uids(self) -> Int[Tensor, "k 2"]:
        return torch.stack([self.column("uid_high"), self.column("uid_low")], 1)

    def identities(self) -> pa.Table:
        """Which examples these are, for people: uid, occurrence, shard, row, caption and status."""
        rows = self.rows
        uids = tables.uid_to_hex(rows["uid_high"].to_numpy(), rows["uid_low"].to_numpy())
        status = tables.status_labels(rows["status"].to_pylist())
        rest = rows.select(["occurrence", "shard", "row", "caption"])
        return rest.add_column(0, "uid", pa.array(uids)).append_column("status", pa.array(status))

    def __getitem__(self, index: Tensor) -> "Examples":
        pick = index.numpy()

        def maybe(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index]

        return Examples(
            self.rows.take(pa.array(pick)),
            self.pixels[index],
            self.tokens[index],
            maybe(self.reference_image),
            maybe(self.reference_text),
        )

    def split(self, size: int) -> "Iterator[Examples]":
        """Consecutive parts of `size` examples; the last may be shorter. One empty part if there are no examples."""
        return (self[torch.arange(i, min(i + size, len(self)))] for i in range(0, max(1, len(self)), size))


Prepare = Callable[[pa.Table], Examples]


def mask_duplicates(examples: Examples, by: Literal["uid", "image"], learners: Learners) -> Examples:
    """Of the super-batch's valid slots with the same uid, or the same image, mark all but the first as duplicates."""
    keys = examples.uids if by == "uid" else examples.column("content")[:, None]
    counts = learners.counts(len(examples))
    every, valid = learners.gather(keys, counts), learners.gather(examples.valid.to(torch.uint8), counts) > 0
    positions = torch.nonzero(valid)[:, 0].numpy()
    _, firsts = np.unique(every.numpy()[positions], axis=0, return_index=True)
    repeated = valid.numpy().copy()
    repeated[positions[firsts]] = False
    start = sum(counts[: learners.rank])
    status = examples.column("status").numpy()
    status[repeated[start : start + len(examples)]] = SlotStatus.DUPLICATE
    column = examples.rows.schema.get_field_index("status")
    rows = examples.rows.set_column(column, tables.EXAMPLE.field("status"), pa.array(status, pa.uint8()))
    return replace(examples, rows=rows)


def exchange(
    examples: Examples, moves: list[Tensor], prepare: Prepare, learners: Learners, *, decode_all: bool = False
) -> Examples:
    """Send the examples at moves[r] to learner r, encoded, and keep moves[own rank]; `prepare` decodes what arrives.

    The result has the kept examples first, then those that the others sent, in rank order. decode_all: `prepare`
    decodes the kept ones too, because they were scored at another resolution.
    """
    kept = examples[moves[learners.rank]]
    if learners.size == 1:
        return prepare(kept.rows) if decode_all else kept
    outgoing = [
        b"" if r == learners.rank else _to_bytes(examples.rows.take(pa.array(m.numpy()))) for r, m in enumerate(moves)
    ]
    arrived = [_from_bytes(data) for data in learners.exchange(outgoing) if data]
    table = pa.concat_tables([t for t in arrived if len(t)] or [kept.rows.slice(0, 0)])
    if decode_all:
        return prepare(pa.concat_tables([kept.rows, table]))
    if not len(table):
        return kept
    new = prepare(table)
    return Examples(
        pa.concat_tables([kept.rows, table]),
        torch.cat([kept.pixels, new.pixels]),
        torch.cat([kept.tokens, new.tokens]),
    )


def _to_bytes(table: pa.Table) -> bytes:
    if not len(table):
        return b""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _from_bytes(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
