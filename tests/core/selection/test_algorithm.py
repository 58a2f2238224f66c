import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jest_core import losses, noise
from jest_core.collectives import Learners
from jest_core.selection import Embeddings, batch_score, select
from jest_core.selection.algorithm import Ties, draw_top
from jest_core.selection.arguments import uid_words
from jest_core.selection.learnability import signed_models
from tests import oracles
from tests.core.selection.draws import model, pick, uids
from tests.processes import run_learners
from tests.synthetic import structured_models


@pytest.mark.parametrize("criterion", ["learnability", "hard", "easy"])
def test_draw_scores_match_algorithm_1_as_plain_loops(criterion: str):
    learner, reference = model(40, 8, 0), model(40, 6, 1, 15.0, -5.0)
    matrix = [[0.0] * 40 for _ in range(40)]
    for sign, m in signed_models(learner, reference, criterion):
        losses = oracles.sigmoid_pair_losses(m.image.tolist(), m.text.tolist(), m.logit_scale, m.logit_bias)
        matrix = [[a + sign * b for a, b in zip(x, y, strict=True)] for x, y in zip(matrix, losses, strict=True)]
    selection = pick(learner, reference, 16, criterion=criterion)
    for chunk in range(4):
        expected = oracles.conditional_scores(matrix, selection.indices[: 4 * chunk].tolist())
        drawn = selection.indices[4 * chunk : 4 * chunk + 4]
        torch.testing.assert_close(
            selection.draw_score[4 * chunk : 4 * chunk + 4],
            torch.tensor(expected).double()[drawn],
            rtol=2e-6,
            atol=2e-5,
        )
    score = selection.sub_batch_score
    assert score == pytest.approx(oracles.set_score(matrix, selection.indices.tolist()), rel=1e-5)
    assert batch_score(learner, reference, selection.indices, criterion).item() == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize(("super_batch", "ratio"), [(163840, 0.8), (65536, 0.5), (327680, 0.9)])
def test_exactly_b_distinct_at_the_papers_ratios(super_batch: int, ratio: float):
    """Scaled by 1/64; int(B (1 - f) / N) would lose examples at f = 0.8 and 0.9."""
    n, b = super_batch // 64, 32768 // 64
    assert round(n * (1 - ratio)) == b
    selection = pick(model(n, 4, 0), model(n, 4, 1), b, n_chunks=16)
    assert len(set(selection.indices.tolist())) == b
    assert Counter(selection.chunk.tolist()) == dict.fromkeys(range(16), b // 16)


@settings(max_examples=40, deadline=None)
@given(
    n_chunks=st.integers(1, 5), per_chunk=st.integers(1, 9), ratio=st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.9]),
    dtypes=st.tuples(*[st.sampled_from([torch.float16, torch.bfloat16, torch.float32])] * 2),
    draw=st.sampled_from(["sample", "top_k"]), loss=st.sampled_from(["sigmoid", "softmax"]),
    precision=st.sampled_from(["exact", "fast"]), masked=st.integers(0, 3), tile=st.integers(1, 50),
)  # fmt: skip
def test_distinct_and_valid_for_all_sizes(n_chunks, per_chunk, ratio, dtypes, draw, loss, precision, masked, tile):
    """Down to super-batches in which every valid slot is needed."""
    b = n_chunks * per_chunk
    n = round(b / (1 - ratio)) + masked
    learner, reference = (
        Embeddings(m.image.to(dtype), m.text.to(dtype), m.logit_scale, m.logit_bias)
        for m, dtype in zip((model(n, 4, 0), model(n, 3, 1)), dtypes, strict=True)
    )
    valid = torch.arange(n) >= masked
    selection = pick(
        learner, reference, b, n_chunks=n_chunks, draw=draw, loss=loss, valid=valid, precision=precision, tile=tile
    )
    assert len(set(selection.indices.tolist())) == b
    assert valid[selection.indices].all()
    assert math.isfinite(selection.sub_batch_score)


def test_joint_with_one_chunk_equals_independent():
    learner, reference = model(50, 8, 0), model(50, 8, 1)
    joint = pick(learner, reference, 12, n_chunks=1)
    independent = pick(learner, reference, 12, method="independent")
    assert joint.indices.tolist() == independent.indices.tolist()


def test_swapping_image_and_text_changes_nothing():
    learner, reference = model(50, 8, 0), model(50, 8, 1)
    swapped = [Embeddings(m.text, m.image, m.logit_scale, m.logit_bias) for m in (learner, reference)]
    assert pick(learner, reference, 12).indices.tolist() == pick(*swapped, 12).indices.tolist()


