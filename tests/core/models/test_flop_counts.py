import pytest
import torch

from jest_core.models import flop_counts, towers
from tests import oracles
from tests.core.test_flops import Counter


@pytest.mark.parametrize(
    ("name", "image_size", "patch_size"),
    [
        ("ViT-B-16", None, None),
        ("ViT-B-16", None, 32),
        ("ViT-B-16-SigLIP-256", 128, None),
        ("ViT-L-16-SigLIP-256", None, 32),
    ],
)
def test_forward_flops_match_the_formula_of_a_vit(name: str, image_size: int | None, patch_size: int | None):
    flops = flop_counts.forward_flops(name, None, image_size, patch_size)
    assert flops == pytest.approx(oracles.vit_flops(name, image_size, patch_size), rel=1e-9)


@pytest.mark.parametrize("name", ["jest-drawings", "jest-tiny"])
def test_forward_flops_match_torchs_counter_on_the_model(name: str):
    """In training mode, as torch does not count the fused path of nn.MultiheadAttention in evaluation mode."""
    pair = towers.create(name, seed=0)
    size = pair.view.image_size
    with Counter() as counter:
        pair.model.train()(torch.zeros(3, 3, size, size), pair.tokens(["a", "b", "c"]))
    once = sum(flop_counts.forward_flops(name, None, None, None))
    assert counter.get_total_flops() == pytest.approx(3 * once, rel=1e-6)
