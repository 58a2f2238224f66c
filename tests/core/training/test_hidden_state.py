"""Dropout and stochastic depth are functions of the place in the run: a resumed run equals an undisturbed one."""

import json
from copy import deepcopy

import pytest
import torch

from jest_core.models import configurations
from jest_core.training.forward import Group, TrainingPass
from jest_core.training.step import Learner, train_step
from pipelines.base import checkpoints
from tests.core.training.test_step import make_learner, super_batch
from tests.processes import run_learners

VIT = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
TOWERS = {
    "patch dropout": {"patch_dropout": 0.5},
    "dropout and stochastic depth": VIT | {"timm_drop": 0.3, "timm_drop_path": 0.3},
}


def model_with(folder, tower: dict) -> str:
    """The name of a small model with this image tower."""
    config = deepcopy(configurations.configuration("jest-tiny")) | {"custom_text": True}
    config["vision_cfg"] = tower if "timm_model_name" in tower else {**config["vision_cfg"], **tower}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return f"local-dir:{folder}"


@pytest.fixture(params=TOWERS.values(), ids=TOWERS.keys())
def name(request, tmp_path) -> str:
    return model_with(tmp_path, request.param)


def features(learner: Learner, step: int, rank: int = 0) -> torch.Tensor:
    trained = TrainingPass(learner.towers, learner.run)
    trained.learners.rank = rank
    learner.towers.model.train()
    return trained([Group(super_batch(learner.towers), learner.towers.resolution())], step).image.detach()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)], ids=["eager", "compiled"])
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(name, compiled, tmp_path):
    one, other = (make_learner(["training.augmentation={}", "selection.method=uniform"], name=name) for _ in range(2))
    if compiled:
        one.towers.compile()
        other.towers.compile()
    batch = super_batch(one.towers)
    for step in range(4):
        train_step(one, batch, step)
        if step == 1:
            content = checkpoints.copied(checkpoints.content(2, one.towers, one.optimizer))
            checkpoints.write(str(tmp_path), 2, content | {"jest": {"step": 2, "seconds": 0.0, "log_parts": []}})
    torch.manual_seed(123)  # whatever else has drawn from PyTorch's generator in the new process
    state = checkpoints.resume(str(tmp_path), other.towers, other.optimizer)
    for step in range(state["step"], 4):
        train_step(other, batch, step)
    for key, value in one.towers.model.state_dict().items():
        assert torch.equal(other.towers.model.state_dict()[key], value), key


def test_masks_differ_by_step_seed_and_learner_and_leave_pytorchs_generator_alone(name):
    learner, reseeded = make_learner([], name=name), make_learner(["seed=1"], name=name)
    state = torch.get_rng_state()
    first = features(learner, 0)
    assert torch.equal(features(learner, 0), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (features(learner, 1), features(learner, 0, rank=1), features(reseeded, 0)):
        assert not torch.allclose(other, first, atol=1e-3)


def test_scoring_masks_nothing(name):
    pair = make_learner([], name=name).towers
    pair.model.train()
    batch = super_batch(pair)
    scored = [pair.embed(batch.pixels, batch.tokens, batch_size=size).image for size in (64, 64)]
    assert torch.equal(scored[0], scored[1])


@pytest.mark.parametrize(
    "saving", [["training.micro_batch_size=64"], ["training.activation_checkpointing=true"]], ids=["micro", "layers"]
)
def test_activations_that_are_computed_again_have_the_same_masks(saving, tmp_path):
    name = model_with(tmp_path, TOWERS["patch dropout"])
    plain, again = ([x.grad for x in gradients(name, overrides)] for overrides in ([], saving))
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def gradients(name: str, overrides: list[str]) -> list[torch.nn.Parameter]:
    learner = make_learner(overrides, name=name)
    out = TrainingPass(learner.towers, learner.run)(
        [Group(super_batch(learner.towers), learner.towers.resolution())], 0
    )
    (out.image @ out.text.T).diagonal().sum().backward()
    return [p for p in learner.towers.model.parameters() if p.grad is not None]


def masks_of_a_learner(rank: int, size: int, group, name: str) -> torch.Tensor:
    """Features of the same examples, after a step that all learners make together."""
    learner = make_learner(["selection.method=uniform"], group, name)
    batch = super_batch(learner.towers)
    train_step(learner, batch[torch.arange(rank * 32, rank * 32 + 32)], 0)
    return learner.wrapped([Group(batch, learner.towers.resolution())], 1).image.detach()


def two_steps_of_coca(rank: int, size: int, group, name: str) -> list[float]:
    learner = make_learner(["selection.method=uniform"], group, name)
    share = super_batch(learner.towers)[torch.arange(rank * 32, rank * 32 + 32)]
    return [train_step(learner, share, step).optimisation["loss"] for step in range(3)]


def test_two_learners_do_not_wait_for_gradients_that_never_come(tmp_path):
    """Of CoCa's text decoder: DistributedDataParallel would end the second step with an error."""
    config = deepcopy(configurations.configuration("coca_ViT-B-32"))
    small = {"width": 32, "layers": 1, "heads": 2}
    size = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16, "attn_pooler_heads": 2}
    config |= {"embed_dim": 32, "init_logit_bias": -10}
    for part, changes in (
        ("vision_cfg", size),
        ("text_cfg", small),
        ("multimodal_cfg", {**small, "attn_pooler_heads": 2}),
    ):
        config[part] |= changes
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    one, other = run_learners(two_steps_of_coca, 2, f"local-dir:{tmp_path}")
    assert one == other
    assert one[-1] < one[0]


def test_two_learners_have_different_masks(tmp_path):
    one, other = run_learners(masks_of_a_learner, 2, model_with(tmp_path, TOWERS["patch dropout"]))
    assert not torch.allclose(one, other, atol=1e-3)
