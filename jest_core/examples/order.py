"""The order of examples: a pure function of (catalogue, seed, epoch), cut into canonical streams.

In each epoch, the row groups of the catalogue are permuted and their slots concatenated; the sequence is cut into
n_streams equal streams. A stream is read in windows of whole row groups, whose slots are shuffled together. Super-batch
k is made of the next B / n_streams slots of every stream, so it has the same examples on any number of learners.

A row has a slot for each time that it occurs in an epoch: its multiplicity in the catalogue times the weight of its
source. Every epoch has the same number of slots. Where n_streams does not divide it, streams differ by one slot, and
each stream continues with its next epoch when one is finished: nothing is dropped at the end of an epoch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from jest_core import noise
from jest_core.noise import Purpose

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Rate:
    """How often the slots of a source occur: its n_slots slots of weight 1 occur n_offered times an epoch, in total.

    Slot j occurs floor(w (j + epoch + 1)) - floor(w (j + epoch)) times, w = n_offered / n_slots: evenly spread, and
    over many epochs equally often for all slots.
    """

    n_offered: int
    n_slots: int

    def before(self, x: Integers) -> Integers:
        """floor(w x), exactly, for x and n_slots below 2^40."""
        whole, part = divmod(self.n_offered, self.n_slots)
        high, low = x >> 20, x & 0xFFFFF
        quotient, rest = np.divmod(part * high, self.n_slots)
        return x * whole + (quotient << 20) + ((rest << 20) + part * low) // self.n_slots

    def times(self, slot: Integers, epoch: int) -> Integers:
        """How often each slot occurs in an epoch."""
        return self.before(slot + epoch + 1) - self.before(slot + epoch)

    def earlier(self, slot: Integers, epoch: int) -> Integers:
        """How often each slot occurred in the epochs before."""
        return self.before(slot + epoch) - self.before(slot)


@dataclass(frozen=True)
class Piece:
    """Consecutive slots of one row group: numbers start to stop of those that it has in an epoch."""

    shard: int
    row_group: int
    start: int
    stop: int
    first_slot: int = 0  # number of the row group's first slot among the slots of weight 1 of its source
    rate: Rate = Rate(1, 1)

    def rows(self, multiplicity: Integers, epoch: int) -> tuple[Integers, Integers]:
        """The rows of the row group in this piece, and the occurrence of each: no row has the same occurrence twice.

        multiplicity: of each row, 0 where it is dropped. Where the weight of the source is a whole number, the
        occurrence counts the row's earlier slots. Raises ValueError where the multiplicities are not those that the
        order was made with.
        """
        row = np.repeat(np.arange(len(multiplicity)), multiplicity)
        copy = np.arange(len(row)) - np.repeat(np.cumsum(multiplicity) - multiplicity, multiplicity)
        slot = self.first_slot + np.arange(len(row))
        times = self.rate.times(slot, epoch)
        if times.sum() < self.stop:
            raise ValueError(f"a row group has {times.sum()} slots where the order counts {self.stop}")
        again = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
        occurrence = (np.repeat(self.rate.earlier(slot, epoch), times) + again) * np.repeat(
            multiplicity[row], times
        ) + np.repeat(copy, times)
        part = slice(self.start, self.stop)
        return np.repeat(row, times)[part], occurrence[part]


@dataclass(frozen=True)
class Window:
    """Slots of one stream that are read and shuffled together."""

    stream: int
    epoch: int
    number: int  # among the windows of this stream and epoch
    first_row: int  # position of its first slot in the stream, over all epochs
    pieces: tuple[Piece, ...]
    seed: int

    def __len__(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)

    def permutation(self) -> Integers:
        """The order of the concatenated slots of the pieces in the stream."""
        return noise.permutation(len(self), self.seed, Purpose.ROWS, self.epoch, self.stream, self.number)


class Order:
    """The streams over a catalogue's slots.

    shards, row_groups, n_slots, sources: one entry per row group of the catalogue, in its order; row groups without a
    kept row are skipped. n_slots: sums of multiplicities. weights: one per source; all 1 if not given.
    Raises ValueError where an epoch has fewer slots than there are streams.
    """

    def __init__(
        self,
        shards: Integers,
        row_groups: Integers,
        n_slots: Integers,
        *,
        seed: int,
        n_streams: int,
        window_rows: int,
        sources: Integers | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        used = n_slots > 0
        self.shards, self.row_groups, self.n_slots = shards[used], row_groups[used], n_slots[used]
        self.sources = np.zeros_like(self.shards) if sources is None else sources[used]
        self.seed, self.n_streams, self.window_rows = seed, n_streams, window_rows
        self.first_slots = np.zeros_like(self.n_slots)
        self.rates = []
        for source in range(int(self.sources.max(initial=0)) + 1):
            members = np.flatnonzero(self.sources == source)
            ends = np.cumsum(self.n_slots[members])
            self.first_slots[members] = ends - self.n_slots[members]
            n = int(ends[-1]) if len(members) else 0
            self.rates.append(Rate(round(n * (weights[source] if weights else 1)), max(n, 1)))
        self.n_rows = sum(rate.n_offered for rate in self.rates)
        if self.n_rows < n_streams:
            raise ValueError(
                f"the catalogue keeps {self.n_rows} rows an epoch, fewer than n_streams {n_streams}: keep more, or "
                "lower data.n_streams"
            )
        self.cuts = np.arange(n_streams + 1) * self.n_rows // n_streams
        self._epochs: dict[int, tuple[Integers, Integers]] = {}

    def stream_length(self, stream: int) -> int:
        """Slots of a stream in one epoch."""
        return int(self.cuts[stream + 1] - self.cuts[stream])

    def windows(self, stream: int, first_row: int) -> Iterator[Window]:
        """The windows of a stream, without end, from the window that contains slot `first_row` on."""
        length = self.stream_length(stream)
        epoch = first_row // length
        while True:
            yield from self._epoch_windows(stream, epoch, first_row)
            epoch += 1

    def _permuted(self, epoch: int) -> tuple[Integers, Integers]:
        """The row groups of an epoch in their order, and where the slots of each end; cached for two epochs."""
        if epoch not in self._epochs:
            counts = np.zeros_like(self.n_slots)
            for source, rate in enumerate(self.rates):
                members = self.sources == source
                first = self.first_slots[members] + epoch
                counts[members] = rate.before(first + self.n_slots[members]) - rate.before(first)
            groups = noise.permutation(len(self.n_slots), self.seed, Purpose.ROW_GROUPS, epoch)
            self._epochs = dict([*self._epochs.items(), (epoch, (groups, np.cumsum(counts[groups])))][-2:])
        return self._epochs[epoch]

    def _epoch_windows(self, stream: int, epoch: int, first_row: int) -> Iterator[Window]:
        groups, ends = self._permuted(epoch)
        low, high = int(self.cuts[stream]), int(self.cuts[stream + 1])
        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(ends, high, side="left"))
        starts = np.concatenate([ends[first - 1 : first] if first else [0], ends[first:last]])
        groups, ends = groups[first : last + 1], ends[first : last + 1]
        piece_starts, piece_stops = np.maximum(starts, low), np.minimum(ends, high)
        # a window begins with the piece in which the stream passes the next multiple of window_rows
        numbers = (piece_starts - low) // self.window_rows
        heads = np.flatnonzero(np.diff(numbers, prepend=-1))
        bounds = [*heads.tolist(), len(numbers)]
        offset = epoch * (high - low)  # of the epoch in the whole stream
        for head, tail in pairwise(bounds):
            if offset + piece_stops[tail - 1] - low <= first_row:
                continue
            pieces = tuple(
                Piece(
                    int(self.shards[g]),
                    int(self.row_groups[g]),
                    int(piece_starts[i] - starts[i]),
                    int(piece_stops[i] - starts[i]),
                    int(self.first_slots[g]),
                    self.rates[self.sources[g]],
                )
                for i, g in enumerate(groups[head:tail], start=head)
                if piece_stops[i] > piece_starts[i]
            )
            if pieces:
                first_of_window = offset + int(piece_starts[head] - low)
                yield Window(stream, epoch, int(numbers[head]), first_of_window, pieces, self.seed)
