"""The two towers: an open_clip model as learner or as frozen reference, pixels and tokens -> unit-norm embeddings."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from jaxtyping import Float, Int, UInt8
from timm.layers import GroupNormAct, StdConv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from jest_core.choices import ForwardPrecision, Loss
from jest_core.config import Model
from jest_core.learnability import Embeddings
from jest_core.preprocess import View, normalise, resize

Colour = tuple[float, float, float]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

open_clip.add_model_config(Path(str(files("jest_core") / "model_configs")))


@timm.models.register_model
def resnet_drawings(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """timm's pre-activation ResNet cut down for 64-pixel drawings, with group norm and standardised convolutions.

    The demonstration's image tower: of the small towers tried, it learned most per CPU second.
    """
    sizes: dict[str, Any] = {
        "layers": (1, 1, 1, 1),
        "channels": (32, 64, 128, 256),
        "stem_chs": 32,
        "stem_type": "",
        "basic": True,
        "norm_layer": partial(GroupNormAct, num_groups=8),
        "conv_layer": StdConv2d,
    }
    kwargs["pretrained_cfg"] = timm.models.PretrainedCfg()
    model: ResNetV2 = timm.models.build_model_with_cfg(ResNetV2, "resnet_drawings", pretrained, **(sizes | kwargs))
    return model


@dataclass
class Towers:
    """An open_clip model with what its inputs need."""

    model: Any  # an open_clip model: an nn.Module with encode_image, encode_text, logit_scale, logit_bias
    name: str
    inputs: "Inputs"

    @property
    def view(self) -> View:
        return self.inputs.view

    def tokens(self, captions: list[str]) -> Int[Tensor, "B L"]:
        return self.inputs.tokens(captions)

    @property
    def loss(self) -> Loss:
        """What the model was made for: a sigmoid loss has a logit_bias and a softmax loss none."""
        return "softmax" if self.model.logit_bias is None else "sigmoid"

    def compile(self) -> None:
        """torch.compile both towers, in place; the first batches take a minute."""
        text = self.model.text if hasattr(self.model, "text") else self.model.transformer
        self.model.visual.compile()
        text.compile()

    @torch.no_grad()
    def embed(
        self,
        pixels: UInt8[Tensor, "B 3 H W"],
        tokens: Int[Tensor, "B L"],
        *,
        batch_size: int,
        image_size: int | None = None,
        precision: ForwardPrecision = "fp32",
    ) -> Embeddings:
        """Embeddings with the model's current weights, without gradients, in micro-batches of batch_size; float32.

        image_size: pixels a side to which larger pictures are reduced first. precision: of the forward pass (autocast).
        """
        was_training = self.model.training
        self.model.eval()
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32"):
            parts = [
                (
                    self.model.encode_image(self.normalise(resize(images.to(device), image_size)), normalize=True),
                    self.model.encode_text(words.to(device), normalize=True),
                )
                for images, words in zip(pixels.split(batch_size), tokens.split(batch_size), strict=True)
            ]
        self.model.train(was_training)
        image, text = (torch.cat(side) for side in zip(*parts, strict=True))
        return Embeddings(image.float(), text.float(), *self.scale_and_bias())

    def normalise(self, pixels: Tensor) -> Float[Tensor, "B 3 H W"]:
        return normalise(pixels, self.inputs.mean, self.inputs.std)

    def scale_and_bias(self) -> tuple[float, float]:
        """logit_scale (the multiplier) and logit_bias; a softmax model has no bias, and 0 stands for it."""
        bias = self.model.logit_bias
        return float(self.model.logit_scale.detach().exp()), 0.0 if bias is None else float(bias.detach())


@dataclass(frozen=True)
class Inputs:
    """How a model takes pictures and captions, without the model: for those who only prepare them."""

    view: View
    mean: Colour
    std: Colour
    tokenizer: Any

    def tokens(self, captions: list[str]) -> Int[Tensor, "B L"]:
        return self.tokenizer(captions)

    @property
    def fingerprint(self) -> str:
        """What decides how images and captions are presented, in words."""
        tokenizer = type(self.tokenizer).__name__
        return f"{self.view!r}; mean {self.mean}; std {self.std}; {tokenizer} {self.tokenizer.context_length}"

    def prepares_as(self, other: "Inputs") -> bool:
        """Whether pixels and tokens are those of another model; mean and standard deviation are applied later."""
        return replace(self, mean=other.mean, std=other.std).fingerprint == other.fingerprint


def width(name: str) -> int:
    """Of an open_clip model's embeddings."""
    return int(open_clip.get_model_config(name)["embed_dim"])


