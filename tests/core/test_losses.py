import pytest
import torch
from torch.nn.functional import normalize

from jest_core.losses import sigmoid_loss, sigmoid_pair_losses
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


@pytest.mark.parametrize("tile", [1, 7, 64])
def test_tiled_loss_and_gradients_equal_the_dense_ones(tile: int):
    values = [*embeddings(33, 8), torch.tensor(12.0), torch.tensor(-3.0)]
    tiled = [x.clone().requires_grad_() for x in values]
    dense = [x.clone().requires_grad_() for x in values]
    loss = sigmoid_loss(*tiled, tile=tile)
    expected = sigmoid_pair_losses(*dense).sum() / 33
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(tiled, dense, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradients_pass_autograds_own_check():
    image, text = (x.double().requires_grad_() for x in embeddings(6, 4))
    # the loss works in float32, so the check's steps and tolerances are wider than its float64 defaults
    scale, bias = (
        torch.tensor(5.0, dtype=torch.float64, requires_grad=True),
        torch.tensor(-2.0, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(
        lambda *x: sigmoid_loss(*x, tile=4).double(), (image, text, scale, bias), eps=1e-2, atol=2e-3, rtol=2e-2
    )


def _shared_loss(rank: int, size: int, group) -> list[torch.Tensor]:
    image, text = embeddings(24, 8)
    cuts = [0, 5, 11, 13, 24] if size == 4 else [0, 9, 24]
    share = slice(cuts[rank], cuts[rank + 1])
    values = [image[share].clone(), text[share].clone(), torch.tensor(12.0), torch.tensor(-3.0)]
    for value in values:
        value.requires_grad_()
    loss = sigmoid_loss(*values, tile=4, group=group)
    loss.backward()
    return [loss.detach(), *(value.grad for value in values)]


@pytest.mark.parametrize("size", [2, 4])
def test_global_loss_and_gradients_equal_one_process_with_skewed_shares(size: int):
    values = [*embeddings(24, 8), torch.tensor(12.0), torch.tensor(-3.0)]
    for value in values:
        value.requires_grad_()
    loss = sigmoid_loss(*values)
    loss.backward()
    results = run_learners(_shared_loss, size)
    for found in results:
        torch.testing.assert_close(found[0], loss.detach())
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([r[i] for r in results]), values[i - 1].grad)
    for i in (3, 4):  # shared parameters: the sum over learners is the gradient
        torch.testing.assert_close(sum(r[i] for r in results), values[i - 1].grad)


def test_memory_kept_for_backward_is_linear_in_the_batch():
    image, text = (x.requires_grad_() for x in embeddings(512, 8))
    loss = sigmoid_loss(image, text, torch.tensor(10.0), torch.tensor(-10.0), tile=64)
    kept = sum(x.numel() for x in loss.grad_fn.saved_tensors)
    assert kept <= 2 * 512 * 8 + 2
