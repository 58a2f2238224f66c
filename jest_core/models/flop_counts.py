"""FLOPs of a forward pass, by PyTorch's counter, on a model of the same configuration without weights."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from jest_core.models import configurations, flexible, towers
from jest_core.models.flexible import Resolution


def forward_flops(
    name: str, context_length: int | None, image_size: int | None, patch_size: int | None
) -> tuple[float, float]:
    """FLOPs of one pair's forward pass through the image tower and the text tower of an open_clip model."""
    model = towers.outline(name, context_length)
    size = image_size or configurations.image_size(name)

    def count(n: int) -> tuple[int, int]:
        pixels = torch.zeros(n, 3, size, size, device="meta")
        tokens = torch.zeros(n, configurations.context_length(name, context_length), dtype=torch.int64, device="meta")
        with torch.no_grad(), flexible.at(model.visual, Resolution(size, patch_size)):
            with FlopCounterMode(display=False) as image:
                model.encode_image(pixels)
            with FlopCounterMode(display=False) as text:
                model.encode_text(tokens)
        return image.get_total_flops(), text.get_total_flops()

    # the difference, as resizing the patch kernel costs the same for any number of images
    (image, text), (more_image, more_text) = count(1), count(2)
    return float(more_image - image), float(more_text - text)
