import contextlib
import math

import pytest
import torch

from jest_core import losses
from jest_core.selection import kernels, learnability
from jest_core.selection.learnability import (
    ConditionalScores,
    Embeddings,
    batch_score,
    cross_losses,
    pair_scores,
    signed_models,
)
from tests import oracles
from tests.synthetic import structured_models


def softmax_oracle(models: list[tuple[int, Embeddings]]) -> list[tuple[int, list, list, float]]:
    return [(sign, m.image.tolist(), m.text.tolist(), m.logit_scale) for sign, m in models]


@pytest.mark.parametrize("criterion", ["learnability", "hard", "easy"])
def test_pair_scores_match_plain_loops(criterion: str):
    learner, reference = structured_models(12, 6, reference_width=4)
    expected = torch.zeros(12, 12)
    for sign, m in signed_models(learner, reference, criterion):
        losses = oracles.sigmoid_pair_losses(m.image.tolist(), m.text.tolist(), m.logit_scale, m.logit_bias)
        expected += sign * torch.tensor(losses)
    torch.testing.assert_close(pair_scores(learner, reference, criterion), expected)


def test_learnability_is_learner_loss_minus_reference_loss():
    learner, reference = structured_models(12, 6)
    hard, easy = pair_scores(learner, None, "hard"), pair_scores(None, reference, "easy")
    assert (hard > 0).all()  # the learner's losses
    assert (easy < 0).all()  # minus the reference's losses
    torch.testing.assert_close(pair_scores(learner, reference), hard + easy)


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_cross_losses_are_the_rows_and_columns_of_the_drawn_examples(tile: int):
    learner, _ = structured_models(48, 8)
    drawn = torch.tensor([3, 40, 8, 11, 30])
    logits = learner.logit_scale * learner.image.double() @ learner.text.double().T + learner.logit_bias
    losses = torch.nn.functional.softplus(logits)
    expected = losses[:, drawn].sum(1) + losses[drawn].sum(0)
    torch.testing.assert_close(cross_losses(learner, learner[drawn], tile), expected, rtol=1e-6, atol=0)


def test_fast_products_are_close_and_use_bfloat16_only(monkeypatch: pytest.MonkeyPatch):
    learner, _ = structured_models(300, 32)
    drawn = learner[torch.arange(64)]
    monkeypatch.setattr(losses, "has_bfloat16_products", lambda device: False)
    without = cross_losses(learner, drawn, precision="fast")
    monkeypatch.setattr(losses, "has_bfloat16_products", lambda device: True)
    exact, fast = (cross_losses(learner, drawn, precision=precision) for precision in ("exact", "fast"))
    assert (without == exact).all()
    rounded = Embeddings(learner.image, learner.text, 1.0, learner.logit_bias)
    scaled = [(20.0 * x).bfloat16().double() for x in (drawn.text, drawn.image)]
    logits = [rounded.image.bfloat16().double() @ scaled[0].T, rounded.text.bfloat16().double() @ scaled[1].T]
    expected = sum(torch.nn.functional.softplus(x.bfloat16() - 8.0).double().sum(1) for x in logits)
    torch.testing.assert_close(fast, expected, rtol=5e-3, atol=0)
    torch.testing.assert_close(fast, exact, rtol=2e-2, atol=1e-3)
    assert (fast / exact - 1).mean().abs() < 2e-3  # rounding goes both ways


def test_autocast_does_not_change_scores():
    learner, reference = structured_models(64, 8)
    members = torch.arange(20)
    plain = batch_score(learner, reference, members)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert batch_score(learner, reference, members) == plain


def test_softmax_scores_match_plain_loops():
    learner, reference = structured_models(20, 8, reference_width=6)
    models = signed_models(learner, reference, "learnability")
    slow = softmax_oracle(models)
    scores = ConditionalScores(models, "softmax", tile=7)
    drawn = [3, 8, 11]
    for some in ([], drawn[:1], drawn[1:]):
        if some:
            scores.add([m[torch.tensor(some)] for _, m in models])
        before = drawn[: drawn.index(some[-1]) + 1] if some else []
        expected = torch.tensor(oracles.softmax_conditional_scores(slow, before)).double()
        torch.testing.assert_close(scores(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("criterion", ["learnability", "hard", "easy"])
def test_the_score_of_a_set_matches_plain_loops(criterion: str):
    learner, reference = structured_models(16, 8, reference_width=6)
    members = torch.tensor([2, 5, 7, 9, 15])
    matrix = pair_scores(learner, reference, criterion).tolist()
    score = batch_score(learner, reference, members, criterion, tile=3).item()
    assert score == pytest.approx(oracles.set_score(matrix, members.tolist()), rel=1e-5)
    models = signed_models(learner, reference, criterion)
    expected = sum(
        sign * sum(oracles.softmax_losses(m.image[members].tolist(), m.text[members].tolist(), m.logit_scale))
        for sign, m in models
    )
    score = batch_score(learner, reference, members, criterion, loss="softmax", tile=3).item()
    assert score == pytest.approx(expected, rel=1e-5)


def test_removing_examples_undoes_adding_them():
    learner, reference = structured_models(64, 8)
    models = signed_models(learner, reference, "learnability")
    scores, other = (ConditionalScores(models) for _ in range(2))
    kept, dropped = torch.arange(5, 12), torch.arange(20, 24)
    other.add([m[kept] for _, m in models])
    scores.add([m[torch.cat([kept, dropped])] for _, m in models])
    scores.remove([m[dropped] for _, m in models])
    torch.testing.assert_close(scores(), other(), rtol=1e-5, atol=1e-5)


def test_softmax_ignores_the_bias():
    learner, reference = structured_models(32, 8)
    shifted = Embeddings(learner.image, learner.text, learner.logit_scale, -3.0)
    members = torch.arange(10)
    plain = batch_score(learner, reference, members, loss="softmax")
    assert batch_score(shifted, reference, members, loss="softmax").item() == pytest.approx(plain.item())


def test_extreme_logits_stay_finite():
    """Duplicates at a large scale: thousands of nats in a sum, where exp alone would overflow float32."""
    same = Embeddings(torch.ones(70, 1), torch.ones(70, 1), 120.0, 0.0)
    assert cross_losses(same, same).tolist() == pytest.approx([2 * 70 * 120.0] * 70)
    apart = Embeddings(torch.ones(70, 1), -torch.ones(70, 1), 120.0, 0.0)
    assert cross_losses(apart, apart).tolist() == pytest.approx([2 * 70 * math.exp(-120.0)] * 70, abs=1e-30)


def test_without_a_c_compiler_pytorch_is_used_with_a_warning(monkeypatch):
    """As on a machine without gcc, where Triton raises at its first launch on a GPU."""

    def no_compiler(*sides, fast=False):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "cross_losses", no_compiler)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    learnability._compiles.cache_clear()
    with pytest.warns(RuntimeWarning, match="Failed to find C compiler.*install Triton and a C compiler"):
        assert not learnability._compiles(torch.device("cpu"))
    assert not learnability._compiles(torch.device("cpu"))  # the result is cached: no second warning
    learnability._compiles.cache_clear()
