import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jest_core import flops, towers


@pytest.mark.parametrize(
    ("ratio", "reused", "not_reused", "online"),
    [(0.5, 1.33, 1.67, 2.00), (0.8, 2.33, 2.67, 4.00), (0.9, 4.00, 4.33, 7.33)],
)
def test_the_papers_table_of_cost_ratios(ratio: float, reused: float, not_reused: float, online: float):
    """Section 7 of the fact sheet; the third column has the reference scored online and the forward reused."""
    forward, b = 1e9, 32768
    sizes = {"forward": forward, "sub_batch_size": b, "super_batch_size": round(b / (1 - ratio)), "n_chunks": 16}
    cached = flops.training_flops(**sizes)
    uniform = flops.training_flops(**(sizes | {"super_batch_size": b})).total
    assert cached.total / uniform == pytest.approx(not_reused, abs=0.01)
    assert cached.total_with_reuse(b, forward) / uniform == pytest.approx(reused, abs=0.01)
    with_reference = flops.training_flops(**sizes, reference_forward=forward)
    assert with_reference.total_with_reuse(b, forward) / uniform == pytest.approx(online, abs=0.01)


def test_selection_flops_are_those_of_its_matrix_products():
    from tests.core.test_selection import model, pick

    learner, reference = model(128, 8, 0), model(128, 6, 1)
    step = flops.training_flops(forward=1.0, sub_batch_size=32, super_batch_size=128, n_chunks=4, widths=(8, 6))
    with FlopCounterMode(display=False) as counter:
        pick(learner, reference, 32, n_chunks=4)
    assert counter.get_total_flops() == step.select


def test_a_forward_of_the_demonstration_model_is_counted():
    pair = towers.create("jest-drawings", seed=0)
    count = flops.forward_flops(pair)
    pixels, tokens = torch.zeros(3, 3, 64, 64), pair.tokens(["a", "b", "c"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pair.model.eval()(pixels, tokens)
    assert counter.get_total_flops() == pytest.approx(3 * count, rel=1e-6)
