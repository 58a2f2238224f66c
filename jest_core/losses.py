"""Contrastive losses of image and text embeddings, over the whole global batch, in O(tile * B) memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from jest_core.collectives import Learners

TILE = 1024  # rows and columns of logits in memory at once
_LOG2E = math.log2(math.e)


def sigmoid_pair_losses(
    image_embeddings: Float[Tensor, "B D"],
    text_embeddings: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""] | float,
    logit_bias: Float[Tensor, ""] | float,
) -> Float[Tensor, "B B"]:
    """Loss of every image-text pair, in nats; the batch loss is the sum divided by B.

    Sigmoid loss of Zhai et al. 2023 (arXiv:2303.15343), before the sum. Embeddings have unit-norm rows;
    row = image, column = text. logit_scale is the multiplier itself, not its logarithm. For tests and small B.
    """
    logits = logit_scale * image_embeddings @ text_embeddings.T + logit_bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1  # +1 on matched pairs, -1 elsewhere
    return -F.logsigmoid(signs * logits)


def calibrated_bias(
    image_embeddings: Float[Tensor, "n D"], text_embeddings: Float[Tensor, "n D"], logit_scale: float
) -> float:
    """The logit_bias at which the sigmoid loss of these pairs is smallest, for a model that was trained by softmax.

    There, the sum of sigmoid(logit) over all n x n pairs is n, the number of matched ones. The sum grows with the bias,
    so bisection finds it.
    """
    logits = logit_scale * image_embeddings @ text_embeddings.T
    low, high = -2.0 * logit_scale - 50.0, 2.0 * logit_scale + 50.0
    for _ in range(60):
        middle = (low + high) / 2
        too_many = torch.sigmoid(logits + middle).sum(dtype=torch.float64).item() > len(logits)
        low, high = (low, middle) if too_many else (middle, high)
    return (low + high) / 2


def softplus_sums(logits: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
    """The sum over each row of softplus(l) = log(1 + exp(l)), to about 1e-6 of it; overwrites its argument.

    The logarithms are most of the cost of softplus, and a sum of logarithms is the logarithm of a product. With
    x = exp(-|l|) <= 1 each term is max(l, 0) + log(1 + x), and (1 + x)(1 + y) = 1 + (x + y + xy): the two halves of a
    row are combined so, six times, and one logarithm then stands for 64 terms. 1 is never added to a small x, which
    would round it off.
    """
    positive = logits.clamp_min(0).sum(1)
    x = logits.abs_().mul_(-_LOG2E).exp2_()  # on a CPU a fraction of the cost of exp
    for _ in range(6):
        half = x.shape[1] // 2
        if half < 8:
            break
        left, right, odd = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
        x = torch.addcmul(left + right, left, right)
        x[:, : odd.shape[1]] += odd + odd * x[:, : odd.shape[1]]
    return positive + x.log1p_().sum(1)


def logit_tiles(
    rows: Float[Tensor, "R D"],
    columns: Float[Tensor, "C D"],
    scale: float | Tensor,
    tile: int = TILE,
    fast: bool = False,
) -> Iterator[tuple[slice, Float[Tensor, "r c"]]]:
    """scale * rows @ columns.T in float32, tile by tile, each with the rows that it covers.

    fast: products of bfloat16 where the device has them; a logit of unit-norm embeddings then has an error of at most
    2**-8 of the scale.
    """
    dtype = torch.bfloat16 if fast and has_bfloat16_products(rows.device) else torch.float32
    scaled = (scale * columns.float()).to(dtype).split(tile)
    height = tile * min(4, max(1, tile // max(1, len(columns))))  # with few columns, more rows at once
    for start in range(0, len(rows), height):
        part = slice(start, start + height)
        some = rows[part].to(dtype)
        for block in scaled:
            with torch.autocast(rows.device.type, enabled=False):  # autocast would choose the type of the product
                logits = (some @ block.T).float()
            yield part, logits


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16 faster than those of float32."""
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def sigmoid_loss(
    image_embeddings: Float[Tensor, "B D"],
    text_embeddings: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    *,
    tile: int = TILE,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Mean sigmoid loss per example over all pairs of the batch, in O(tile * B) memory forward and backward.

    Zhai et al. 2023 (arXiv:2303.15343). With a process group the batch consists of the shares of all learners, and each
    of them returns the loss of the whole batch. The gradients of the embeddings are those of that loss. The gradients
    of logit_scale and logit_bias are the part of this learner's rows of the pair matrix: as for every shared parameter,
    the gradient is the sum over learners. tile: rows and columns of logits in memory at once.
    """
    arguments = image_embeddings, text_embeddings, logit_scale, logit_bias
    return _SigmoidLoss.apply(*arguments, _Settings.of(arguments, tile, group))


def softmax_loss(
    image_embeddings: Float[Tensor, "B D"],
    text_embeddings: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""],
    *,
    tile: int = TILE,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Mean softmax (CLIP) loss per example, the mean of both directions, in O(tile * B) memory.

    Radford et al. 2021 (arXiv:2103.00020); Eq. 1 of Evans et al. 2024. Process group, gradients and tile as in
    `sigmoid_loss`. Logits are computed twice: a gradient needs the log-sum-exps of its row and its column first.
    """
    arguments = image_embeddings, text_embeddings, logit_scale
    return _SoftmaxLoss.apply(*arguments, _Settings.of(arguments, tile, group))


@dataclass(frozen=True)
class _Settings:
    """How a loss is computed; nothing in it is differentiated."""

    tile: int
    learners: Learners
    wants_gradients: bool

    @classmethod
    def of(cls, arguments: tuple[Tensor, ...], tile: int, group: dist.ProcessGroup | None) -> "_Settings":
        # asked here, as within a torch.autograd.Function gradients are off
        wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in arguments)
        return cls(tile, Learners(group), wants_gradients)


