from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jest_core.examples.order import Order, Rate


def make(kept: list[int], n_streams: int, window_rows: int, seed: int = 0, **options) -> Order:
    n = np.array(kept)
    return Order(
        np.arange(len(n)) // 3,
        np.arange(len(n)) % 3,
        n,
        seed=seed,
        n_streams=n_streams,
        window_rows=window_rows,
        **options,
    )


def slots(order: Order, stream: int, first: int, n: int, multiplicity=None) -> list[tuple[int, int, int, int]]:
    """(shard, row group, row, occurrence) of slots first .. first + n of a stream."""
    given = {} if multiplicity is None else multiplicity
    kept = {(int(s), int(g)): int(k) for s, g, k in zip(order.shards, order.row_groups, order.n_slots, strict=True)}
    out: list[tuple[int, int, int, int]] = []
    for window in order.windows(stream, first):
        flat = []
        for p in window.pieces:
            m = given.get((p.shard, p.row_group), np.ones(kept[p.shard, p.row_group], dtype=np.int64))
            row, occurrence = p.rows(m, window.epoch)
            flat += [(p.shard, p.row_group, int(r), int(o)) for r, o in zip(row, occurrence, strict=True)]
        shuffled = [flat[i] for i in window.permutation()]
        out += shuffled[max(0, first - window.first_row) :]
        if len(out) >= n:
            return out[:n]
    raise AssertionError("a stream ended")


def epoch_of(order: Order, epoch: int, multiplicity=None) -> list[tuple[int, int, int, int]]:
    """The slots of all streams in one epoch."""
    lengths = [order.stream_length(s) for s in range(order.n_streams)]
    return [x for s, n in enumerate(lengths) for x in slots(order, s, epoch * n, n, multiplicity)]


catalogues = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda kept: sum(kept) >= 4)


