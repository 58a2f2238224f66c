import dataclasses
import math
import subprocess
import sys
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from jest_core import losses, noise
from jest_core.collectives import Learners
from jest_core.selection.algorithm import Embeddings, draw_top, gibbs_select, select
from jest_core.selection.learnability import batch_score, pair_scores, signed_models
from tests import oracles
from tests.processes import run_learners
from tests.synthetic import structured_models
from tests.synthetic import uids as synthetic_uids


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
            found.draw_score[4 * chunk : 4 * chunk + 4], torch.tensor(expected).double()[drawn], rtol=2e-6, atol=2e-5
        )
    assert found.sub_batch_score == pytest.approx(oracles.set_score(matrix, found.indices.tolist()), rel=1e-5)
    assert batch_score(learner, reference, found.indices, criterion).item() == pytest.approx(
        found.sub_batch_score, rel=1e-6
    )


@pytest.mark.parametrize(("super_batch", "ratio"), [(163840, 0.8), (65536, 0.5), (327680, 0.9)])
def test_exactly_b_distinct_at_the_papers_ratios(super_batch: int, ratio: float):
    """Scaled by 1/64; int(B (1 - f) / N) would lose examples at f = 0.8 and 0.9."""
    n, b = super_batch // 64, 32768 // 64
    assert round(n * (1 - ratio)) == b
    found = pick(model(n, 4, 0), model(n, 4, 1), b, n_chunks=16)
    assert len(set(found.indices.tolist())) == b
    assert Counter(found.chunk.tolist()) == dict.fromkeys(range(16), b // 16)


@settings(max_examples=40, deadline=None)
@given(
    n_chunks=st.integers(1, 5), per_chunk=st.integers(1, 9), ratio=st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.9]),
    dtypes=st.tuples(*[st.sampled_from([torch.float16, torch.bfloat16, torch.float32])] * 2),
    draw=st.sampled_from(["sample", "top_k"]), loss=st.sampled_from(["sigmoid", "softmax"]),
    precision=st.sampled_from(["exact", "fast"]), masked=st.integers(0, 3), tile=st.integers(1, 50),
)  # fmt: skip
def test_distinct_and_valid_for_all_sizes(n_chunks, per_chunk, ratio, dtypes, draw, loss, precision, masked, tile):
    """b of any super-batch, down to one whose every valid slot is needed."""
    b = n_chunks * per_chunk
    n = round(b / (1 - ratio)) + masked
    learner, reference = (
        Embeddings(m.image.to(dtype), m.text.to(dtype), m.logit_scale, m.logit_bias)
        for m, dtype in zip((model(n, 4, 0), model(n, 3, 1)), dtypes, strict=True)
    )
    valid = torch.arange(n) >= masked
    found = pick(
        learner, reference, b, n_chunks=n_chunks, draw=draw, loss=loss, valid=valid, precision=precision, tile=tile
    )
    assert len(set(found.indices.tolist())) == b
    assert valid[found.indices].all()
    assert math.isfinite(found.sub_batch_score)


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
    """Six pictures and captions, each held by 100 examples: one call draws as much as a hundred of six examples."""
    m = model(6, 4, 0)[torch.arange(600) % 6]
    drawn = torch.stack([pick(m, m, 200, n_chunks=2, step=step, uids=uids(600)).indices for step in range(15)])
    # each of six is drawn 500 times on average; without replacement, with a standard deviation of 16.7
    counts = torch.bincount((drawn % 6).flatten(), minlength=6)
    assert ((counts - 500).abs() < 5 * 16.7).all()
    # an example is drawn in a third of the steps, whatever the others do: in all of 15 with a probability of 7e-8
    assert torch.bincount(drawn.flatten(), minlength=600).max() < 15


def words_of(n_replicas: int, n: int) -> torch.Tensor:
    """uid words of as many small super-batches, each of the same scores and other uids: (n_replicas, n, 2)."""
    return torch.randint(-(2**63), 2**63 - 1, (n_replicas, n, 2), generator=torch.Generator().manual_seed(7))