def test_permuting_rows_permutes_the_selection():
    learner, reference, names = model(50, 8, 0), model(50, 8, 1), uids(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    for draw in ("sample", "top_k"):
        plain = pick(learner, reference, 12, uids=names, draw=draw)
        moved = pick(learner[order], reference[order], 12, uids=names[order.numpy()], draw=draw)
        assert order[moved.indices].tolist() == plain.indices.tolist()


def test_ties_are_broken_by_uid_and_not_by_position():
    same = Embeddings(torch.ones(30, 1), torch.ones(30, 1), 10.0, -10.0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    plain = pick(same, None, 4, criterion="hard", draw="top_k", uids=uids(30))
    moved = pick(same, None, 4, criterion="hard", draw="top_k", uids=uids(30)[order.numpy()])
    assert set(order[moved.indices].tolist()) == set(plain.indices.tolist())


def test_equal_models_give_a_uniform_draw():
    """Six pictures and captions, each in 100 examples: one call draws as many as a hundred calls on six examples."""
    m = model(6, 4, 0)[torch.arange(600) % 6]
    drawn = torch.stack([pick(m, m, 200, n_chunks=2, step=step, uids=uids(600)).indices for step in range(15)])
    # each of the six is drawn 500 times on average, with a standard deviation of 16.7 without replacement
    counts = torch.bincount((drawn % 6).flatten(), minlength=6)
    assert ((counts - 500).abs() < 5 * 16.7).all()
    # an example is drawn in a third of the steps; in all 15 with a probability of 7e-8
    assert torch.bincount(drawn.flatten(), minlength=600).max() < 15


def test_noise_is_fresh_for_each_chunk_step_and_occurrence():
    m = model(200, 4, 0)
    chunked = pick(m, m, 40, n_chunks=10).indices.tolist()
    assert chunked != pick(m, m, 40, n_chunks=1).indices.tolist()
    assert chunked != pick(m, m, 40, n_chunks=10, step=1).indices.tolist()
    assert chunked != pick(m, m, 40, n_chunks=10, occurrences=torch.ones(200, dtype=torch.int64)).indices.tolist()


def test_selection_depends_on_the_reference():
    learner = model(60, 8, 0)
    assert pick(learner, model(60, 8, 1), 16).indices.tolist() != pick(learner, model(60, 8, 2), 16).indices.tolist()


def _models(dtype: torch.dtype) -> tuple[Embeddings, Embeddings]:
    learner, reference = model(96, 8, 0), model(96, 6, 1)
    return Embeddings(learner.image.to(dtype), learner.text.to(dtype), 10.0, -8.0), reference


def _shared_selection(
    rank: int, size: int, group, cuts: list[int], draw: str, loss: str, dtype: torch.dtype
) -> tuple[list[int], list[int], float]:
    learner, reference = _models(dtype)
    share = slice(cuts[rank], cuts[rank + 1])
    valid = torch.arange(96) % 7 != 0
    selection = select(
        learner[share], reference[share], sub_batch_size=24, n_chunks=4, uids=uids(96)[share], seed=0, step=3,
        group=group, draw=draw, loss=loss, valid=valid[share],
    )  # fmt: skip
    return selection.indices.tolist(), (selection.local(rank) + cuts[rank]).tolist(), selection.sub_batch_score


@pytest.mark.parametrize(("cuts", "draw", "loss", "dtype"), [
    ([0, 48, 96], "sample", "sigmoid", torch.float32), ([0, 24, 48, 72, 96], "sample", "sigmoid", torch.float32),
    ([0, 3, 3, 90, 96], "sample", "sigmoid", torch.float32), ([0, 10, 96], "top_k", "sigmoid", torch.float32),
    ([0, 10, 96], "sample", "softmax", torch.float32), ([0, 30, 96], "sample", "sigmoid", torch.bfloat16),
    ([0, 30, 31, 96], "sample", "sigmoid", torch.float16),
])  # fmt: skip
def test_the_same_set_is_selected_on_any_number_of_learners(cuts: list[int], draw: str, loss: str, dtype: torch.dtype):
    valid = torch.arange(96) % 7 != 0
    alone = pick(*_models(dtype), 24, step=3, draw=draw, loss=loss, valid=valid)
    results = run_learners(_shared_selection, len(cuts) - 1, cuts, draw, loss, dtype)
    for indices, _, score in results:
        assert indices == alone.indices.tolist()
        assert score == pytest.approx(alone.sub_batch_score, rel=1e-6)
    assert sorted(i for _, local, _ in results for i in local) == sorted(alone.indices.tolist())


def _received_bytes(rank: int, size: int, group) -> int:
    """Bytes of embeddings that this learner received from all learners, itself included, in reductions of rows."""
    received, reduce = 0, torch.distributed.all_reduce

    def counting(tensor, group=None):
        nonlocal received
        received += tensor.numel() * tensor.element_size() if tensor.ndim == 2 else 0
        reduce(tensor, group=group)

    torch.distributed.all_reduce = counting
    share = slice(rank * 100, (rank + 1) * 100)
    learner, reference = model(200, 8, 0)[share], model(200, 6, 1)[share]
    select(learner, reference, sub_batch_size=40, n_chunks=4, uids=uids(200)[share], seed=0, step=0, group=group)
    return received


def test_only_newly_drawn_embeddings_are_communicated():
    """40 rows: image and text of two models in float32, and the score and two losses in float64."""
    assert run_learners(_received_bytes, 2) == [40 * (2 * (8 + 6) * 4 + 3 * 8)] * 2


def test_adding_a_constant_to_all_scores_changes_no_draw():
    words, times = uid_words(uids(50)), torch.zeros(50, dtype=torch.int64)
    scores = 5 * torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    keys = scores + noise.gumbel(words, times, 0, 0)
    draws = [
        draw_top(keys + constant, 12, Ties.of(words, times), torch.tensor([0, 50]), Learners())[0].tolist()
        for constant in (0.0, 1e3, -1e6)
    ]
    assert draws[0] == draws[1] == draws[2]


def test_a_constant_loss_per_pair_changes_no_selection():
    """An untrained reference gives every pair the logit 0, which adds log(2) to all scores."""
    learner = model(50, 8, 0)
    untrained = Embeddings(learner.image, learner.text, 0.0, 0.0)
    hard = pick(learner, None, 12, criterion="hard")
    assert pick(learner, untrained, 12).indices.tolist() == hard.indices.tolist()


def test_gain_sharpens_a_draw_towards_the_top():
    learner, reference = model(200, 8, 0), model(200, 8, 1)
    best = set(pick(learner, reference, 40, draw="top_k", n_chunks=1).indices.tolist())
    common = [
        len(best & set(pick(learner, reference, 40, gain=g, n_chunks=1).indices.tolist())) for g in (0.0, 1.0, 1e6)
    ]
    assert common[0] < common[1] < common[2] == 40


def test_fast_precision_selects_a_set_as_good(monkeypatch: pytest.MonkeyPatch):
    learner, reference = structured_models(1024, 32)
    monkeypatch.setattr(losses, "has_bfloat16_products", lambda device: True)  # also on processors where they are slow
    for step in range(3):
        sets = [
            pick(learner, reference, 256, n_chunks=8, step=step, precision=precision).indices
            for precision in ("fast", "exact")
        ]
        assert sets[0].tolist() != sets[1].tolist()
        fast, exact = (batch_score(learner, reference, indices).item() for indices in sets)
        assert fast == pytest.approx(exact, rel=5e-3)


def test_embeddings_with_gradients_leave_no_graph():
    learner = model(40, 8, 0)
    learner.image.requires_grad_()
    selection = pick(learner, model(40, 8, 1), 16)
    assert not selection.scores.requires_grad
    assert not selection.draw_score.requires_grad


def test_nothing_of_size_b_by_b_is_built():
    """Peak memory above the inputs stays far below one B x B matrix of float32."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    n = 4096
    with Largest() as largest:
        pick(model(n, 4, 0), model(n, 4, 1), 256, n_chunks=8, tile=128)
    assert largest.numel <= n * 8


def _top_of(rank: int, size: int, group, n: int) -> tuple[list[int], int]:
    share = slice(rank * 3, rank * 3 + 3)
    ties = Ties.of(uid_words(uids(6))[share], torch.zeros(3, dtype=torch.int64))
    keys = torch.tensor([1.0, 5.0, 2.0, 4.0, 0.0, 3.0], dtype=torch.float64)[share]
    positions, top = draw_top(keys, n, ties, torch.tensor([0, 3, 6]), Learners(group))
    return positions.tolist(), len(top)


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_the_largest_keys_of_two_learners_are_drawn_also_none_and_more_than_one_has(n):
    assert run_learners(_top_of, 2, n) == [([1, 3, 5, 2, 0][:n], n)] * 2
