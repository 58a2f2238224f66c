"""Pixels of a view -> the input of a model: resized, augmented, normalised, on the device of the pixels."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from jest_core import noise
from jest_core.noise import Purpose


def resize(pixels: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"], image_size: int) -> Tensor:
    """Reduce square images to image_size pixels a side, as floats; smaller images are returned unchanged."""
    if image_size >= pixels.shape[-1]:
        return pixels
    small = nn.functional.interpolate(
        pixels.float(), size=(image_size, image_size), mode="bicubic", antialias=True, align_corners=False
    )
    return small.clamp(0, 255)


def normalise(
    pixels: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "B 3 H W"]:
    """Pixels 0..255 -> the input of a model, in channels-last order, with which convolutions are fastest."""
    shape = (1, 3, 1, 1)
    centre = torch.tensor(mean, device=pixels.device).view(shape) * 255
    width = torch.tensor(std, device=pixels.device).view(shape) * 255
    floats = pixels.to(torch.float32, memory_format=torch.channels_last, copy=True)  # the only one: large batches come
    return floats.sub_(centre).div_(width)


def augment(
    pixels: UInt8[Tensor, "B 3 H W"],
    uids: Int[Tensor, "B 2"],
    occurrences: Int[Tensor, " B"],
    *,
    shift_pixels: int,
    colour: float,
    seed: int,
    step: int,
) -> Float[Tensor, "B 3 H W"]:
    """Random views for the training pass: shifts of up to shift_pixels (edges repeated), channel gain and offset.

    colour is the largest relative change. The random numbers depend on (seed, step, uid, occurrence) alone, so an
    example gets the same view on any learner. Pixels stay in 0..255, as floats.
    """

    def draw(i: int) -> Tensor:
        return 2 * noise.uniform(uids, occurrences, seed, step, Purpose.AUGMENTATION, i) - 1  # (-1, 1)

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
