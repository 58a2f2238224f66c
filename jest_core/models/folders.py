"""A folder with a model, as open_clip opens it by `local-dir:FOLDER`: weights, and open_clip_config.json with the rest.

`jest export RUN.yaml model FOLDER` writes one, and a model for open_clip downloaded from Hugging Face is one. On object
storage it is there once for all machines: each copies what is not weights, which are read as every checkpoint is. This
module imports neither PyTorch nor open_clip.
"""

import hashlib
import json
import os
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict, cast

PREFIX = "local-dir:"  # of a model's name
FILE = "open_clip_config.json"
_PARTS = ("embed_dim", "vision_cfg", "text_cfg")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz")
_MOST_BYTES = 64 << 20  # of a file beside the weights; the largest vocabularies have 35 MB


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
    path = f"{folder.rstrip('/')}/{FILE}"
    try:
        content = json.loads((Path(on_disk(name).removeprefix(PREFIX)) / FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"model.name {name!r}: there is no {path}. Name a folder that `jest export` wrote, or one of a model for "
            "open_clip from Hugging Face (`hf download REPOSITORY --local-dir FOLDER`); for a cluster copy it below "
            "root, to storage that all nodes reach"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download or export the folder again") from error
    model = content.get("model_cfg") if isinstance(content, dict) else None
    if not isinstance(model, dict) or any(part not in model for part in _PARTS):
        raise ValueError(f"{path} has no model_cfg with {', '.join(_PARTS)}: download or export the folder again")
    if (model["text_cfg"].get("tokenizer_kwargs") or {}).get("trust_remote_code"):
        raise ValueError(f"{path} asks to run code of the tokenizer: take trust_remote_code out of tokenizer_kwargs")
    return {"model_cfg": model, "preprocess_cfg": cast(Preprocessing, content.get("preprocess_cfg") or {})}


def on_disk(name: str) -> str:
    """The name by which open_clip on this machine opens a model: that of a folder on object storage is copied, without
    its weights, into the user's cache folder. Other names stay."""
    folder = name.removeprefix(PREFIX)
    return f"{PREFIX}{_copied(folder.rstrip('/'))}" if name.startswith(PREFIX) and "://" in folder else name


@lru_cache(maxsize=64)
def _copied(url: str) -> str:
    """A copy of a folder's files but its weights, by what they are now: another content is another copy."""
    import fsspec

    fs, inner = fsspec.url_to_fs(url, **({"use_listings_cache": False} if url.startswith(("s3://", "gs://")) else {}))
    small = [entry for entry in fs.ls(inner, detail=True) if _is_small(entry, url)]
    versions = sorted(str([e["name"], e["size"], e.get("ETag"), e.get("mtime"), e.get("updated")]) for e in small)
    target = _cache() / hashlib.sha256(json.dumps([url, versions]).encode()).hexdigest()[:32]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            copy = Path(folder) / "model"
            copy.mkdir()
            for entry in small:
                (copy / entry["name"].rsplit("/", 1)[-1]).write_bytes(fs.cat_file(entry["name"]))
            try:
                os.rename(copy, target)
            except OSError:
                if not target.exists():  # another process was faster
                    raise
    return str(target)


def _is_small(entry: dict[str, Any], url: str) -> bool:
    """Whether a file is copied. Raises ValueError for one that is too large to belong to a configuration."""
    name = entry["name"].rsplit("/", 1)[-1]
    if entry["type"] != "file" or name.endswith(_WEIGHTS) or not name:
        return False
    if entry["size"] > _MOST_BYTES:
        raise ValueError(
            f"{url}/{name} has {entry['size']:,} bytes, and is neither weights nor a part of a tokenizer: remove it"
        )
    return True


@lru_cache(maxsize=1)
def _cache() -> Path:
    """Where copies are kept; of this process alone where the user's cache folder cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jest" / "models"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    return folder if usable else Path(tempfile.mkdtemp(prefix="jest-models-"))
