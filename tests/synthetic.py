"""Synthetic embeddings with the structure that selection depends on, from a seed: for tests and benchmarks."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from jest_core.selection.algorithm import Embeddings


def structured_models(
    n: int,
    width: int,
    *,
    reference_width: int | None = None,
    seed: int = 0,
    share_of_noise: float = 0.4,
    device: str = "cpu",
) -> tuple[Embeddings, Embeddings]:
    """A half-trained learner and a well-trained reference, on n pairs of a noisy pool.

    Concepts come in families, with a long-tailed (Zipf) popularity; share_of_noise of the captions belong to another
    picture. The learner has learnt each concept to a different degree, and its embeddings are in a cone (cosines are
    positive on average), as those of a model early in training; the reference has learnt all concepts. A seed gives
    other numbers on another device.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    n_concepts = max(8, n // 16)
    n_families = max(4, n_concepts // 16)
    family = torch.randint(n_families, (n_concepts,), generator=generator, device=device)
    popularity = 1 / torch.arange(1.0, n_concepts + 1, device=device)
    in_picture = torch.multinomial(popularity, n, replacement=True, generator=generator)
    elsewhere = in_picture[torch.randperm(n, generator=generator, device=device)]
    is_noise = torch.rand(n, generator=generator, device=device) < share_of_noise
    in_caption = torch.where(is_noise, elsewhere, in_picture)

    def model(width: int, skill: Tensor, cone: float, scale: float, bias: float) -> Embeddings:
        concepts = skill[:, None] * (normal(n_families, width)[family] + 0.8 * normal(n_concepts, width))
        common = cone * normal(1, width)
        image, text = (
            torch.cat([normalize(concepts[part] + common + normal(len(part), width), dim=1) for part in c.split(8192)])
            for c in (in_picture, in_caption)
        )
        return Embeddings(image, text, scale, bias)

    learned = 0.2 + 0.8 * torch.rand(n_concepts, generator=generator, device=device)
    return (
        model(width, learned, 1.0, 20.0, -8.0),
        model(reference_width or width, torch.full((n_concepts,), 1.5, device=device), 0.3, 25.0, -12.0),
    )


def uids(n: int) -> NDArray[np.uint64]:
    """(n, 2) distinct uids."""
    return np.stack([np.arange(n), np.full(n, 7)], 1).astype(np.uint64)
