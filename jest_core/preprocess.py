"""Image bytes and captions -> what the towers take: pixels (3, H, W) uint8 and tokens (L,).

The view is open_clip's own evaluation transform, stopped before it turns to floats: a quarter of the bytes travel.
"""

import io
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from open_clip.transform import image_transform
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.transforms import CenterCrop

from jest_core import noise
from jest_core.tables import SLOT_STATUS

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # not all that Pillow opens: some of the others run programs
MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb, made an error here

# What Pillow raises on bytes that are not a whole, sound image
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, struct.error, zlib.error, OverflowError)
_AUGMENTATION = 0x617567  # context of the keyed noise: "aug"


class BadImage(ValueError):
    """Bytes that give no picture; its text is one of tables.SLOT_STATUS."""


class View:
    """The one deterministic view of an image that learner and reference both score (resize, centre crop).

    margin: resize to image_size / margin before the centre crop; 1 keeps the whole of the shorter side, 0.875 is what
    ImageNet is evaluated with. reduced: let the JPEG decoder halve the picture as often as leaves it larger than the
    view. Several times faster, not quite the same pixels: for pictures that are only looked at (`data.decode: late`).
    """

    def __init__(
        self,
        image_size: int,
        *,
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        margin: float = 1.0,
        reduced: bool = False,
    ) -> None:
        self.image_size, self.reduced = image_size, reduced
        self.interpolation, self.resize_mode = interpolation, resize_mode
        wide = round(image_size / margin)
        whole = image_transform(wide, is_train=False, interpolation=interpolation, resize_mode=resize_mode)
        # open_clip ends with ToTensor and Normalize, which `normalise` does on the device
        self.steps: list[Callable[[Image.Image], Image.Image]] = whole.transforms[:-2]
        if wide != image_size:
            self.steps.append(CenterCrop(image_size))

    def __call__(self, data: bytes | None) -> NDArray[np.uint8]:
        """Pixels (3, H, W). Raises BadImage where the bytes are no sound picture of at most MAX_PIXELS."""
        if not data:
            raise BadImage("missing")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage("too_large")
                if self.reduced:
                    scale = self.image_size / min(image.size)
                    image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))
                picture: Image.Image = image.convert("RGB")
                for step in self.steps:
                    picture = step(picture)
        except UnidentifiedImageError:
            raise BadImage("no_image") from None
        except Image.DecompressionBombError:
            raise BadImage("too_large") from None
        except BadImage:
            raise
        except _DAMAGE as error:
            raise BadImage("damaged") from error
        return np.asarray(picture).transpose(2, 0, 1)

    def smaller(self, image_size: int) -> "View":
        """The same view at a lower resolution, by the decoder's own means where it has them."""
        return View(image_size, interpolation=self.interpolation, resize_mode=self.resize_mode, reduced=True)

    def batch(
        self, images: Sequence[bytes | None], pool: Executor | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Pixels (B, 3, H, W), black where an image does not decode, and each one's number in tables.SLOT_STATUS.

        pool: threads to decode in; Pillow lets go of the interpreter while it does.
        """
        pixels = np.zeros((len(images), 3, self.image_size, self.image_size), dtype=np.uint8)
        status = np.zeros(len(images), dtype=np.uint8)

        def fill(i: int) -> None:
            try:
                pixels[i] = self(images[i])
            except BadImage as error:
                status[i] = SLOT_STATUS.index(str(error))

        for _ in map(fill, range(len(images))) if pool is None else pool.map(fill, range(len(images))):
            pass
        return pixels, status

    def __repr__(self) -> str:
        return "; ".join(" ".join(repr(step).split()) for step in self.steps if not hasattr(step, "__name__"))


def resize(pixels: UInt8[Tensor, "B 3 H W"] | Float[Tensor, "B 3 H W"], image_size: int) -> Tensor:
    """Reduce square pictures to image_size a side, as floats; smaller ones stay as they are."""
    if image_size >= pixels.shape[-1]:
        return pixels
    small = nn.functional.interpolate(
        pixels.float(), size=(image_size, image_size), mode="bicubic", antialias=True, align_corners=False
    )
    return small.clamp(0, 255)


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
