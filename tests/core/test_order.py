from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jest_core.order import Order


def make(kept: list[int], n_streams: int, window_rows: int, seed: int = 0) -> Order:
    n = np.array(kept)
    return Order(
        np.arange(len(n)) // 3, np.arange(len(n)) % 3, n, seed=seed, n_streams=n_streams, window_rows=window_rows
    )


def rows(order: Order, stream: int, first: int, n: int) -> list[tuple[int, int, int]]:
    """(shard, row group, kept row) of rows first .. first + n of a stream."""
    out: list[tuple[int, int, int]] = []
    for window in order.windows(stream, first):
        flat = [(p.shard, p.row_group, i) for p in window.pieces for i in range(p.start, p.stop)]
        shuffled = [flat[i] for i in window.permutation()]
        out += shuffled[max(0, first - window.first_row) :]
        if len(out) >= n:
            return out[:n]
    raise AssertionError("streams are endless")


catalogues = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda kept: sum(kept) >= 4)


@settings(max_examples=60, deadline=None)
@given(kept=catalogues, n_streams=st.integers(1, 4), window_rows=st.integers(1, 40), epoch=st.integers(0, 2))
def test_an_epoch_of_all_streams_is_every_row_once(kept, n_streams, window_rows, epoch):
    order = make(kept, n_streams, window_rows)
    found = []
    for s in range(n_streams):
        length = order.stream_length(s)
        found += rows(order, s, epoch * length, length)
    expected = [(g // 3, g % 3, i) for g, n in enumerate(kept) for i in range(n)]
    assert sorted(found) == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(kept=catalogues, n_streams=st.integers(1, 4), window_rows=st.integers(1, 40), first=st.integers(0, 150))
def test_the_tail_after_any_cursor_is_the_rest(kept, n_streams, window_rows, first):
    order = make(kept, n_streams, window_rows)
    whole = rows(order, n_streams - 1, 0, first + 20)
    assert rows(order, n_streams - 1, first, 20) == whole[first:]


def test_seeds_and_epochs_give_other_orders():
    order = make([20] * 6, 2, 30)
    first = rows(order, 0, 0, 60)
    assert rows(make([20] * 6, 2, 30, seed=1), 0, 0, 60) != first
    assert rows(order, 0, 60, 60) != first


def test_windows_mix_row_groups_and_streams_differ_by_one_row():
    order = make([10] * 10, 3, 40)
    window = next(order.windows(0, 0))
    assert len({(p.shard, p.row_group) for p in window.pieces}) >= 3
    assert sorted(order.stream_length(s) for s in range(3)) == [33, 33, 34]


def test_each_row_group_is_read_by_one_window_but_at_the_cuts():
    order = make([10] * 30, 3, 40)
    pieces = [p for s in range(3) for w in islice(order.windows(s, 0), 3) if w.epoch == 0 for p in w.pieces]
    seen = [(p.shard, p.row_group) for p in pieces]
    assert len(seen) - len(set(seen)) <= 2


def test_too_few_rows_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"keeps 2 rows, fewer than n_streams 4.*lower data\.n_streams"):
        make([2], 4, 10)


def test_the_order_is_pinned():
    """A change here means that no run begun with an earlier version resumes on its own stream."""
    assert rows(make([4] * 5, 2, 8), 0, 7, 6) == [(1, 0, 3), (0, 0, 1), (0, 0, 0), (0, 0, 1), (0, 0, 3), (0, 2, 2)]
