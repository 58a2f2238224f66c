"""One model's embeddings of a super-batch, and what turns them into logits."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from jest_core.losses import TILE


@dataclass(frozen=True)
class Embeddings:
    """One model's unit-norm embeddings of a super-batch, or of a learner's share of it.

    image, text: (B, D) in float16, bfloat16 or float32. logit_scale is the multiplier, not its logarithm.
    logit_bias is added to the logits; the softmax loss does not use it.
    """

    image: Tensor  # without a shape here: `select` checks it, with an error that says what is wrong
    text: Tensor
    logit_scale: float | Tensor
    logit_bias: float | Tensor = 0.0

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: Tensor | slice) -> "Embeddings":
        return Embeddings(self.image[rows], self.text[rows], self.logit_scale, self.logit_bias)

    def matched_logits(self) -> Float[Tensor, " B"]:
        """The logit of each example's image with its text, float32; NaN or infinite where an embedding is."""
        tiles = zip(self.image.split(TILE), self.text.split(TILE), strict=True)
        cosines = torch.cat([(image.float() * text.float()).sum(1) for image, text in tiles])
        return self.logit_scale * cosines + self.logit_bias