@lru_cache(maxsize=8)
def inputs(
    name: str,
    pretrained: str | None = None,
    mean: Colour | None = None,
    std: Colour | None = None,
    interpolation: str | None = None,
    resize_mode: str | None = None,
) -> Inputs:
    """What an open_clip model takes, by its configuration and that of its pretrained tag; kept for the process.

    What is given goes before what the tag says; without a tag, pixels are scaled to -1..1.
    """
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"model.name {name!r} is no open_clip model; `open_clip.list_models()` names them")
    if pretrained is not None and not open_clip.get_pretrained_cfg(name, pretrained):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"model.pretrained {pretrained!r} is no tag of {name}, which has {known}; a file goes into "
            "reference.checkpoint"
        )
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    size = config["vision_cfg"].get("image_size", 224)  # open_clip's own default
    view = View(
        size[0] if isinstance(size, tuple | list) else size,
        interpolation=interpolation or tag.get("interpolation", "bicubic"),
        resize_mode=resize_mode or tag.get("resize_mode", "shortest"),
    )
    plain = (0.5, 0.5, 0.5)
    colours = mean or tag.get("mean", plain), std or tag.get("std", plain)
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except ImportError as error:
        raise ValueError(f"the tokenizer of {name} needs another package: {error}") from error
    return Inputs(view, *colours, tokenizer)


def create(name: str, *, seed: int, pretrained: str | None = None, takes: Inputs | None = None) -> Towers:
    """An open_clip model by name with fresh weights from `seed`, or with those of a pretrained tag.

    takes: its inputs, where not those of its configuration. Refuses towers whose output depends on the batch.
    """
    takes = takes or inputs(name, pretrained)
    if pretrained is not None:
        model = open_clip.create_model(name, pretrained, output_dict=True)
    else:
        with torch.random.fork_rng(), _warnings_off():  # open_clip warns of weights that were never asked for
            torch.manual_seed(seed)
            model = open_clip.create_model(name, load_weights=False, output_dict=True)
    refuse_batch_norm(model)
    return Towers(model, name, takes)


def inputs_of(model: Model) -> Inputs:
    """How a run file's model takes pictures and captions."""
    shown = (model.image_mean, model.image_std, model.interpolation, model.resize_mode)
    return inputs(model.name, model.pretrained, *shown)


def build(model: Model, seed: int) -> Towers:
    """A run file's model, with weights from `seed` or those of its tag."""
    return create(model.name, seed=seed, pretrained=model.pretrained, takes=inputs_of(model))


@contextmanager
def _warnings_off() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def refuse_batch_norm(model: nn.Module) -> None:
    """Scores must not depend on which examples share a micro-batch (design: Views)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a {type(module).__name__}: its output depends on the batch; use layer or group norm"
            )


def refuse_loss(towers: Towers, loss: Loss, field: str) -> None:
    """A sigmoid loss has a logit_bias and a softmax loss none: it is learnt by the one, and left over by the other."""
    has_bias = towers.model.logit_bias is not None
    if has_bias != (loss == "sigmoid"):
        remedy = "take init_logit_bias out of the model's configuration" if has_bias else "give it an init_logit_bias"
        raise ValueError(
            f"{field} {loss!r} does not fit model {towers.name}, which has {'a' if has_bias else 'no'} logit_bias: "
            f"{remedy}, or change the loss"
        )


def refuse_image_size(towers: Towers, image_size: int | None) -> None:
    """Some towers, most ViTs among them, take pictures of one size only."""
    if image_size is None or image_size == towers.view.image_size:
        return
    device = next(towers.model.parameters()).device
    try:
        with torch.no_grad():
            towers.model.encode_image(torch.zeros(2, 3, image_size, image_size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"model {towers.name} takes pictures of {towers.view.image_size} pixels and not of selection.image_size "
            f"{image_size} ({error}): leave it out, or take a model that does"
        ) from error


def load_weights(towers: Towers, checkpoint: dict[str, Any]) -> None:
    """Take the weights of an open_clip checkpoint dictionary; names may start with `module.`."""
    state = checkpoint.get("state_dict", checkpoint)
    towers.model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in _sorted_state(model):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if value.ndim
            else repr(value.item()).encode()
        )
    return digest.hexdigest()


def _sorted_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from sorted(model.state_dict().items())