@settings(max_examples=60, deadline=None)
@given(kept=catalogues, n_streams=st.integers(1, 4), window_rows=st.integers(1, 40), epoch=st.integers(0, 2))
def test_an_epoch_of_all_streams_is_every_row_once(kept, n_streams, window_rows, epoch):
    rows = epoch_of(make(kept, n_streams, window_rows), epoch)
    expected = [(g // 3, g % 3, i, epoch) for g, n in enumerate(kept) for i in range(n)]
    assert sorted(rows) == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(
    kept=catalogues, n_streams=st.integers(1, 4), window_rows=st.integers(1, 40), epoch=st.integers(0, 2),
    offset=st.sampled_from([-1, 0, 1]) | st.integers(-40, 40),
)  # fmt: skip
def test_a_stream_resumed_at_any_cursor_gives_the_remaining_rows(kept, n_streams, window_rows, epoch, offset):
    """Most cursors are next to the border of an epoch, where a row is easily skipped or repeated."""
    order = make(kept, n_streams, window_rows)
    first = max(0, epoch * order.stream_length(n_streams - 1) + offset)
    whole = slots(order, n_streams - 1, 0, first + 20)
    fresh = make(kept, n_streams, window_rows)  # as after a restart, without any state
    assert slots(fresh, n_streams - 1, first, 20) == whole[first:]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n_streams=st.integers(1, 4), window_rows=st.integers(1, 40))
def test_a_row_occurs_as_often_as_its_multiplicity(data, n_streams, window_rows):
    groups = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=8))
    multiplicity = {(g // 3, g % 3): np.array(m) for g, m in enumerate(groups)}
    if sum(map(sum, groups)) < n_streams:
        return
    order = make([sum(m) for m in groups], n_streams, window_rows)
    offered = [x for epoch in range(3) for x in epoch_of(order, epoch, multiplicity)]
    times = Counter((s, g, r) for s, g, r, _ in offered)
    assert times == Counter({(s, g, r): 3 * int(m) for (s, g), ms in multiplicity.items() for r, m in enumerate(ms)})
    # occurrence numbers count a row's earlier offers: over three epochs those of multiplicity m are 0 .. 3 m - 1
    assert sorted(offered) == sorted({(s, g, r, o) for (s, g, r), n in times.items() for o in range(n)})


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 1.0, 1.7, 2.0, 3.5]), min_size=3, max_size=3),
    n_streams=st.integers(1, 3),
)
def test_source_weights_apply_in_every_epoch_and_to_every_row(sizes, weights, n_streams):
    kept = [n for source in sizes for n in source]
    sources = np.array([i for i, source in enumerate(sizes) for _ in source])
    weights = weights[: len(sizes)]
    totals = [round(sum(source) * w) for source, w in zip(sizes, weights, strict=True)]
    if sum(totals) < n_streams:
        return
    order = make(kept, n_streams, 16, sources=sources, weights=weights)
    seen: Counter[tuple[int, int, int]] = Counter()
    offered = []
    n_epochs = 6
    for epoch in range(n_epochs):
        rows = epoch_of(order, epoch)
        offered += rows
        seen.update(x[:3] for x in rows)
        by_source = Counter(int(sources[3 * s + g]) for s, g, _, _ in rows)
        assert [by_source[i] for i in range(len(sizes))] == totals
    assert len(set(offered)) == len(offered), "an occurrence came twice"
    for i, source in enumerate(sizes):
        counts = [seen[g // 3, g % 3, r] for g in np.flatnonzero(sources == i) for r in range(kept[g])]
        assert max(counts) - min(counts) <= 1, "one row occurred more often than another"
        assert sum(counts) == n_epochs * round(sum(source) * weights[i])


@given(n_offered=st.integers(0, 1 << 42), n_slots=st.integers(1, (1 << 40) - 1), x=st.integers(0, (1 << 40) - 1))
def test_shares_of_slots_do_not_overflow(n_offered, n_slots, x):
    if n_offered // n_slots * x >= 1 << 62:
        return
    assert Rate(n_offered, n_slots).before(np.array([x]))[0] == int(Fraction(n_offered * x, n_slots))


def test_another_seed_or_epoch_gives_another_order():
    order = make([20] * 6, 2, 30)
    first = [x[:3] for x in slots(order, 0, 0, 60)]
    assert [x[:3] for x in slots(make([20] * 6, 2, 30, seed=1), 0, 0, 60)] != first
    assert [x[:3] for x in slots(order, 0, 60, 60)] != first


def test_windows_mix_row_groups_and_streams_differ_by_one_row():
    order = make([10] * 10, 3, 40)
    window = next(order.windows(0, 0))
    assert len({(p.shard, p.row_group) for p in window.pieces}) >= 3
    assert sorted(order.stream_length(s) for s in range(3)) == [33, 33, 34]


def test_nearly_every_row_group_is_read_by_one_window():
    order = make([10] * 30, 3, 40)
    pieces = [p for s in range(3) for w in islice(order.windows(s, 0), 3) if w.epoch == 0 for p in w.pieces]
    seen = [(p.shard, p.row_group) for p in pieces]
    assert len(seen) - len(set(seen)) <= 2


def test_too_few_rows_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"keeps 2 rows an epoch, fewer than n_streams 4.*lower data\.n_streams"):
        make([2], 4, 10)


def test_a_row_group_with_fewer_rows_than_planned_is_an_error():
    piece = next(make([10], 1, 10).windows(0, 0)).pieces[0]
    with pytest.raises(ValueError, match="9 slots where the order counts 10"):
        piece.rows(np.ones(9, dtype=np.int64), 0)


def test_the_order_is_pinned():
    """A change here would break the resume of every run begun with an earlier version: its stream would differ."""
    pinned = [(1, 0, 3), (0, 0, 1), (0, 0, 0), (0, 0, 1), (0, 0, 3), (0, 2, 2)]
    assert [x[:3] for x in slots(make([4] * 5, 2, 8), 0, 7, 6)] == pinned
