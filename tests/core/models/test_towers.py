import open_clip
import pytest
import torch
from torch import nn

from jest_core.models import towers


def test_embeddings_are_unit_norm_and_do_not_depend_on_the_micro_batch():
    pair = towers.create("jest-tiny", seed=0)
    pixels = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    tokens = pair.tokens([f"picture {i}" for i in range(10)])
    whole, parts = pair.embed(pixels, tokens, batch_size=10), pair.embed(pixels, tokens, batch_size=3)
    torch.testing.assert_close(whole.image.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(whole.image, parts.image)
    torch.testing.assert_close(whole.text, parts.text)
    assert whole.logit_scale == pytest.approx(10.0, rel=1e-4)  # the multiplier itself; SigLIP starts at t = 10, b = -10
    assert whole.logit_bias == -10.0


def test_seeds_decide_the_weights():
    hashes = [towers.weights_hash(towers.create("jest-tiny", seed=seed).model) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_demonstration_model_has_no_batch_norm_and_batch_norm_is_refused():
    towers.create("jest-drawings", seed=0)
    with pytest.raises(ValueError, match=r"visual\.1 is a BatchNorm2d.*layer or group norm"):
        towers.refuse_batch_norm(nn.ModuleDict({"visual": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))}))


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="'ViT-Z' is no open_clip model"):
        towers.create("ViT-Z", seed=0)


def test_a_loss_that_does_not_fit_the_model_is_refused():
    pair = towers.create("jest-tiny", seed=0)
    towers.refuse_loss(pair, "sigmoid", "training.loss")
    with pytest.raises(ValueError, match=r"training.loss 'softmax' .* has a logit_bias: take init_logit_bias out"):
        towers.refuse_loss(pair, "softmax", "training.loss")
    pair.model.logit_bias = None
    towers.refuse_loss(pair, "softmax", "training.loss")
    with pytest.raises(ValueError, match=r"training.loss 'sigmoid' .* has no logit_bias: give it an init_logit_bias"):
        towers.refuse_loss(pair, "sigmoid", "training.loss")


def test_weights_round_trip_through_an_open_clip_checkpoint(tmp_path):
    ours, other = towers.create("jest-tiny", seed=1), towers.create("jest-tiny", seed=2)
    content = {
        "epoch": 1,
        "name": "x",
        "state_dict": {f"module.{k}": v for k, v in ours.model.state_dict().items()},
        "jest": {"step": 1},
    }
    torch.save(content, tmp_path / "epoch_1.pt")
    towers.load_weights(other, torch.load(tmp_path / "epoch_1.pt", weights_only=True))
    assert towers.weights_hash(other.model) == towers.weights_hash(ours.model)
    theirs = open_clip.create_model("jest-tiny", pretrained=str(tmp_path / "epoch_1.pt"))
    assert towers.weights_hash(theirs) == towers.weights_hash(ours.model)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1e-2), ("fp16", 1e-3)])
def test_low_precision_stays_near(precision, tolerance):
    pair = towers.create("jest-tiny", seed=0)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    tokens = pair.tokens([f"picture {i}" for i in range(6)])
    exact, low = pair.embed(pixels, tokens, batch_size=4), pair.embed(pixels, tokens, batch_size=4, precision=precision)
    assert low.image.dtype == torch.float32
    assert not torch.equal(exact.image, low.image)
    assert (1 - (exact.image * low.image).sum(1)).max() < tolerance
    assert (1 - (exact.text * low.text).sum(1)).max() < tolerance


def test_a_model_without_a_logit_bias_uses_the_softmax_loss():
    pair = towers.create("jest-tiny", seed=0)
    assert pair.loss == "sigmoid"
    pair.model.logit_bias = None
    assert pair.loss == "softmax"
    assert pair.scale_and_bias()[1] == 0.0
