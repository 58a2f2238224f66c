"""What a training pass does unseen: parameters that get no gradient, and state that no checkpoint has."""

import random

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from jest_core.models import outlines, towers, trial
from jest_core.run_file import Model


def test_ordinary_models_train_all_parameters_and_have_no_hidden_state():
    for name in ("jest-tiny", "jest-tiny-softmax", "jest-drawings", "ViTamin-S"):
        assert trial.training_pass(towers.without_weights(name)) == {"untrained": [], "hidden": []}


def test_the_trial_names_the_parameters_that_a_real_pass_leaves_without_a_gradient():
    """Of CoCa, whose text decoder only the loss on captions trains; here at small size."""
    name = "coca_ViT-B-32"
    assert outlines.untrained_parameters(Model(name="jest-tiny")) is None
    message = outlines.untrained_parameters(Model(name=name))
    assert message is not None
    assert message.startswith(f"315 parameters of {name} get no gradient from the contrastive loss")
    assert "(text_decoder 31" in message
    config = open_clip.get_model_config(name)
    small = {"width": 32, "layers": 1, "heads": 2}
    config["vision_cfg"] |= {"image_size": 32, "width": 32, "layers": 1, "patch_size": 16, "attn_pooler_heads": 2}
    config["vision_cfg"] |= {"head_width": 16}
    config["text_cfg"] |= small
    config["multimodal_cfg"] |= small | {"attn_pooler_heads": 2}
    config.pop("custom_text")
    config["embed_dim"] = 32
    model = open_clip.CoCa(**config).train()
    image = model.encode_image(torch.rand(2, 3, 32, 32), normalize=True)
    text = model.encode_text(torch.ones(2, 76, dtype=torch.int64), normalize=True)
    (model.logit_scale.exp() * image @ text.T).sum().backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None]
    assert untrained
    with torch.device("meta"):
        outline = open_clip.CoCa(**config).train()
    assert trial.training_pass(outline)["untrained"] == untrained


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Python(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * random.random()


class Numpy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(np.random.rand())


class Once(nn.Module):
    """Draws in the first pass alone, as another thread may."""

    drawn = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.drawn:
            self.drawn = True
            random.random()
            np.random.rand()
        return x


def test_numbers_that_another_thread_draws_meanwhile_are_not_the_models():
    model = towers.without_weights("jest-tiny")
    model.visual.ln_post = nn.Sequential(model.visual.ln_post, Once())
    assert trial.training_pass(model) == {"untrained": [], "hidden": []}


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (Counts, r"its buffer visual\.ln_post\.1\.seen changes"),
        (OwnGenerator, r"visual\.ln_post\.1 draws from a Generator of its own"),
        (Python, "it draws from the generator of Python or NumPy"),
        (Numpy, "it draws from the generator of Python or NumPy"),
    ],
)
def test_state_that_no_checkpoint_has_is_refused(module, sentence, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    outlines.training_trial.cache_clear()
    make = towers.without_weights

    def with_module(name: str, context_length: int | None = None) -> nn.Module:
        model = make(name, context_length)
        with torch.device("meta"):
            model.visual.ln_post = nn.Sequential(model.visual.ln_post, module())
        return model

    monkeypatch.setattr(towers, "without_weights", with_module)
    with pytest.raises(ValueError, match=rf"model\.name jest-tiny has state beside its weights \({sentence}\)"):
        outlines.refuse_hidden_state(Model(name="jest-tiny"))
    outlines.training_trial.cache_clear()