def gumbel(words: torch.Tensor, *context: int) -> torch.Tensor:
    """(n_replicas, n)"""
    flat = words.reshape(-1, 2)
    return noise.gumbel(flat, torch.zeros(len(flat), dtype=torch.int64), 0, *context).view(words.shape[:2])


def drawn_in_two_chunks(scores: torch.Tensor, words: torch.Tensor, step: int, second: int = 1) -> torch.Tensor:
    """Algorithm 1 in two chunks of one, of all super-batches at once: (n_replicas, 2). second: whose noise the second
    chunk is drawn with."""
    i = (scores.diagonal() + gumbel(words, step, 0)).argmax(1)
    given = torch.stack([_conditional_on(scores, k) for k in range(len(scores))])
    return torch.stack([i, (given[i] + gumbel(words, step, second)).argmax(1)], 1)


def shares_of(pairs: torch.Tensor, n: int) -> torch.Tensor:
    """How often each pair was drawn, of all: (n, n)."""
    return torch.bincount(pairs[:, 0] * n + pairs[:, 1], minlength=n * n).view(n, n).double() / len(pairs)


# The tests of distributions have two halves. `select` draws just what a few lines here draw with the same noise, in
# each of N_EXACT steps: a fault that changes a share q of all draws stays unseen with a probability of (1 - q)^100,
# 0.6 % at q = 0.05. (2,000 draws of `select` against the enumeration, as it was, saw the shift of a cell by 3.3 % with
# one of a half.) And those lines have the distribution that is claimed, in N_DRAWS draws: a cell is off by no more than
# five standard deviations, 1.1 % at the most, which chance brings about once in a million cells.
N_EXACT, N_DRAWS = 100, 40_000


def deviation(p: torch.Tensor) -> torch.Tensor:
    return (p * (1 - p) / N_DRAWS).sqrt() + 1e-4


