"""Mixed resolution, micro-batches and their options: the same gradients as one plain pass."""

from functools import partialmethod

import pytest
import torch
from torch import nn

from jest_core.losses import sigmoid_loss
from jest_core.models.flexible import Resolution
from jest_core.training.forward import Features, Group, TrainingPass
from tests.core.training.test_step import make_learner, super_batch, train_step

PLAIN = ["training.augmentation={}"]
FLEXI = [
    "selection.score_patch_size=16",
    "training.low_resolution={patch_size: 16}",
    "selection.agreement_every_steps=1",
]


def gradients(*overrides: str) -> tuple[Features, dict[str, torch.Tensor], int]:
    """Features and gradients of a sub-batch at two resolutions, and the bytes saved between forward and backward."""
    learner = make_learner(list(overrides))
    if learner.run.training.activation_checkpointing:
        learner.towers.checkpoint_activations()
    batch = super_batch(learner.towers)
    groups = [Group(batch[torch.arange(40)], Resolution(32)), Group(batch[torch.arange(40, 64)], Resolution(32, 16))]
    n_bytes = 0

    def count(x: torch.Tensor) -> torch.Tensor:
        nonlocal n_bytes
        n_bytes += x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        features = TrainingPass(learner.towers, learner.run)(groups, 3)
    bias = features.logit_bias
    assert bias is not None
    sigmoid_loss(features.image, features.text, features.logit_scale, bias).backward()
    return features, {name: p.grad for name, p in learner.towers.model.named_parameters()}, n_bytes


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.micro_batch_size=7"],
        ["training.activation_checkpointing=true"],
        ["training.micro_batch_size=16", "training.activation_checkpointing=true"],
    ],
)
def test_micro_batches_and_checkpointing_save_memory_and_keep_gradients(overrides: list[str]):
    whole, expected, n_bytes = gradients()
    features, actual, n_bytes_saving = gradients(*overrides)
    torch.testing.assert_close(features, whole)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)
    assert n_bytes_saving < 0.5 * n_bytes


def test_each_group_is_embedded_at_its_resolution():
    features, _, _ = gradients(*PLAIN)
    learner = make_learner(PLAIN)
    batch = super_batch(learner.towers)
    full = learner.towers.embed(batch.pixels, batch.tokens, batch_size=64)
    low = learner.towers.embed(batch.pixels, batch.tokens, batch_size=64, resolution=Resolution(32, 16))
    torch.testing.assert_close(features.image, torch.cat([full.image[:40], low.image[40:]]))
    torch.testing.assert_close(features.text, full.text)
    assert not torch.allclose(full.image[40:], low.image[40:], atol=1e-2)


def test_bfloat16_changes_little_and_keeps_embeddings_in_float32():
    exact, expected, _ = gradients()
    features, actual, _ = gradients("training.precision=bf16")
    assert features.image.dtype == torch.float32
    assert not torch.equal(features.image, exact.image)
    assert (1 - (features.image * exact.image).sum(1)).max() < 1e-2
    for name in ("visual.conv1.weight", "visual.positional_embedding", "text_projection"):
        assert torch.cosine_similarity(actual[name].flatten(), expected[name].flatten(), dim=0) > 0.99, name


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "overrides",
    [
        ["selection.score_precision=bf16", "training.precision=bf16"],
        ["training.micro_batch_size=16", "training.activation_checkpointing=true"],
    ],
)
def test_nothing_is_compiled_again_after_the_first_step(monkeypatch, overrides: list[str]):
    """Scoring (64 in micro-batches of 28, the last one padded), agreement, and both halves, at two resolutions."""
    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    settings = [*FLEXI, "training.score_batch_size=28", *overrides]
    learner, plain = make_learner(settings), make_learner(settings)
    if learner.run.training.activation_checkpointing:
        learner.towers.checkpoint_activations()
    sizes = set()
    learner.towers.model.visual.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    learner.towers.compile()
    batch = super_batch(learner.towers)
    first = train_step(learner, batch, 0).optimisation
    assert first == pytest.approx(train_step(plain, batch, 0).optimisation, rel=2e-2)
    assert sizes == {28, 16}
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 4):
            train_step(learner, batch, step)


def test_a_tower_that_cannot_checkpoint_activations_is_refused():
    learner = make_learner([])
    learner.towers.model.visual.trunk = nn.Identity()
    with pytest.raises(ValueError, match=r"jest-tiny does not support it .*give training\.micro_batch_size"):
        learner.towers.checkpoint_activations()
