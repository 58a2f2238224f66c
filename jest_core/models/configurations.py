"""open_clip's models by name, with jest's: their sizes, and which pixels and tokens they need."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import lru_cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import open_clip
import timm
from numpy.typing import NDArray
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from timm.layers import GroupNormAct, StdConv2d
from timm.models.resnetv2 import ResNetV2

from jest_core.choices import Decoder
from jest_core.examples.decode import View
from jest_core.examples.inputs import Colour, Inputs
from jest_core.examples.tokenizer import MAX_CHARACTERS, ClipTokenizer, Tokenizer, parts_of, vocabulary
from jest_core.models import folders
from jest_core.models.folders import OpenClipConfig, Preprocessing
from jest_core.run_file import Model

open_clip.add_model_config(Path(str(files("jest_core.models") / "configs")))


@timm.models.register_model
def resnet_drawings(pretrained: bool = False, **kwargs: Any) -> ResNetV2:
    """timm's pre-activation ResNet, made smaller for 64-pixel drawings, with group norm and standardised convolutions.

    The image tower of the demonstration: of the small towers that were tried, it learned most per CPU second.
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


class _Image(TypedDict, total=False):
    image_size: int | list[int]
    timm_model_name: str


class _Text(TypedDict, total=False):
    context_length: int
    tokenizer_kwargs: dict[str, object]


class Configuration(TypedDict):
    """What is read of an open_clip model's configuration."""

    embed_dim: int
    vision_cfg: _Image
    text_cfg: _Text


def configuration(name: str) -> Configuration:
    """The configuration of an open_clip model, by its name or `local-dir:FOLDER`.

    Raises ValueError where there is no such model, FileNotFoundError where there is no such folder.
    """
    if name.startswith(folders.PREFIX):
        of_folder: Configuration = folders.read(name)["model_cfg"]
        return of_folder
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:")
        raise ValueError(
            f"model.name {name!r} is not on this machine: `hf download {repository} --local-dir FOLDER`, on a cluster "
            "copy FOLDER below root, then name it local-dir:FOLDER, and FOLDER as the checkpoint"
        )
    config: Configuration | None = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"model.name {name!r} is no open_clip model; `open_clip.list_models()` lists them")
    return config


def width(name: str) -> int:
    """Width of an open_clip model's embeddings."""
    return configuration(name)["embed_dim"]


def image_size(name: str) -> int:
    """Size of an open_clip model's images, in pixels a side."""
    size = configuration(name)["vision_cfg"].get("image_size", 224)  # open_clip's default
    return size if isinstance(size, int) else size[0]


def context_length(name: str, given: int | None = None) -> int:
    """Length of an open_clip model's captions, in tokens: the given one, or that of its configuration."""
    return given or configuration(name)["text_cfg"].get("context_length", 77)  # open_clip's default


def inputs_of(model: Model, decoder: Decoder = "pillow") -> Inputs:
    """Which pixels and tokens a run file's model needs. decoder: the run file's data.decoder."""
    shown = (model.image_mean, model.image_std, model.interpolation, model.resize_mode)
    return inputs(model.name, model.pretrained, *shown, model.context_length, decoder=decoder)


@lru_cache(maxsize=8)
def inputs(
    name: str,
    pretrained: str | None = None,
    mean: Colour | None = None,
    std: Colour | None = None,
    interpolation: str | None = None,
    resize_mode: str | None = None,
    context_length: int | None = None,
    *,
    decoder: Decoder = "pillow",
) -> Inputs:
    """Which pixels and tokens an open_clip model needs, by its configuration and its pretrained tag; cached.

    Arguments override what the tag or the model's folder says; without either, pixels are scaled to -1..1. Raises
    ValueError where open_clip has no such model or no such tag of it.
    """
    configuration(name)
    if pretrained is not None and not open_clip.get_pretrained_cfg(name, pretrained):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"model.pretrained {pretrained!r} is no tag of {name}, which has {tags}; a file goes into "
            "reference.checkpoint"
        )
    tag = _preprocessing(name, pretrained)
    view = View(
        image_size(name),
        interpolation=interpolation or tag.get("interpolation", "bicubic"),
        resize_mode=resize_mode or tag.get("resize_mode", "shortest"),
        decoder=decoder,
    )
    plain = (0.5, 0.5, 0.5)
    colours = tuple(mean or tag.get("mean", plain)), tuple(std or tag.get("std", plain))
    return Inputs(view, *colours, _tokenizer(name, context_length))


def _preprocessing(name: str, pretrained: str | None) -> dict[str, Any]:
    """What a folder or a pretrained tag says of a model's pixels; nothing for a model with fresh weights."""
    if name.startswith(folders.PREFIX):
        return dict(merge_preprocess_dict(PreprocessCfg(), folders.read(name)["preprocess_cfg"]))
    return dict(open_clip.get_pretrained_cfg(name, pretrained)) if pretrained else {}