def test_distribution_of_a_small_draw_equals_enumeration():
    """Two chunks of one: P(i, j) = p_i * p(j | i), each a softmax of Algorithm 1's scores; independent draws differ."""
    learner, reference = model(4, 3, 0, scale=3.0, bias=0.0), model(4, 3, 1, scale=3.0, bias=0.0)
    scores = pair_scores(learner, reference).double()
    own = noise.uid_words(uids(4))[None]
    for step in range(N_EXACT):
        found = pick(learner, reference, 2, n_chunks=2, step=step).indices
        assert found.tolist() == drawn_in_two_chunks(scores, own, step)[0].tolist()

    found = torch.cat([drawn_in_two_chunks(scores, words_of(N_DRAWS // 20, 4), step) for step in range(20)])
    first = torch.softmax(scores.diagonal(), 0)
    expected = torch.stack([first[i] * torch.softmax(_conditional_on(scores, i), 0) for i in range(4)])
    assert ((shares_of(found, 4) - expected).abs() < 5 * deviation(expected)).all()
    independent = (first[:, None] * first / (1 - first[:, None])).fill_diagonal_(0.0)
    assert ((independent - expected).abs() > 10 * deviation(expected)).sum() >= 2


def test_noise_shared_by_the_chunks_would_be_another_distribution():
    """Of three, 0 and 1 are likely first; 2 fits both, which makes the second draw even. Drawn again with the noise of
    the first draw, the one that lost would lose too often: it is known to have little."""
    logits = torch.tensor([[-3.0, -6.0, 1.25], [-6.0, -3.0, 1.25], [1.25, 1.25, 3.0]])
    learner = Embeddings(torch.eye(3), logits.T.contiguous(), 1.0, 0.0)
    scores = pair_scores(learner, None, "hard").double()
    own, alike = noise.uid_words(uids(3))[None], 0
    for step in range(N_EXACT):
        found = pick(learner, None, 2, n_chunks=2, criterion="hard", step=step).indices.tolist()
        assert found == drawn_in_two_chunks(scores, own, step)[0].tolist()
        alike += found == drawn_in_two_chunks(scores, own, step, second=0)[0].tolist()
    assert alike < N_EXACT

    words = words_of(N_DRAWS // 20, 3)
    fresh, shared = (
        shares_of(torch.cat([drawn_in_two_chunks(scores, words, step, second) for step in range(20)]), 3)
        for second in (1, 0)
    )
    first = torch.softmax(scores.diagonal(), 0)
    expected = torch.stack([first[i] * torch.softmax(_conditional_on(scores, i), 0) for i in range(3)])
    assert ((fresh - expected).abs() < 5 * deviation(expected)).all()
    assert ((shared - expected).abs() > 10 * deviation(expected)).any()


def _conditional_on(scores: torch.Tensor, i: int) -> torch.Tensor:
    out = scores.diagonal() + scores[i] + scores[:, i]
    out[i] = -math.inf
    return out


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
    found = select(
        learner[share], reference[share], sub_batch_size=24, n_chunks=4, uids=uids(96)[share], seed=0, step=3,
        group=group, draw=draw, loss=loss, valid=valid[share],
    )  # fmt: skip
    return found.indices.tolist(), (found.local(rank) + cuts[rank]).tolist(), found.sub_batch_score


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
    assert sorted(i for _, own, _ in results for i in own) == sorted(alone.indices.tolist())


def with_image(image: torch.Tensor) -> dict[str, Embeddings]:
    return {"learner": Embeddings(image, torch.ones(40, 8), 10.0, 0.0)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_chunks": 5}, "sub_batch_size 16 is not a positive multiple of n_chunks 5"),
        (
            {"criterion": "easy", "learner": model(10, 8, 0)},
            "learner and reference embeddings differ in number: 10 and 40",
        ),
        ({"criterion": "easy", "gain": 1e308, "draw": "top_k"}, "fewer than 4 examples have a finite score left"),
        ({"learner": None, "reference": None}, "neither the learner's nor the reference's embeddings are given"),
        ({"n_chunks": 0}, "sub_batch_size 16 is not a positive multiple of n_chunks 0"),
        ({"sub_batch_size": 0}, "sub_batch_size 0 is not a positive multiple of n_chunks 4"),
        ({"sub_batch_size": -4}, "sub_batch_size -4 is not a positive multiple of n_chunks 4"),
        ({"sub_batch_size": 44}, "sub_batch_size 44 exceeds the 40 valid examples of the super-batch"),
        ({"sub_batch_size": 40, "valid": torch.arange(40) < 30}, "sub_batch_size 40 exceeds the 30 valid examples"),
        ({"learner": None}, "criterion 'learnability' needs the learner's embeddings, which are None"),
        ({"reference": None}, "criterion 'learnability' needs the reference's embeddings, which are None"),
        ({"reference": None, "criterion": "easy"}, "criterion 'easy' needs the reference's embeddings"),
        ({"learner": None, "criterion": "hard"}, "criterion 'hard' needs the learner's embeddings"),
        ({"reference": model(39, 8, 1)}, "learner and reference embeddings differ in number: 40 and 39"),
        ({"uids": uids(39)}, r"40 embeddings, 39 uids, \(39,\) occurrences and \(39,\) valid flags: one of each per"),
        ({"uids": ["abc"] * 40}, "uid 'abc' does not have 32 hex digits"),
        ({"uids": ["g" * 32] * 40}, "invalid literal"),
        ({"uids": torch.zeros(40, dtype=torch.int64)}, r"uids have shape \(40,\), not \(B, 2\)"),
        (
            {"occurrences": torch.zeros(7, dtype=torch.int64)},
            r"40 uids, \(7,\) occurrences and \(40,\) valid",
        ),
        (
            {"valid": torch.ones(41, dtype=torch.bool)},
            r"40 uids, \(40,\) occurrences and \(41,\) valid",
        ),
        ({"gain": math.nan}, "gain nan is not a finite number of at least 0"),
        ({"gain": -1.0}, "gain -1.0 is not a finite number of at least 0"),
        ({"tile": 0}, "tile 0 is not a positive number of rows"),
        (with_image(torch.full((40, 8), torch.nan)), "40 examples have NaN or infinite embeddings"),
        (with_image(torch.ones(40, 8).index_fill(0, torch.tensor([3]), torch.inf)), "1 examples have NaN or infinite"),
        (with_image(torch.ones(40, 8, dtype=torch.int64)), "torch.int64 and torch.float32, not floating point of 16"),
        (with_image(torch.ones(40, 8, dtype=torch.float64)), "torch.float64 and torch.float32, not floating point"),
        (with_image(torch.ones(40, 7)), r"image \(40, 7\) and text \(40, 8\) embeddings are not both \(B, D\)"),
        (with_image(torch.ones(40, 8, 1)), "embeddings are not both"),
        (with_image(torch.ones(40, 8, device="meta")), "embeddings lie on meta, meta and cpu: put them on one device"),
    ],
)
def test_impossible_selections_are_refused_with_the_reason(settings: dict, message: str):
    arguments = {
        "learner": model(40, 8, 0), "reference": model(40, 8, 1), "sub_batch_size": 16, "n_chunks": 4,
        "uids": uids(40), "seed": 0, "step": 0,
    } | settings  # fmt: skip
    with pytest.raises(ValueError, match=message):
        select(arguments.pop("learner"), arguments.pop("reference"), **arguments)


OPTIONS = """
import torch
from jest_core.selection import Embeddings, select
m = Embeddings(torch.ones(8, 2), torch.ones(8, 2), 10.0, 0.0)
fixed = {"sub_batch_size": 4, "n_chunks": 2, "uids": ["0" * 32] * 8, "seed": 0, "step": 0}
wrong = {"method": "uniform", "valid": torch.ones(8), "occurrences": torch.ones(8), "n_chunks": 2.0}
for name in ("method", "criterion", "loss", "draw", "precision", "valid", "occurrences", "n_chunks"):
    value = wrong.get(name, "wrong")
    try:
        select(m, m, **fixed | {name: value})
    except ValueError as error:
        print(error)
try:
    select(m, m, **fixed, valid=torch.ones(8, 1, dtype=torch.bool))
except ValueError as error:
    print(error)
"""


def test_unknown_options_are_refused():
    """In a process of its own: where shape checks are on, as in `make test`, they refuse before `select` does."""
    ran = subprocess.run([sys.executable, "-c", OPTIONS], capture_output=True, text=True)
    assert ran.stdout.splitlines() == [
        "method 'uniform' is none of joint, independent; uniform batches need no selection",
        "criterion 'wrong' is none of learnability, hard, easy",
        "loss 'wrong' is none of sigmoid, softmax",
        "draw 'wrong' is none of sample, top_k",
        "precision 'wrong' is none of exact, fast",
        "occurrences are torch.int64 and valid is torch.float32, not integers and booleans",
        "occurrences are torch.float32 and valid is torch.bool, not integers and booleans",
        "sub_batch_size 4 and n_chunks 2.0 are not both whole numbers",
        "8 embeddings, 8 uids, (8,) occurrences and (8, 1) valid flags: one of each per example",
    ], ran.stderr


def _refused(rank: int, size: int, group, case: str) -> str:
    learner, reference = model(20, 8, 0), model(20 - (case == "fewer") * rank, 6, 1)
    settings: dict[str, Any] = {"uids": uids(20), "seed": 5 * rank if case == "seed" else 0}
    if case == "absent" and rank:
        learner, settings = None, settings | {"criterion": "easy"}
    elif case == "absent":
        settings |= {"criterion": "easy"}
    elif case == "scale" and rank:
        learner = dataclasses.replace(learner, logit_scale=torch.tensor(50.0))
    elif case == "dtype" and rank:
        learner = Embeddings(learner.image.bfloat16(), learner.text.bfloat16(), 10.0, -8.0)
    elif case == "crash" and rank:
        settings["uids"] = ["-" + "1" * 31] * 20
    try:
        select(learner, reference, sub_batch_size=8, n_chunks=2, step=0, group=group, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "selected"


def test_what_one_learner_refuses_all_refuse():
    """Nobody waits in a collective for the one that has left, and two that select differently do not go on."""
    refused = "ValueError: learner 1: learner and reference embeddings differ in number: 20 and 19"
    assert run_learners(_refused, 2, "fewer") == [refused] * 2
    assert run_learners(_refused, 2, "seed") == ["ValueError: seed is 0 on learner 0 and 5 on learner 1"] * 2
    kind = ["torch.float32", "torch.float32", 8, 8, 10.0, -8.0]
    others = {
        "absent": None,
        "scale": [*kind[:4], 50.0, -8.0],
        "dtype": ["torch.bfloat16", "torch.bfloat16", *kind[2:]],
    }
    for case, other in others.items():
        message = f"ValueError: learner is {kind!r} on learner 0 and {other!r} on learner 1"
        assert run_learners(_refused, 2, case) == [message] * 2
    first, second = run_learners(_refused, 2, "crash")
    assert first.startswith("ValueError: learner 1: OverflowError")
    assert second.startswith("OverflowError")
    assert run_learners(_refused, 2, "none") == ["selected"] * 2


def _travelled(rank: int, size: int, group) -> int:
    """Values of embeddings that this learner received from others (and itself), in gathers of whole rows."""
    received, gather = 0, torch.distributed.all_gather

    def counting(parts, own, group=None):
        nonlocal received
        received += sum(part.numel() for part in parts) if own.ndim == 2 else 0
        gather(parts, own, group=group)

    torch.distributed.all_gather = counting
    share = slice(rank * 100, (rank + 1) * 100)
    learner, reference = model(200, 8, 0)[share], model(200, 6, 1)[share]
    select(learner, reference, sub_batch_size=40, n_chunks=4, uids=uids(200)[share], seed=0, step=0, group=group)
    return received


def test_only_newly_drawn_embeddings_travel():
    """40 rows of two models, image and text; each gather is padded to the learner that gives most."""
    rows = 40 * 2 * (8 + 6)
    assert all(rows <= received < 2 * rows for received in run_learners(_travelled, 2))


def test_adding_a_constant_to_all_scores_changes_no_draw():
    words, times = noise.uid_words(uids(50)), torch.zeros(50, dtype=torch.int64)
    scores = 5 * torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    keys = scores + noise.gumbel(words, times, 0, 0)
    draws = [
        draw_top(keys + constant, 12, words, times, torch.tensor([0, 50]), Learners()).tolist()
        for constant in (0.0, 1e3, -1e6)
    ]
    assert draws[0] == draws[1] == draws[2]


def test_a_constant_loss_per_pair_changes_no_selection():
    """A model that knows nothing, whose every pair has the logit 0, adds log(2) to all scores."""
    learner = model(50, 8, 0)
    nothing = Embeddings(learner.image, learner.text, 0.0, 0.0)
    hard = pick(learner, None, 12, criterion="hard")
    assert pick(learner, nothing, 12).indices.tolist() == hard.indices.tolist()


def test_gain_sharpens_a_draw_towards_the_top():
    learner, reference = model(200, 8, 0), model(200, 8, 1)
    best = set(pick(learner, reference, 40, draw="top_k", n_chunks=1).indices.tolist())
    common = [
        len(best & set(pick(learner, reference, 40, gain=g, n_chunks=1).indices.tolist())) for g in (0.0, 1.0, 1e6)
    ]
    assert common[0] < common[1] < common[2] == 40


def test_fast_precision_selects_a_set_as_good(monkeypatch: pytest.MonkeyPatch):
    learner, reference = structured_models(1024, 32)
    monkeypatch.setattr(losses, "has_bfloat16_products", lambda device: True)  # also where they are slow
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
    found = pick(learner, model(40, 8, 1), 16)
    assert not found.scores.requires_grad
    assert not found.draw_score.requires_grad


def test_joint_draw_reaches_the_gibbs_plateau():
    """Figure 2: after 16 chunks at least 0.95 of what many single-site iterations reach, and rising with them.

    Measured above a uniform set's score, which is stricter than the ratio of scores. After six sweeps of single sites
    the score rises no more, at this size as at twice it; the mean of eight draws is known to half a percent.
    """
    n, b = 256, 64
    learner, reference = structured_models(n, 32)
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randperm(n, generator=generator)[:b] for _ in range(30)]
    uniform = torch.stack([batch_score(learner, reference, members) for members in sets]).mean().item()
    members, trace = gibbs_select(
        learner, reference, sub_batch_size=b, n_iterations=8 * b, uids=synthetic_uids(n), seed=0, step=0
    )
    assert len(set(members.tolist())) == b
    assert trace[-1].item() == pytest.approx(batch_score(learner, reference, members).item(), rel=1e-5)
    before, plateau = (trace[part].mean().item() - uniform for part in (slice(5 * b, 6 * b), slice(6 * b, 8 * b)))
    assert before == pytest.approx(plateau, rel=0.02)
    reached = []
    for n_chunks in (1, 4, 16):
        scores = [
            pick(learner, reference, b, n_chunks=n_chunks, step=step, uids=synthetic_uids(n)).sub_batch_score
            for step in range(8)
        ]
        reached.append((sum(scores) / len(scores) - uniform) / plateau)
    assert reached[0] < reached[1] < reached[2]
    assert reached[2] >= 0.95


def gibbs_pairs(scores: torch.Tensor, words: torch.Tensor, step: int, n_iterations: int) -> torch.Tensor:
    """The sampler of Figure 2 for sets of two, of all super-batches at once: (n_replicas, 2)."""
    members = gumbel(words, step, -1).topk(2).indices
    given = torch.stack([_conditional_on(scores, k) for k in range(len(scores))])
    nobody = torch.zeros(1, 2, dtype=torch.int64)
    for i in range(n_iterations):
        site = int(noise.hashes(nobody, nobody[0, :1], 0, step, i, -1) % 2)
        members[:, site] = (given[members[:, 1 - site]] + gumbel(words, step, i)).argmax(1)
    return members


def test_gibbs_sampling_is_stationary_at_the_set_scores():
    """Sets of two of four: after many sweeps, a set's share of the chains is proportional to exp(score).

    That of sets drawn by their examples' own pairs alone is another. 30 chains of 8 draws each are just those of the
    lines above, and these have the distribution, as for `select`.
    """
    learner, reference = model(4, 3, 0, scale=3.0, bias=0.0), model(4, 3, 1, scale=3.0, bias=0.0)
    pair_matrix = pair_scores(learner, reference).double()
    own = noise.uid_words(uids(4))[None]
    options = {"sub_batch_size": 2, "n_iterations": 8, "uids": uids(4), "seed": 0}
    for step in range(30):
        members, _ = gibbs_select(learner, reference, step=step, **options)
        assert members.tolist() == gibbs_pairs(pair_matrix, own, step, 8)[0].tolist()

    found = torch.cat([gibbs_pairs(pair_matrix, words_of(N_DRAWS // 40, 4), step, 20) for step in range(40)])
    shares = shares_of(found.sort(1).values, 4)
    pairs = torch.tensor(list(combinations(range(4), 2)))
    scores = torch.stack([batch_score(learner, reference, pair) for pair in pairs])
    expected = torch.softmax(scores.double(), 0)
    assert ((shares[pairs[:, 0], pairs[:, 1]] - expected).abs() < 5 * deviation(expected)).all()
    alone = pair_matrix.diagonal()
    independent = torch.softmax(alone[pairs].sum(1), 0)
    assert ((independent - expected).abs() > 10 * deviation(expected)).any()


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
