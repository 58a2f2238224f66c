"""Contrastive losses of image and text embeddings."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from jest_core.collectives import Learners


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


def sigmoid_loss(
    image_embeddings: Float[Tensor, "B D"],
    text_embeddings: Float[Tensor, "B D"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    *,
    tile: int = 1024,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Mean sigmoid loss per example over all pairs of the batch, in O(tile * B) memory forward and backward.

    With a process group the batch is the learners' shares together, and the value is the global one on each of them.
    Gradients of the embeddings are those of the global loss. Those of logit_scale and logit_bias hold this learner's
    rows of the pair matrix: as for every shared parameter, the sum over learners is the gradient.
    """
    return _SigmoidLoss.apply(image_embeddings, text_embeddings, logit_scale, logit_bias, tile, Learners(group))


class _SigmoidLoss(torch.autograd.Function):
    """The loss is a scalar, so its gradients are known up to a factor as soon as a tile of logits is: they are
    accumulated in the forward pass, and no logit is kept or computed twice."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, tile: int, learners: Learners
    ) -> Tensor:
        counts = learners.counts(len(image))
        offset = sum(counts[: learners.rank])
        texts = learners.gather(text, counts).float()
        image_gradient = torch.empty_like(image, dtype=torch.float32)
        text_gradient = torch.zeros_like(texts)
        total, scale_gradient, bias_gradient = torch.zeros(3, dtype=torch.float64, device=image.device)
        for start in range(0, len(image), tile):
            rows = image[start : start + tile].float()
            cosines = rows @ texts.T
            logits = scale.float() * cosines + bias.float()
            matched = logits.diagonal(offset + start)
            # softplus(l) is the loss of a mismatched pair; the matched one's, softplus(-l), is softplus(l) - l
            total += F.softplus(logits).sum(dtype=torch.float64) - matched.sum(dtype=torch.float64)
            slope = torch.sigmoid(logits)
            slope.diagonal(offset + start).sub_(1.0)
            image_gradient[start : start + tile] = slope @ texts
            text_gradient.addmm_(slope.T, rows)
            scale_gradient += torch.linalg.vecdot(slope, cosines).sum(dtype=torch.float64)
            bias_gradient += slope.sum(dtype=torch.float64)
        n = sum(counts)
        text_gradient = learners.sum(text_gradient)[offset : offset + len(text)]
        ctx.save_for_backward(
            (image_gradient * (scale / n)).to(image.dtype),
            (text_gradient * (scale / n)).to(text.dtype),
            (scale_gradient / n).to(scale.dtype),
            (bias_gradient / n).to(bias.dtype),
        )
        return (learners.sum(total) / n).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(saved * gradient for saved in ctx.saved_tensors), None, None)
