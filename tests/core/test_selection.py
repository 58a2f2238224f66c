import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch.nn.functional import normalize

from jest_core.learnability import ConditionalScores, batch_score, pair_scores, signed_models
from jest_core.selection import Embeddings, select
from tests import oracles
from tests.processes import run_learners


def model(n: int, width: int, seed: int, scale: float = 10.0, bias: float = -8.0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    image = normalize(torch.randn(n, width, generator=generator), dim=1)
    text = normalize(torch.randn(n, width, generator=generator) + image, dim=1)
    return Embeddings(image, text, scale, bias)


def uids(n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2**64, (n, 2), dtype=np.uint64)


def pick(learner, reference, b, **settings):
    n = len(learner if learner is not None else reference)
    defaults = {"n_chunks": 4, "uids": uids(n), "seed": 0, "step": 0}
    return select(learner, reference, sub_batch_size=b, **(defaults | settings))


@pytest.mark.parametrize("criterion", ["learnability", "hard", "easy"])
def test_draw_scores_match_algorithm_1_as_plain_loops(criterion: str):
    learner, reference = model(40, 8, 0), model(40, 6, 1, 15.0, -5.0)
    matrix = [[0.0] * 40 for _ in range(40)]
    for sign, m in signed_models(learner, reference, criterion):
        losses = oracles.sigmoid_pair_losses(m.image.tolist(), m.text.tolist(), m.logit_scale, m.logit_bias)
        matrix = [[a + sign * b for a, b in zip(x, y, strict=True)] for x, y in zip(matrix, losses, strict=True)]
    found = pick(learner, reference, 16, criterion=criterion)
    for chunk in range(4):
        expected = oracles.conditional_scores(matrix, found.indices[: 4 * chunk].tolist())
        drawn = found.indices[4 * chunk : 4 * chunk + 4]
        torch.testing.assert_close(
            found.draw_score[4 * chunk : 4 * chunk + 4], torch.tensor(expected).double()[drawn], rtol=1e-4, atol=1e-4
        )
    assert found.sub_batch_score == pytest.approx(oracles.set_score(matrix, found.indices.tolist()), rel=1e-4)
    assert batch_score(learner, reference, found.indices, criterion).item() == pytest.approx(
        found.sub_batch_score, rel=1e-6
    )


def test_softmax_scores_match_plain_loops():
    learner, reference = model(20, 8, 0), model(20, 6, 1, 15.0)
    models = signed_models(learner, reference, "learnability")
    slow = [(sign, m.image.tolist(), m.text.tolist(), m.logit_scale) for sign, m in models]
    scores = ConditionalScores(models, "softmax", tile=7)
    taken = [3, 8, 11]
    torch.testing.assert_close(
        scores(), torch.tensor(oracles.softmax_conditional_scores(slow, [])).double(), rtol=1e-5, atol=1e-5
    )
    for some in (taken[:1], taken[1:]):
        scores.take([m[torch.tensor(some)] for _, m in models])
    torch.testing.assert_close(
        scores(), torch.tensor(oracles.softmax_conditional_scores(slow, taken)).double(), rtol=1e-5, atol=1e-5
    )
    members = torch.tensor([2, 5, 7, 9])
    expected = sum(
        sign * sum(oracles.softmax_losses(m.image[members].tolist(), m.text[members].tolist(), m.logit_scale))
        for sign, m in models
    )
    assert batch_score(learner, reference, members, loss="softmax").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("super_batch", "ratio"), [(163840, 0.8), (65536, 0.5), (327680, 0.9)])
def test_exactly_b_distinct_at_the_papers_ratios(super_batch: int, ratio: float):
    """Scaled by 1/64; int(B (1 - f) / N) would lose examples at f = 0.8 and 0.9."""
    n, b = super_batch // 64, 32768 // 64
    assert round(n * (1 - ratio)) == b
    found = pick(model(n, 4, 0), model(n, 4, 1), b, n_chunks=16)
    assert len(set(found.indices.tolist())) == b
    assert Counter(found.chunk.tolist()) == dict.fromkeys(range(16), b // 16)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(8, 60), n_chunks=st.integers(1, 4), per_chunk=st.integers(1, 2),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    draw=st.sampled_from(["sample", "top_k"]), loss=st.sampled_from(["sigmoid", "softmax"]),
)  # fmt: skip
def test_distinct_and_valid_for_all_sizes(n, n_chunks, per_chunk, dtype, draw, loss):
    base = [model(n, 4, 0), model(n, 3, 1)]
    learner, reference = (Embeddings(m.image.to(dtype), m.text.to(dtype), m.logit_scale, m.logit_bias) for m in base)
    valid = torch.arange(n) % 5 != 0
    b = n_chunks * per_chunk
    if b > valid.sum():
        return
    found = pick(learner, reference, b, n_chunks=n_chunks, draw=draw, loss=loss, valid=valid)
    assert len(set(found.indices.tolist())) == b
    assert valid[found.indices].all()


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


