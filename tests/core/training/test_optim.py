import math

import pytest
import torch
from torch import nn

from jest_core.models import towers
from jest_core.training import optim


def test_warm_up_then_cosine_to_zero():
    rates = [optim.learning_rate(s, peak=1.0, warmup_steps=4, n_steps=12, schedule="cosine") for s in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.0)
    assert optim.learning_rate(9, peak=1.0, warmup_steps=4, n_steps=12, schedule="constant") == 1.0


def test_rsqrt_falls_by_its_timescale_and_cools_down_to_zero():
    options = {"peak": 1.0, "warmup_steps": 4, "n_steps": 1000, "schedule": "rsqrt", "timescale_steps": 100}
    assert optim.learning_rate(4, **options) == 1.0
    assert optim.learning_rate(104, **options) == pytest.approx(0.5**0.5)
    assert optim.learning_rate(304, **options) == pytest.approx(0.5)
    for step, left in {799: 1.0, 800: 1.0, 900: 0.5, 1000: 0.0}.items():
        cooled = optim.learning_rate(step, **options, cooldown_steps=200)
        assert cooled == pytest.approx(left * optim.learning_rate(step, **options)), step
    assert optim.learning_rate(995, **options | {"schedule": "constant"}, cooldown_steps=10) == 0.5


def test_gains_biases_and_temperature_are_not_decayed():
    model: nn.Module = towers.create("jest-tiny", seed=0).model
    optimizer = optim.adamw(model, learning_rate=1.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    *plain, decayed = optimizer.param_groups
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0, 0.1]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in plain[0]["params"]} == {"logit_scale", "logit_bias"}
    for name, parameter in model.named_parameters():
        groups = plain if parameter.ndim < 2 else [decayed]
        assert any(parameter is p for group in groups for p in group["params"]), name


def test_gradients_are_clipped_as_pytorch_does():
    models = [nn.Linear(8, 8), nn.Linear(8, 8)]
    for model in models:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
    norm = optim.clip_gradients(models[0], 1.0)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(models[1].parameters(), 1.0))
    for clipped, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(clipped.grad, expected.grad)


def test_clips_logit_scale_is_clamped():
    model = towers.create("jest-tiny-softmax", seed=0).model
    for scale, expected in {2.0: 2.0, 5.0: math.log(100.0), -1.0: 0.0}.items():
        with torch.no_grad():
            model.logit_scale.fill_(scale)
        optim.limit_scale(model)
        assert model.logit_scale.item() == pytest.approx(expected)


def test_gradients_are_clipped_only_where_a_limit_is_given():
    layer = nn.Linear(3, 1)
    layer(torch.full((1, 3), 100.0)).sum().backward()
    before = layer.weight.grad.clone()
    norm = optim.clip_gradients(layer, None)
    assert torch.equal(layer.weight.grad, before)
    assert optim.clip_gradients(layer, 1.0) == norm
    assert optim.clip_gradients(layer, None) == pytest.approx(1.0)
