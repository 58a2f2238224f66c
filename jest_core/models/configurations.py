"""open_clip's models by name, with jest's own: their sizes, and how they take pictures and captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer
from timm.layers import GroupNormAct, StdConv2d
from timm.models.resnetv2 import ResNetV2

from jest_core.examples.inputs import Colour, Inputs
from jest_core.examples.tokenizer import ClipTokenizer, Tokenizer
from jest_core.examples.view import View
from jest_core.run_file import Model

open_clip.add_model_config(Path(str(files("jest_core.models") / "configs")))


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


def configuration(name: str) -> dict[str, Any]:
    """An open_clip model's. Raises ValueError where there is no such model."""
    config: dict[str, Any] | None = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"model.name {name!r} is no open_clip model; `open_clip.list_models()` names them")
    return config


def width(name: str) -> int:
    """Of an open_clip model's embeddings."""
    return int(configuration(name)["embed_dim"])


def image_size(name: str) -> int:
    """Of the pictures that an open_clip model takes, in pixels a side."""
    size = configuration(name)["vision_cfg"].get("image_size", 224)  # open_clip's own default
    return int(size[0] if isinstance(size, tuple | list) else size)


def context_length(name: str, given: int | None = None) -> int:
    """Of the captions that an open_clip model takes, in tokens."""
    return int(given or configuration(name)["text_cfg"].get("context_length", 77))  # open_clip's own default


def inputs_of(model: Model) -> Inputs:
    """How a run file's model takes pictures and captions."""
    shown = (model.image_mean, model.image_std, model.interpolation, model.resize_mode)
    return inputs(model.name, model.pretrained, *shown, model.context_length)


@lru_cache(maxsize=8)
def inputs(
    name: str,
    pretrained: str | None = None,
    mean: Colour | None = None,
    std: Colour | None = None,
    interpolation: str | None = None,
    resize_mode: str | None = None,
    context_length: int | None = None,
) -> Inputs:
    """What an open_clip model takes, by its configuration and that of its pretrained tag; kept for the process.

    What is given goes before what the tag says; without a tag, pixels are scaled to -1..1.
    """
    configuration(name)
    if pretrained is not None and not open_clip.get_pretrained_cfg(name, pretrained):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"model.pretrained {pretrained!r} is no tag of {name}, which has {known}; a file goes into "
            "reference.checkpoint"
        )
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    view = View(
        image_size(name),
        interpolation=interpolation or tag.get("interpolation", "bicubic"),
        resize_mode=resize_mode or tag.get("resize_mode", "shortest"),
    )
    plain = (0.5, 0.5, 0.5)
    colours = mean or tag.get("mean", plain), std or tag.get("std", plain)
    return Inputs(view, *colours, _tokenizer(name, context_length))


def _tokenizer(name: str, length: int | None) -> Tokenizer:
    found = open_clip_tokenizer(name, context_length(name, length))
    if type(found) is SimpleTokenizer and not configuration(name)["text_cfg"].get("tokenizer_kwargs"):
        return ClipTokenizer(found.context_length)
    return OpenClipTokenizer(name, found.context_length, type(found).__name__)


@dataclass(frozen=True)
class OpenClipTokenizer:
    """The tokenizer that open_clip gives a model, where that is another."""

    model: str
    context_length: int
    name: str

    def __call__(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Tokens (B, context_length). Raises ValueError where the model is not here, or has another tokenizer."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        found = open_clip_tokenizer(self.model, self.context_length)
        if type(found).__name__ != self.name:
            raise ValueError(f"{self.model} has a {type(found).__name__} here, and a {self.name} where the run started")
        return np.asarray(found(captions), np.int64)


@lru_cache(maxsize=8)
def open_clip_tokenizer(name: str, length: int) -> Any:
    """What open_clip gives a model. Raises ValueError where there is no such model, or a package that it needs is
    missing."""
    configuration(name)
    try:
        return open_clip.get_tokenizer(name, context_length=length)
    except ImportError as error:
        raise ValueError(f"the tokenizer of {name} needs another package: {error}") from error