class _Batch:
    """This learner's images against the texts of all learners, tile by tile, and the running sums of both gradients.

    The loss is a scalar, so the gradients are known up to a factor as soon as a tile of logits is: they are summed in
    the forward pass, and no logits are kept for the backward pass.
    """

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, settings: _Settings) -> None:
        if image.ndim != 2 or image.shape != text.shape or settings.tile < 1:
            raise ValueError(
                f"image {tuple(image.shape)} and text {tuple(text.shape)} embeddings are not both (B, D), "
                f"or tile {settings.tile} is not positive"
            )
        learners = settings.learners
        self.image, self.text, self.scale, self.tile, self.learners = image, text, scale, settings.tile, learners
        counts = learners.counts(len(image))
        self.size, self.offset = sum(counts), sum(counts[: learners.rank])
        self.local_rows = slice(self.offset, self.offset + len(text))
        self.texts = learners.gather(text, counts).float()
        if settings.wants_gradients:
            self.image_gradient = torch.zeros_like(image, dtype=torch.float32)
            self.text_gradient = torch.zeros_like(self.texts)

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and logits without bias."""
        for top in range(0, len(self.image), self.tile):
            rows = slice(top, top + self.tile)
            image = self.scale.float() * self.image[rows].float()
            for left in range(0, self.size, self.tile):
                columns = slice(left, left + self.tile)
                yield rows, columns, image @ self.texts[columns].T

    def matched(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        """A view of the matched pairs in a tile; empty where there are none."""
        return tile.diagonal(self.offset + rows.start - columns.start)

    def accumulate(self, slope: Tensor, rows: slice, columns: slice) -> None:
        """Add a tile's part of the gradients; slope is the derivative of the loss by the tile's logits."""
        self.image_gradient[rows].addmm_(slope, self.texts[columns])
        self.text_gradient[columns].addmm_(slope.T, self.image[rows].float())

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of image, text and logit_scale, for the mean over the batch; in float32 for embeddings of any type, as the
        factor of a loss scaler is multiplied in later."""
        image, text = self.image_gradient, self.learners.sum(self.text_gradient)[self.local_rows]
        by_scale = torch.linalg.vecdot(image, self.image.float()).sum(dtype=torch.float64)  # image gradients / scale
        factor = self.scale.float() / self.size
        return image.mul_(factor), text.mul(factor), by_scale / self.size


def _scaled(ctx: Any, gradient: Tensor) -> list[Tensor | None]:
    """The saved gradients times the incoming one, in the types of the inputs."""
    if torch.is_grad_enabled():
        raise RuntimeError("the loss has no second derivative: call backward without create_graph")
    return [(saved * gradient).to(kind) for saved, kind in zip(ctx.saved_tensors, ctx.kinds, strict=True)]


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, settings: _Settings) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            batch = _Batch(image, text, scale, settings)
            total, by_bias = torch.zeros(2, dtype=torch.float64, device=image.device)
            for rows, columns, logits in batch.tiles():
                logits += bias
                batch.matched(logits, rows, columns).neg_()  # a match costs softplus(-l), all others softplus(l)
                if settings.wants_gradients:
                    slope = torch.sigmoid(logits)
                    batch.matched(slope, rows, columns).neg_()
                    batch.accumulate(slope, rows, columns)
                    by_bias += slope.sum()
                total += softplus_sums(logits).sum()
            if settings.wants_gradients:
                ctx.save_for_backward(*batch.gradients(), by_bias / batch.size)
                ctx.kinds = [x.dtype for x in (image, text, scale, bias)]
            return (batch.learners.sum(total) / batch.size).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, gradient), None)


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, settings: _Settings) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            batch = _Batch(image, text, scale, settings)
            total = torch.zeros((), dtype=torch.float64, device=image.device)
            over_texts = torch.full((len(image),), -torch.inf, device=image.device)
            over_images = torch.full((batch.size,), -torch.inf, device=image.device)
            for rows, columns, logits in batch.tiles():
                total -= batch.matched(logits, rows, columns).sum()
                over_texts[rows] = torch.logaddexp(over_texts[rows], logits.logsumexp(1))
                over_images[columns] = torch.logaddexp(over_images[columns], logits.logsumexp(0))
            learners = batch.learners
            shares = learners.gather(over_images, [batch.size] * learners.size)  # over the images of each learner
            over_images = shares.view(learners.size, batch.size).logsumexp(0)
            total += 0.5 * (
                over_texts.sum(dtype=torch.float64) + over_images[batch.local_rows].sum(dtype=torch.float64)
            )
            if settings.wants_gradients:
                for rows, columns, logits in batch.tiles():
                    slope = torch.exp(logits - over_texts[rows, None])
                    slope += torch.exp(logits - over_images[columns])
                    batch.matched(slope.mul_(0.5), rows, columns).sub_(1.0)
                    batch.accumulate(slope, rows, columns)
                ctx.save_for_backward(*batch.gradients())
                ctx.kinds = [x.dtype for x in (image, text, scale)]
            return (batch.learners.sum(total) / batch.size).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, gradient), None)
