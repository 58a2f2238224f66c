import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from jest_core.losses import calibrated_bias, sigmoid_loss, sigmoid_pair_losses, softmax_loss, softplus_sums
from tests import oracles
from tests.processes import run_learners


def embeddings(n: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    image, text = normalize(torch.randn(2, n, width, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return image, text


def test_pair_losses_match_the_double_loop():
    image, text = embeddings(5, 3)
    slow = oracles.sigmoid_pair_losses(image.tolist(), text.tolist(), 10.0, -10.0)
    torch.testing.assert_close(
        sigmoid_pair_losses(image, text, torch.tensor(10.0), torch.tensor(-10.0)), torch.tensor(slow)
    )


@settings(max_examples=60, deadline=None)
@given(
    columns=st.integers(1, 300), low=st.floats(-200, 100), spread=st.floats(0, 100),
    seed=st.integers(0, 1000), odd=st.booleans(),
)  # fmt: skip
def test_softplus_sums_equal_those_of_float64(columns: int, low: float, spread: float, seed: int, odd: bool):
    """For few columns and many, odd and even, for logits of any size."""
    generator = torch.Generator().manual_seed(seed)
    logits = low + spread * torch.rand(3, 2 * columns + odd, generator=generator)
    expected = F.softplus(logits.double()).sum(1)
    torch.testing.assert_close(softplus_sums(logits.clone()).double(), expected, rtol=3e-5, atol=1e-30)


def test_softplus_sums_keep_tiny_terms():
    """Terms of exp(-40), which would vanish beside the 1 of log(1 + x) in float32."""
    logits = torch.full((2, 1024), -40.0)
    torch.testing.assert_close(softplus_sums(logits.clone()), torch.full((2,), 1024 * 4.248354e-18), rtol=1e-5, atol=0)


def dense_softmax_loss(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """open_clip's ClipLoss, by its formula."""
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def dense_sigmoid_loss(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return sigmoid_pair_losses(image, text, scale, bias).sum() / len(image)


def softmax(image, text, scale, bias, **options):
    """softmax_loss with the arguments of sigmoid_loss; the bias is not used, and has the gradient 0."""
    return softmax_loss(image, text, scale, **options) + 0.0 * bias


LOSSES = {"sigmoid": (sigmoid_loss, dense_sigmoid_loss), "softmax": (softmax, dense_softmax_loss)}


def test_softmax_loss_matches_plain_loops():
    image, text = embeddings(9, 4)
    expected = sum(oracles.softmax_losses(image.tolist(), text.tolist(), 12.0)) / 9
    assert softmax_loss(image, text, torch.tensor(12.0), tile=4).item() == pytest.approx(expected, rel=1e-5)


def leaves(n: int, width: int) -> list[torch.Tensor]:
    values = [*embeddings(n, width), torch.tensor(12.0), torch.tensor(-3.0)]
    return [value.clone().requires_grad_() for value in values]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_tiled_loss_and_gradients_equal_the_dense_ones(tile: int, name: str):
    ours, dense = LOSSES[name]
    tiled, whole = leaves(33, 8), leaves(33, 8)
    loss, expected = ours(*tiled, tile=tile), dense(*whole)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected)
    for actual, expected in zip(tiled, whole, strict=True):
        torch.testing.assert_close(actual.grad, torch.zeros(()) if expected.grad is None else expected.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_pass_autograds_own_check(name: str):
    values = [x.detach().double().requires_grad_() for x in leaves(6, 4)]
    # the loss works in float32, so the check's steps and tolerances are wider than its float64 defaults
    assert torch.autograd.gradcheck(
        lambda *x: LOSSES[name][0](*x, tile=4).double(), values, eps=1e-2, atol=3e-3, rtol=3e-2
    )


def _shared_loss(rank: int, size: int, group, name: str) -> list[torch.Tensor]:
    cuts = {2: [0, 9, 24], 4: [0, 5, 11, 13, 24]}[size]
    values = leaves(24, 8)
    share = slice(cuts[rank], cuts[rank + 1])
    values[:2] = [value.detach()[share].clone().requires_grad_() for value in values[:2]]
    loss = LOSSES[name][0](*values, tile=4, group=group)
    loss.backward()
    return [loss.detach(), *(value.grad for value in values)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [2, 4])
def test_global_loss_and_gradients_equal_one_process_with_skewed_shares(size: int, name: str):
    values = leaves(24, 8)
    loss = LOSSES[name][0](*values)
    loss.backward()
    results = run_learners(_shared_loss, size, name)
    for result in results:
        torch.testing.assert_close(result[0], loss.detach())
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([r[i] for r in results]), values[i - 1].grad)
    for i in (3, 4):  # shared parameters: the sum over learners is the gradient
        torch.testing.assert_close(sum(r[i] for r in results), values[i - 1].grad)


@pytest.mark.parametrize("name", LOSSES)
def test_memory_kept_for_backward_is_linear_in_the_batch(name: str):
    values = leaves(512, 8)
    loss = sigmoid_loss(*values, tile=64) if name == "sigmoid" else softmax_loss(*values[:3], tile=64)
    n_saved = sum(x.numel() for x in loss.grad_fn.saved_tensors)
    assert n_saved <= 2 * 512 * 8 + 2


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_and_evaluation_change_nothing(name: str):
    values = leaves(32, 8)
    plain = LOSSES[name][0](*values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LOSSES[name][0](*values) == plain
    with torch.no_grad():
        assert LOSSES[name][0](*values) == plain


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_embeddings_get_gradients_of_their_own_type(name: str):
    values = leaves(32, 8)
    values[:2] = [value.detach().bfloat16().requires_grad_() for value in values[:2]]
    exact = [value.detach().float().requires_grad_() for value in values]
    LOSSES[name][0](*values).backward()
    LOSSES[name][1](*exact).backward()
    assert values[0].grad.dtype == torch.bfloat16
    torch.testing.assert_close(values[0].grad.float(), exact[0].grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_scalers_factor_is_not_lost_to_rounding(name: str):
    """Gradients of float16 embeddings underflow float16 unless they are multiplied by a loss scaler's factor."""
    values = leaves(256, 8)
    values[:2] = [value.detach().half().requires_grad_() for value in values[:2]]
    exact = [value.detach().float().requires_grad_() for value in values]
    factor = 1e-5 * 65536
    (factor * LOSSES[name][0](*values)).backward()
    (factor * LOSSES[name][1](*exact)).backward()
    expected = exact[0].grad.half().float()
    assert (values[0].grad.float() - expected).norm() < 2e-3 * expected.norm()


WRONG_SHAPES = """
import torch
from jest_core.losses import calibrated_bias, sigmoid_loss, softmax_loss
x, one = torch.ones(8, 4), torch.ones(())
for image, text, tile in ((x, x[:7], 4), (x[:, :3], x, 4), (x[0], x[0], 4), (x, x, -1)):
    for loss, shared in ((sigmoid_loss, (one, one)), (softmax_loss, (one,))):
        try:
            loss(image, text, *shared, tile=tile)
        except ValueError as error:
            print(error)
"""


def test_shapes_that_do_not_match_are_refused():
    """In a separate process, since the shape checks that `make test` turns on would raise first."""
    ran = subprocess.run([sys.executable, "-c", WRONG_SHAPES], capture_output=True, text=True)
    lines = ran.stdout.splitlines()
    assert len(lines) == 8, ran.stderr
    assert lines[0] == "image (8, 4) and text (7, 4) embeddings are not both (B, D), or tile 4 is not positive"


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused_and_not_wrong(name: str):
    values = leaves(8, 4)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(LOSSES[name][0](*values), values[0], create_graph=True)


def test_a_confident_match_keeps_its_gradient():
    """At a logit of 20 the match costs 2e-9, which 1 + exp(-20) would round away."""
    image = torch.eye(2).requires_grad_()
    scale, bias = torch.tensor(60.0), torch.tensor(-40.0)
    loss = sigmoid_loss(image, torch.eye(2), scale, bias)
    loss.backward()
    assert loss.item() == pytest.approx(2.0611536e-9, rel=1e-4)
    assert image.grad[0, 0].item() == pytest.approx(-60 * 2.0611536e-9 / 2, rel=1e-4)


def test_the_calibrated_bias_is_where_the_sigmoid_loss_is_least(generator):
    image = F.normalize(torch.randn(64, 16, generator=generator), dim=1)
    text = F.normalize(image + 0.8 * torch.randn(64, 16, generator=generator), dim=1)
    bias = calibrated_bias(image, text, 30.0)
    near = [sigmoid_loss(image, text, torch.tensor(30.0), torch.tensor(bias + d)).item() for d in (-0.1, 0.0, 0.1)]
    assert near[1] < min(near[0], near[2])
    assert near[1] < sigmoid_loss(image, text, torch.tensor(30.0), torch.tensor(0.0)).item()
