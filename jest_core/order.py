"""The order of examples: a pure function of (catalogue, seed, epoch), cut into canonical streams.

Each epoch, the row groups of the catalogue are permuted and their kept rows laid end to end; the sequence is cut into
n_streams equal streams. A stream is read in windows of whole row groups, whose rows are shuffled together. Super-batch
k is made of the next B / n_streams rows of every stream, so it holds the same examples on any number of learners.

Where an epoch does not divide by n_streams, streams differ by one row, and each goes on into its own next epoch when it
is through: no row is dropped, and every row comes once an epoch of its stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from jest_core import noise

_ROW_GROUPS, _ROWS = 0, 1  # what a permutation is for: keeps the two families of random numbers apart


@dataclass(frozen=True)
class Piece:
    """Consecutive kept rows of one row group: the start-th to the stop-th of those that the catalogue keeps."""

    shard: int
    row_group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Rows of one stream that are read and shuffled together."""

    stream: int
    epoch: int
    number: int  # of the windows of this stream and epoch
    first_row: int  # its first row's place in the whole stream, all epochs counted
    pieces: tuple[Piece, ...]
    seed: int

    def __len__(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def permutation(self) -> NDArray[np.int64]:
        """The order in which the rows of the pieces, laid end to end, come in the stream."""
        return _permutation(len(self), self.seed, _ROWS, self.epoch, self.stream, self.number)


def _permutation(n: int, *context: int) -> NDArray[np.int64]:
    """0 .. n - 1, shuffled by our own hash of the context: no release of NumPy can change a run's stream."""
    counters = torch.arange(n)
    return torch.argsort(noise.hashes(torch.stack([counters, counters], 1), counters, *context), stable=True).numpy()


class Order:
    """The streams over a catalogue's kept rows.

    shards, row_groups, n_kept: one entry per row group of the catalogue; those that keep no row are skipped.
    """

    def __init__(
        self,
        shards: NDArray[np.int64],
        row_groups: NDArray[np.int64],
        n_kept: NDArray[np.int64],
        *,
        seed: int,
        n_streams: int,
        window_rows: int,
    ) -> None:
        used = n_kept > 0
        self.shards, self.row_groups, self.n_kept = shards[used], row_groups[used], n_kept[used]
        self.seed, self.n_streams, self.window_rows = seed, n_streams, window_rows
        self.n_rows = int(self.n_kept.sum())
        if self.n_rows < n_streams:
            raise ValueError(
                f"the catalogue keeps {self.n_rows} rows, fewer than n_streams {n_streams}: keep more, or lower "
                "data.n_streams"
            )
        self.cuts = np.arange(n_streams + 1) * self.n_rows // n_streams

    def stream_length(self, stream: int) -> int:
        """Rows of a stream in one epoch."""
        return int(self.cuts[stream + 1] - self.cuts[stream])

    def windows(self, stream: int, first_row: int) -> Iterator[Window]:
        """The windows of a stream, endlessly, from the one that holds row `first_row` on."""
        length = self.stream_length(stream)
        epoch = first_row // length
        while True:
            for window in self._epoch_windows(stream, epoch):
                if window.first_row + len(window) > first_row:
                    yield window
            epoch += 1

    def _epoch_windows(self, stream: int, epoch: int) -> Iterator[Window]:
        groups = _permutation(len(self.n_kept), self.seed, _ROW_GROUPS, epoch)
        ends = np.cumsum(self.n_kept[groups])
        low, high = int(self.cuts[stream]), int(self.cuts[stream + 1])
        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(ends, high, side="left"))
        groups, ends = groups[first : last + 1], ends[first : last + 1]
        starts = ends - self.n_kept[groups]
        piece_starts, piece_stops = np.maximum(starts, low), np.minimum(ends, high)
        # a window begins with the piece in which the stream passes the next multiple of window_rows
        numbers = (piece_starts - low) // self.window_rows
        for number in np.unique(numbers):
            members = np.flatnonzero(numbers == number)
            pieces = tuple(
                Piece(
                    int(self.shards[groups[i]]),
                    int(self.row_groups[groups[i]]),
                    int(piece_starts[i] - starts[i]),
                    int(piece_stops[i] - starts[i]),
                )
                for i in members
            )
            first_row = epoch * (high - low) + int(piece_starts[members[0]] - low)
            yield Window(stream, epoch, int(number), first_row, pieces, self.seed)
