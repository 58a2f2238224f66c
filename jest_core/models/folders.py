"""A folder with a model, as open_clip opens it by `local-dir:FOLDER`: weights, and open_clip_config.json with the rest.

`jest export RUN.yaml model FOLDER` writes one, and a model for open_clip downloaded from Hugging Face is one. This
module imports neither PyTorch nor open_clip.
"""

import json
from pathlib import Path
from typing import Any, TypedDict, cast

PREFIX = "local-dir:"  # of a model's name
FILE = "open_clip_config.json"
_PARTS = ("embed_dim", "vision_cfg", "text_cfg")


class Preprocessing(TypedDict, total=False):
    """Which pixels a model needs. What is missing is as in open_clip: CLIP's colours, bicubic, shortest."""

    size: int | list[int]  # in pixels
    mode: str
    mean: list[float]  # of red, green and blue in 0..1
    std: list[float]
    interpolation: str
    resize_mode: str


class OpenClipConfig(TypedDict):
    """The content of open_clip_config.json."""

    model_cfg: Any  # as open_clip's model_configs/*.json
    preprocess_cfg: Preprocessing


def read(name: str) -> OpenClipConfig:
    """The configuration of `local-dir:FOLDER`. Raises FileNotFoundError or ValueError, naming what is wrong there."""
    folder = name.removeprefix(PREFIX)
    path = Path(folder) / FILE
    if "://" in folder:
        raise ValueError(f"model.name {name!r} is not on a disk: copy the folder to one, on a cluster to each node")
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"model.name {name!r}: there is no {path}. Name a folder that `jest export` wrote, or one of a model for "
            "open_clip from Hugging Face; on a cluster each node needs it"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download or export the folder again") from error
    model = content.get("model_cfg") if isinstance(content, dict) else None
    if not isinstance(model, dict) or any(part not in model for part in _PARTS):
        raise ValueError(f"{path} has no model_cfg with {', '.join(_PARTS)}: download or export the folder again")
    if (model["text_cfg"].get("tokenizer_kwargs") or {}).get("trust_remote_code"):
        raise ValueError(f"{path} asks to run code of the tokenizer: take trust_remote_code out of tokenizer_kwargs")
    return {"model_cfg": model, "preprocess_cfg": cast(Preprocessing, content.get("preprocess_cfg") or {})}
