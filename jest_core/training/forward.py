"""The forward pass with gradients: this learner's share of a sub-batch, at one or two resolutions -> embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from jest_core import noise
from jest_core.collectives import Learners
from jest_core.examples.preprocess import augment
from jest_core.examples.super_batch import Examples
from jest_core.models import outlines
from jest_core.models.flexible import Resolution
from jest_core.models.towers import Towers
from jest_core.noise import Purpose
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
        parts: list[tuple[Tensor, Tensor]] = []
        for group in groups:
            for examples in self._micro_batches(group.examples):
                inputs = examples, group.resolution, step, len(parts)
                parts.append(checkpoint(self._embed, *inputs, use_reentrant=False) if size else self._embed(*inputs))
        image, text = (torch.cat(side) for side in zip(*parts, strict=True))
        return Features(image, text, self.towers.model.logit_scale.exp(), self.towers.model.logit_bias)

    def _micro_batches(self, examples: Examples) -> list[Examples]:
        size = self.run.training.micro_batch_size
        parts = list(examples.split(size)) if size else [examples]
        if self.towers.sharded:
            parts += [examples[torch.arange(0)]] * (max(self.learners.counts(len(parts))) - len(parts))
        return parts

    def _embed(self, examples: Examples, resolution: Resolution, step: int, number: int) -> tuple[Tensor, Tensor]:
        config, device = self.run.training, self.towers.device
        pixels, tokens = examples.pixels.to(device), examples.tokens.to(device)
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
        with _seeded(device, self.run.seed, step, Purpose.FORWARD, self.learners.rank, number):
            image, text = self.towers.encode(pixels, tokens, resolution, config.precision)
        return image[:n], text[:n]


def replicated(trained: TrainingPass) -> DistributedDataParallel:
    """The pass of one of several learners that have all weights each: the backward pass averages their gradients.

    Parameters that get no gradient are frozen, as the others would wait for theirs.
    """
    towers = trained.towers
    for name in outlines.training_trial(towers.name, towers.inputs.tokenizer.context_length)["untrained"]:
        trained.model.get_parameter(name).requires_grad_(False)
    return DistributedDataParallel(trained, broadcast_buffers=False)  # no buffer changes: trial.py


@contextmanager
def _seeded(device: torch.device, *context: int) -> Iterator[None]:
    """PyTorch's generators, from which dropout and stochastic depth draw, seeded by the context within the block.

    With the place in the run as their only state, a resumed run draws the masks of an undisturbed one.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(noise.seed(*context))
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(noise.seed(*context))
        yield
