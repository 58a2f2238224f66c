"""The part `model`: an open_clip model, and how it sees pictures and captions."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from jest_core.run_file.parts import Part, Unit


class Model(Part):
    """An open_clip model: by name with fresh weights, or with those of a pretrained tag."""

    name: str = Field(examples=["ViT-B-16-SigLIP"])
    """Name of the model: one of `open_clip.list_models()`, one of those that come with jest (`jest-b-16-256`,
    `jest-l-16-256`, `jest-tiny`), or `local-dir:FOLDER` of a folder with open_clip_config.json, which also says how it
    sees pictures: `jest export` writes such folders, and Hugging Face has them. The folder is below `root`, on object
    storage too. Its weights are read where a checkpoint names the folder as well."""

    pretrained: str | None = Field(default=None, examples=["datacomp_xl_s13b_b90k"])
    """Pretrained tag: one of `open_clip.list_pretrained()` for this model. open_clip downloads the weights on the
    machine that needs them. If not given, the weights are fresh, or those of a checkpoint that another key names."""

    image_mean: tuple[float, float, float] | None = Field(default=None, examples=[[0.48145466, 0.4578275, 0.40821073]])
    """Mean of red, green and blue that is subtracted from pixels scaled to 0..1. If not given, that of the pretrained
    tag, or 0.5 each with fresh weights."""

    image_std: tuple[float, float, float] | None = Field(default=None, examples=[[0.26862954, 0.26130258, 0.27577711]])
    """Standard deviation of red, green and blue by which pixels are divided, after the mean. If not given, that of the
    pretrained tag, or 0.5 each with fresh weights."""

    interpolation: Literal["bicubic", "bilinear"] | None = None
    """Interpolation by which pictures are resized to the model's image size. If not given, that of the pretrained tag,
    or bicubic with fresh weights."""

    resize_mode: Literal["shortest", "longest", "squash"] | None = None
    """How pictures become square, in open_clip's words. shortest: the shorter side is resized, and the centre cropped.
    longest: the longer side is resized, and the rest padded. squash: both sides are resized, whatever the aspect ratio.
    If not given, that of the pretrained tag, or shortest with fresh weights."""

    context_length: Annotated[PositiveInt | None, Unit("tokens")] = None
    """Length to which captions are cut or padded, in tokens. If not given, the model's."""