def test_ties_are_broken_by_uid_and_not_by_place():
    same = Embeddings(torch.ones(30, 1), torch.ones(30, 1), 10.0, -10.0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    plain = pick(same, None, 4, criterion="hard", draw="top_k", uids=uids(30))
    moved = pick(same, None, 4, criterion="hard", draw="top_k", uids=uids(30)[order.numpy()])
    assert set(order[moved.indices].tolist()) == set(plain.indices.tolist())


def test_equal_models_give_a_uniform_draw():
    m = model(6, 4, 0)
    counts = Counter(i for step in range(3000) for i in pick(m, m, 2, n_chunks=2, step=step).indices.tolist())
    # each of 6 is drawn 1000 times on average, with a standard deviation of 26
    assert all(abs(counts[i] - 1000) < 5 * 26 for i in range(6))


def test_distribution_of_a_small_draw_equals_enumeration():
    """Two chunks of one: P(i, j) = p_i * p(j | i), each a softmax of Algorithm 1's scores."""
    learner, reference = model(4, 3, 0), model(4, 3, 1)
    scores = pair_scores(learner, reference).double()
    n_draws = 4000
    counts = Counter(
        tuple(pick(learner, reference, 2, n_chunks=2, step=step).indices.tolist()) for step in range(n_draws)
    )
    first = torch.softmax(scores.diagonal(), 0)
    for i, j in permutations(range(4), 2):
        conditional = scores.diagonal() + scores[i] + scores[:, i]
        conditional[i] = -math.inf
        p = (first[i] * torch.softmax(conditional, 0)[j]).item()
        assert abs(counts[i, j] / n_draws - p) < 5 * math.sqrt(p * (1 - p) / n_draws) + 1e-3


def test_noise_is_fresh_for_each_chunk_step_and_occurrence():
    """Noise shared by the chunks would draw, with equal models, the n largest noises in order: another distribution."""
    m = model(200, 4, 0)
    chunked = pick(m, m, 40, n_chunks=10).indices.tolist()
    assert chunked != pick(m, m, 40, n_chunks=1).indices.tolist()
    assert chunked != pick(m, m, 40, n_chunks=10, step=1).indices.tolist()
    assert chunked != pick(m, m, 40, n_chunks=10, occurrences=torch.ones(200, dtype=torch.int64)).indices.tolist()


def test_selection_depends_on_the_reference():
    learner = model(60, 8, 0)
    assert pick(learner, model(60, 8, 1), 16).indices.tolist() != pick(learner, model(60, 8, 2), 16).indices.tolist()


def _shared_selection(
    rank: int, size: int, group, cuts: list[int], draw: str, loss: str
) -> tuple[list[int], list[int], float]:
    learner, reference = model(96, 8, 0), model(96, 6, 1)
    share = slice(cuts[rank], cuts[rank + 1])
    valid = torch.arange(96) % 7 != 0
    found = select(
        learner[share], reference[share], sub_batch_size=24, n_chunks=4, uids=uids(96)[share], seed=0, step=3,
        group=group, draw=draw, loss=loss, valid=valid[share],
    )  # fmt: skip
    return found.indices.tolist(), (found.local(rank) + cuts[rank]).tolist(), found.sub_batch_score


@pytest.mark.parametrize(("cuts", "draw", "loss"), [
    ([0, 48, 96], "sample", "sigmoid"), ([0, 24, 48, 72, 96], "sample", "sigmoid"),
    ([0, 3, 3, 90, 96], "sample", "sigmoid"),
    ([0, 10, 96], "top_k", "sigmoid"), ([0, 10, 96], "sample", "softmax"),
])  # fmt: skip
def test_the_same_set_is_selected_on_any_number_of_learners(cuts: list[int], draw: str, loss: str):
    valid = torch.arange(96) % 7 != 0
    alone = pick(model(96, 8, 0), model(96, 6, 1), 24, step=3, draw=draw, loss=loss, valid=valid)
    results = run_learners(_shared_selection, len(cuts) - 1, cuts, draw, loss)
    for indices, _, score in results:
        assert indices == alone.indices.tolist()
        assert score == pytest.approx(alone.sub_batch_score, rel=1e-6)
    assert sorted(i for _, own, _ in results for i in own) == sorted(alone.indices.tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_chunks": 5}, "not a positive multiple of n_chunks 5"),
        ({"sub_batch_size": 0}, "sub_batch_size 0"),
        ({"sub_batch_size": 40, "valid": torch.arange(40) < 30}, "exceeds the 30 valid examples"),
        ({"learner": None}, "needs the learner's embeddings"),
        ({"reference": None}, "needs the reference's embeddings"),
        ({"reference": model(39, 8, 1)}, "40 embeddings"),
        ({"uids": uids(39)}, "40 embeddings, 39 uids"),
        ({"uids": ["abc"] * 40}, "does not have 32 hex digits"),
        ({"gain": math.nan}, "gain"),
        (
            {"learner": Embeddings(torch.full((40, 8), torch.nan), torch.ones(40, 8), 10.0, 0.0)},
            "40 examples have NaN or infinite",
        ),
        (
            {"learner": Embeddings(torch.ones(40, 8, dtype=torch.int64), torch.ones(40, 8), 10.0, 0.0)},
            "not floating point",
        ),
    ],
)
def test_impossible_selections_are_refused_with_the_reason(settings: dict, message: str):
    if settings.get("reference", 0) is not None and len(settings.get("reference", range(40))) == 39:
        message = "differ in number"
    arguments = {
        "learner": model(40, 8, 0),
        "reference": model(40, 8, 1),
        "sub_batch_size": 16,
        "n_chunks": 4,
        "uids": uids(40),
        "seed": 0,
        "step": 0,
    }
    arguments |= settings
    with pytest.raises(ValueError, match=message):
        select(arguments.pop("learner"), arguments.pop("reference"), **arguments)


def test_uniform_is_not_a_selection():
    """Refused by select, or by the shape checks before it where they are on."""
    with pytest.raises((ValueError, TypeCheckError), match="uniform"):
        pick(model(40, 8, 0), model(40, 8, 1), 16, method="uniform")


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
