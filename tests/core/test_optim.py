import pytest
from torch import nn

from jest_core import optim, towers


def test_warm_up_then_cosine_to_zero():
    rates = [optim.learning_rate(s, peak=1.0, warmup_steps=4, n_steps=12, schedule="cosine") for s in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert rates[12] == pytest.approx(0.0)
    assert optim.learning_rate(9, peak=1.0, warmup_steps=4, n_steps=12, schedule="constant") == 1.0


def test_rsqrt_falls_by_its_timescale_and_cools_down_to_zero():
    told = {"peak": 1.0, "warmup_steps": 4, "n_steps": 1000, "schedule": "rsqrt", "timescale_steps": 100}
    assert optim.learning_rate(4, **told) == 1.0
    assert optim.learning_rate(104, **told) == pytest.approx(0.5**0.5)
    assert optim.learning_rate(304, **told) == pytest.approx(0.5)
    for step, left in {799: 1.0, 800: 1.0, 900: 0.5, 1000: 0.0}.items():
        cooled = optim.learning_rate(step, **told, cooldown_steps=200)
        assert cooled == pytest.approx(left * optim.learning_rate(step, **told)), step
    assert optim.learning_rate(995, **told | {"schedule": "constant"}, cooldown_steps=10) == 0.5


def test_gains_biases_and_temperature_are_not_decayed():
    model: nn.Module = towers.create("jest-tiny", seed=0).model
    optimizer = optim.adamw(model, learning_rate=1.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    plain, decayed = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    for name, parameter in model.named_parameters():
        assert id(parameter) in (plain if parameter.ndim < 2 else decayed), name
