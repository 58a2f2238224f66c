"""Image bytes and captions -> what the towers take: pixels (3, H, W) uint8 and tokens (L,).

The view is open_clip's own evaluation transform, stopped before it turns to floats: a quarter of the bytes travel.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor

from jest_core import noise

MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb, made an error here

_AUGMENTATION = 0x617567  # context of the keyed noise: "aug"


class View:
    """The one deterministic view of an image that learner and reference both score (resize, centre crop)."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        whole = image_transform(image_size, is_train=False)
        # open_clip ends with ToTensor and Normalize, which `normalise` does on the device
        self.steps: list[Callable[[Image.Image], Image.Image]] = whole.transforms[:-2]

    def __call__(self, data: bytes | None) -> NDArray[np.uint8] | None:
        """Pixels (3, H, W), or None where the bytes are no image that can be decoded within MAX_PIXELS."""
        if not data:
            return None
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None
                picture: Image.Image = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
            return None  # what Pillow raises on bytes that are not a whole, sound image
        for step in self.steps:
            picture = step(picture)
        return np.asarray(picture).transpose(2, 0, 1)

    def batch(self, images: Sequence[bytes | None]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Pixels (B, 3, H, W), black where an image does not decode, and which of them did."""
        pixels = np.zeros((len(images), 3, self.image_size, self.image_size), dtype=np.uint8)
        valid = np.zeros(len(images), dtype=bool)
        for i, data in enumerate(images):
            if (view := self(data)) is not None:
                pixels[i], valid[i] = view, True
        return pixels, valid

    def __repr__(self) -> str:
        return "; ".join(" ".join(repr(step).split()) for step in self.steps if not hasattr(step, "__name__"))


def normalise(
    pixels: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "B 3 H W"]:
    """Pixels 0..255 -> the towers' input, in the memory order that convolutions are fastest with."""
    shape = (1, 3, 1, 1)
    centre = torch.tensor(mean, device=pixels.device).view(shape) * 255
    width = torch.tensor(std, device=pixels.device).view(shape) * 255
    return ((pixels.float() - centre) / width).contiguous(memory_format=torch.channels_last)


def augment(
    pixels: UInt8[Tensor, "B 3 H W"],
    uids: Int[Tensor, "B 2"],
    occurrences: Int[Tensor, "B"],
    *,
    shift_pixels: int,
    colour: float,
    seed: int,
    step: int,
) -> Float[Tensor, "B 3 H W"]:
    """Random views for the training pass: shifts of up to shift_pixels (edges repeated), channel gain and offset.

    colour is the largest relative change. Everything is keyed by (seed, step, uid), so an example gets the same view on
    any learner. Pixels stay in 0..255, as floats.
    """

    def draw(i: int) -> Tensor:
        return 2 * noise.uniform(uids, occurrences, seed, step, _AUGMENTATION, i) - 1  # (-1, 1)

    out = pixels.float()
    if shift_pixels:
        _, _, height, width = pixels.shape
        rows = torch.arange(height, device=pixels.device) + torch.round(draw(0) * shift_pixels).long()[:, None]
        columns = torch.arange(width, device=pixels.device) + torch.round(draw(1) * shift_pixels).long()[:, None]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        batch = torch.arange(len(pixels), device=pixels.device)[:, None, None]
        # advanced indexing puts the channels last: (B, H, W, 3)
        out = out[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if colour:
        gains = 1 + colour * torch.stack([draw(i) for i in (2, 3, 4)], 1).float()[:, :, None, None]
        offsets = 255 * 0.5 * colour * draw(5).float()[:, None, None, None]
        out = (out * gains + offsets).clamp(0, 255)
    return out
