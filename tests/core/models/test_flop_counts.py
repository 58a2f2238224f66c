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
def test_a_forward_is_that_of_the_formula(name: str, image_size: int | None, patch_size: int | None):
    found = flop_counts.forward_flops(name, None, image_size, patch_size)
    assert found == pytest.approx(oracles.vit_flops(name, image_size, patch_size), rel=1e-9)


@pytest.mark.parametrize("name", ["jest-drawings", "jest-tiny"])
def test_a_forward_is_that_of_the_model_with_weights(name: str):
    """In training mode: in evaluation torch counts nothing of nn.MultiheadAttention's fused path."""
    pair = towers.create(name, seed=0)
    size = pair.view.image_size
    with Counter() as counter:
        pair.model.train()(torch.zeros(3, 3, size, size), pair.tokens(["a", "b", "c"]))
    once = sum(flop_counts.forward_flops(name, None, None, None))
    assert counter.get_total_flops() == pytest.approx(3 * once, rel=1e-6)