def open_clip_config(name: str, inputs: Inputs) -> OpenClipConfig:
    """The open_clip_config.json by which a stock open_clip sees pictures and captions as jest does."""
    model = configuration(name)
    text = {**model["text_cfg"], "context_length": inputs.tokenizer.context_length}
    return {"model_cfg": {**model, "text_cfg": text}, "preprocess_cfg": _preprocess_cfg(inputs)}


def _preprocess_cfg(inputs: Inputs) -> Preprocessing:
    return {
        "size": inputs.view.image_size,
        "mode": "RGB",
        "mean": list(inputs.mean),
        "std": list(inputs.std),
        "interpolation": inputs.view.interpolation,
        "resize_mode": inputs.view.resize_mode,
    }


def refuse_other_pixels(trained: OpenClipConfig, inputs: Inputs, source: str, part: str) -> None:
    """Raises ValueError where a model would see other pixels than those that its weights were trained on.

    trained: what the checkpoint says; source: its file; part: what stands before `image_mean` in the run file.
    """
    here: dict[str, Any] = dict(_preprocess_cfg(inputs))
    keys = {"mean": "image_mean", "std": "image_std", "interpolation": "interpolation", "resize_mode": "resize_mode"}
    there: dict[str, Any] = dict(trained.get("preprocess_cfg") or {})
    for key, field in keys.items():
        if there.get(key, here[key]) != here[key]:
            raise ValueError(
                f"{source} was trained on pictures with {key} {there[key]}, and {part}{field} makes it {here[key]}: "
                f"set {part}{field} to {there[key]}"
            )


def needs_jest(name: str) -> bool:
    """Whether a stock open_clip lacks the model's image tower, as timm has none of its name."""
    tower = configuration(name)["vision_cfg"].get("timm_model_name")
    return tower is not None and not timm.models.model_entrypoint(tower).__module__.startswith("timm.")


def _tokenizer(name: str, length: int | None) -> Tokenizer:
    tokenizer = open_clip_tokenizer(name, context_length(name, length))
    if type(tokenizer) is SimpleTokenizer and not configuration(name)["text_cfg"].get("tokenizer_kwargs"):
        return ClipTokenizer(tokenizer.context_length)
    return OpenClipTokenizer(name, tokenizer.context_length, type(tokenizer).__name__, _identity(tokenizer))


@dataclass(frozen=True)
class OpenClipTokenizer:
    """A model's tokenizer by open_clip, where that is not CLIP's."""

    model: str
    context_length: int
    name: str
    identity: str | None = dataclass_field(default=None, compare=False)

    def __call__(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Tokens (B, context_length). Raises ValueError where open_clip here has another tokenizer for the model."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        tokenizer, name = open_clip_tokenizer(self.model, self.context_length), self.name
        if (here := type(tokenizer).__name__) != name:
            raise ValueError(f"{self.model} has a {here} here, and a {name} where the run started")
        return _tokens(tokenizer, [caption[:MAX_CHARACTERS] for caption in captions])


def _identity(tokenizer: Any) -> str | None:
    """Of a tokenizer by Hugging Face's library in Rust: a digest of what decides its tokens, not of its name."""
    backend = getattr(getattr(tokenizer, "tokenizer", None), "backend_tokenizer", None)
    if not isinstance(tokenizer, HFTokenizer) or backend is None:
        return None
    whole = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # those are of the last call
    hugging, ids = tokenizer.tokenizer, ("bos", "eos", "sep", "cls", "pad", "unk")
    settings = [
        *(getattr(hugging, f"{name}_token_id") for name in ids),
        *(hugging.padding_side, hugging.truncation_side, tokenizer.clean_fn.__name__),
        *(tokenizer.strip_sep_token, tokenizer.tokenizer_mode),
    ]
    digest = hashlib.sha256(json.dumps([settings, whole], sort_keys=True).encode()).hexdigest()[:32]
    return f"{type(tokenizer).__name__} {tokenizer.context_length} {digest}"


def _tokens(tokenizer: Any, captions: list[str]) -> NDArray[np.int64]:
    """open_clip's tokenizers raise ValueError on &#999...; with more digits than Python reads: it counts as text."""
    try:
        return np.asarray(tokenizer(captions), np.int64)
    except ValueError:
        if len(captions) == 1:
            return np.asarray(tokenizer([captions[0].replace("&", "")]), np.int64)
        return np.concatenate([_tokens(tokenizer, [caption]) for caption in captions])


@lru_cache(maxsize=8)
def open_clip_tokenizer(name: str, length: int) -> Any:
    """A model's tokenizer by open_clip. Raises ValueError where there is no such model, or a package is missing."""
    configuration(name)
    try:
        tokenizer = open_clip.get_tokenizer(folders.on_disk(name), context_length=length)
    except ImportError as error:
        raise ValueError(f"the tokenizer of {name} needs another package: {error}") from error
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.bpe_ranks == vocabulary().ranks:
        tokenizer.bpe = lambda word: tokenizer.cache.get(word) or " ".join(parts_of(word))  # its own takes n * n steps
    return tokenizer
