"""ViT image towers of open_clip and timm at several resolutions, with one set of weights.

FlexiViT, Beyer et al. 2022 (arXiv:2212.08013). A flexible tower keeps its parameters, their names and its forward pass.
At another resolution, the patch kernel and the position embeddings are multiplied by a fixed matrix each.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import VisionTransformer as ClipTower
from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_patch_embed
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmTower
from torch import Tensor, nn


@dataclass(frozen=True)
class Resolution:
    """At what resolution an image tower works: pixels a side of an image, and of a patch (None: as trained)."""

    image_size: int
    patch_size: int | None = None


def make_flexible(visual: nn.Module) -> None:
    """Make a ViT work at every resolution, in place; other image towers are left unchanged.

    With class-token, average or attention pooling; of open_clip or timm (plain, or EVA's with rotary embeddings).
    """
    tower: Any = _tower(visual)
    match tower:
        case ClipTower():
            flexible: type[nn.Module] = _FlexibleClipTower
            conv, grid = tower.conv1, tower.grid_size
        case TimmTower() | Eva() if type(tower) in (TimmTower, Eva) and type(tower.patch_embed) is PatchEmbed:
            if type(getattr(tower, "rope", None)) not in (type(None), RotaryEmbeddingCat):
                return
            flexible = _FlexibleEva if isinstance(tower, Eva) else _FlexibleTimmTower
            conv, grid = tower.patch_embed.proj, tower.patch_embed.grid_size
        case _:
            return
    if grid[0] != grid[1] or conv.kernel_size[0] != conv.kernel_size[1]:
        return  # images of jest are square
    tower.__class__, conv.__class__ = flexible, _FlexibleConv
    tower.trained_grid = tower.grid = grid[0]
    conv.patch_size = conv.kernel_size[0]


def is_flexible(visual: nn.Module) -> bool:
    """Whether make_flexible has made the tower work at every resolution."""
    return isinstance(_tower(visual), _FlexibleClipTower | _FlexibleTimmTower | _FlexibleEva)


def patch_size(visual: nn.Module) -> int:
    """The patch size of a flexible tower's weights, in pixels a side."""
    return int(_conv(_tower(visual)).kernel_size[0])


@contextmanager
def at(visual: nn.Module, resolution: Resolution) -> Iterator[None]:
    """Within the block, a flexible tower works at this resolution.

    Other towers are left unchanged. The matrices are computed the first time, and stored in the tower.
    """
    if not is_flexible(visual):
        yield
        return
    tower: Any = _tower(visual)
    conv = _conv(tower)
    before = tower.grid, conv.patch_size
    size = resolution.patch_size or conv.kernel_size[0]
    _set(tower, resolution.image_size // size, size)
    try:
        yield
    finally:
        _set(tower, *before)


def kernel_map(size: int, other: int) -> Float[Tensor, "P Q"]:
    """PI-resize of FlexiViT, from P = size ** 2 weights to Q = other ** 2: the pseudo-inverse of R, the bilinear resize
    of a patch from `size` pixels a side to `other`. The product of R x and the resized kernel is that of a patch x
    and the kernel: exactly where `other` is larger, and by least squares where it is smaller.
    """
    every = torch.eye(size * size).reshape(-1, 1, size, size)
    return resample_patch_embed(every, [other, other], interpolation="bilinear").flatten(1)


def position_map(grid: int, other: int) -> Float[Tensor, "Q P"]:
    """Interpolation of position embeddings from a grid of `grid` patches a side to one of `other`."""
    return resample_abs_pos_embed(torch.eye(grid * grid)[None], [other, other], [grid, grid], num_prefix_tokens=0)[0]


def _tower(visual: nn.Module) -> nn.Module:
    """The ViT itself, without open_clip's adapter around the towers of timm."""
    return getattr(visual, "trunk", visual)


def _conv(tower: Any) -> "_FlexibleConv":
    return tower.conv1 if isinstance(tower, ClipTower) else tower.patch_embed.proj


def _set(tower: Any, grid: int, size: int) -> None:
    conv, device = _conv(tower), _conv(tower).weight.device
    if not hasattr(tower, f"to_grid_{grid}"):
        tower.register_buffer(f"to_grid_{grid}", position_map(tower.trained_grid, grid).to(device), persistent=False)
    if not hasattr(conv, f"to_patch_{size}"):
        conv.register_buffer(f"to_patch_{size}", kernel_map(conv.kernel_size[0], size).to(device), persistent=False)
    tower.grid, conv.patch_size = grid, size
    if isinstance(tower, TimmTower | Eva):
        tower.patch_embed.patch_size = (size, size)
        # at the trained resolution patches may leave a margin uncovered; at any other, timm requires that they divide
        tower.patch_embed.strict_img_size = grid == tower.trained_grid and size == conv.kernel_size[0]
    rope = getattr(tower, "rope", None)
    if rope is not None and not tower.dynamic_img_size:  # a dynamic tower computes them in each forward pass
        if not hasattr(rope, f"at_grid_{grid}"):
            other = deepcopy(rope)
            other.update_feat_shape([grid, grid])
            rope.register_buffer(f"at_grid_{grid}", other.pos_embed, persistent=False)
        rope.pos_embed = getattr(rope, f"at_grid_{grid}")


class _FlexibleConv(nn.Conv2d):
    """The patch embedding for patches of patch_size pixels a side; its weights are for kernel_size."""

    patch_size: int

    def forward(self, input: Tensor) -> Tensor:
        size = self.patch_size
        if size == self.kernel_size[0]:
            return super().forward(input)
        kernel = _product(self.weight.flatten(2), getattr(self, f"to_patch_{size}")).unflatten(2, (size, size))
        return F.conv2d(input, kernel, self.bias, stride=size)


def _positions(tower: Any, embeddings: Tensor, n_prefix: int) -> Tensor:
    """Position embeddings (..., N, D) for the current grid; those of n_prefix tokens before the patches are kept."""
    if tower.grid == tower.trained_grid:
        return embeddings
    resized = _product(getattr(tower, f"to_grid_{tower.grid}"), embeddings[..., n_prefix:, :])
    return torch.cat([embeddings[..., :n_prefix, :], resized], -2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of a and b; under autocast the result is rounded once, where it is used."""
    with torch.autocast("cpu" if a.is_meta else a.device.type, enabled=False):
        return a @ b


class _FlexibleClipTower(ClipTower):  # type: ignore[misc]
    @property
    def positional_embedding(self) -> Tensor:
        embeddings = self._parameters["positional_embedding"]
        assert embeddings is not None
        return _positions(self, embeddings, 1)


def _timm_positions(self: Any) -> Tensor | None:
    embeddings = self._parameters.get("pos_embed")
    if embeddings is None or self.dynamic_img_size:  # a dynamic tower interpolates them itself
        return embeddings
    return _positions(self, embeddings, 0 if self.no_embed_class else self.num_prefix_tokens)


class _FlexibleTimmTower(TimmTower):
    pos_embed = property(_timm_positions)


class _FlexibleEva(Eva):
    pos_embed = property(_timm_positions)
