"""The forward pass with gradients: this learner's share of a sub-batch, at one or two resolutions -> embeddings."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from jest_core.collectives import Learners
from jest_core.examples.preprocess import augment
from jest_core.examples.super_batch import Examples
from jest_core.models.flexible import Resolution
from jest_core.models.towers import Towers
from jest_core.run_file import Run


@dataclass(frozen=True)
class Group:
    """Examples of a sub-batch that are trained at one resolution."""

    examples: Examples
    resolution: Resolution


class Features(NamedTuple):
    """Unit-norm embeddings of all groups, concatenated, float32, with what turns them into logits."""

    image: Float[Tensor, "b D"]
    text: Float[Tensor, "b D"]
    logit_scale: Float[Tensor, ""]
    logit_bias: Float[Tensor, ""] | None


class TrainingPass(nn.Module):
    """A module, so that DistributedDataParallel can wrap it. With sharded towers all learners make equally many passes.

    Where training.micro_batch_size is given, that many examples are embedded at a time and their activations are not
    kept: the backward pass embeds each micro-batch again. All embeddings are kept, so that the loss is that of the
    whole sub-batch, and the gradients are those of a single pass.
    """

    def __init__(self, towers: Towers, run: Run, group: ProcessGroup | None = None) -> None:
        super().__init__()
        self.model: nn.Module = towers.model
        self.towers, self.run, self.learners = towers, run, Learners(group)

    def forward(self, groups: list[Group], step: int) -> Features:
        size = self.run.training.micro_batch_size
        parts = []
        for group in groups:
            for examples in self._micro_batches(group.examples):
                tokens = examples.tokens.to(self.towers.device)
                if (
                    size
                ):  # with a tensor on the device among its arguments, checkpoint restores the device's random state
                    inputs = examples, tokens, group.resolution, step
                    parts.append(checkpoint(self._embed, *inputs, use_reentrant=False))
                else:
                    parts.append(self._embed(examples, tokens, group.resolution, step))
        image, text = (torch.cat(side) for side in zip(*parts, strict=True))
        return Features(image, text, self.towers.model.logit_scale.exp(), self.towers.model.logit_bias)

    def _micro_batches(self, examples: Examples) -> list[Examples]:
        size = self.run.training.micro_batch_size
        parts = list(examples.split(size)) if size else [examples]
        if self.towers.sharded:
            parts += [examples[torch.arange(0)]] * (max(self.learners.counts(len(parts))) - len(parts))
        return parts

    def _embed(self, examples: Examples, tokens: Tensor, resolution: Resolution, step: int) -> tuple[Tensor, Tensor]:
        config, device = self.run.training, self.towers.device
        pixels = examples.pixels.to(device)
        # with data.decode late they may be smaller already
        shift = config.augmentation.shift_pixels * pixels.shape[-1] / self.towers.view.image_size
        pixels = augment(
            pixels,
            examples.uids.to(device),
            examples.column("occurrence").to(device),
            shift_pixels=round(shift),
            colour=config.augmentation.colour,
            seed=self.run.seed,
            step=step,
        )
        n = len(pixels)
        if not n:  # a learner without examples takes part in the backward pass with one that does not count
            pixels, tokens = pixels.new_zeros(1, *pixels.shape[1:]), tokens.new_zeros(1, *tokens.shape[1:])
        image, text = self.towers.encode(pixels, tokens, resolution, config.precision)
        return image[:n], text[:n]
