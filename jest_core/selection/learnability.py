"""Scores of sets of examples: learner loss minus reference loss, over all pairs of the set (Evans et al. 2024).

A score is a sum over pairs, not a mean. No (B, B) matrix is built: what a candidate adds to the score of the examples
drawn so far depends on its row and column of the matrix against those alone.
"""

import functools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from jest_core.choices import CRITERIA, LOSSES, Criterion, Loss, Precision
from jest_core.losses import TILE, logit_tiles, sigmoid_pair_losses, softplus_sums
from jest_core.selection.embeddings import Embeddings

SignedModel: TypeAlias = tuple[int, Embeddings]  # with the sign of its losses in the score: +1 or -1


def signed_models(learner: Embeddings | None, reference: Embeddings | None, criterion: Criterion) -> list[SignedModel]:
    """The models whose losses the criterion sums up, with their signs. Raises ValueError where one of them is None."""
    traits = CRITERIA[criterion]
    signed = (("learner", traits.learner_sign, learner), ("reference", traits.reference_sign, reference))
    models: list[SignedModel] = []
    for name, sign, model in signed:
        if sign and model is None:
            raise ValueError(f"criterion {criterion!r} needs the {name}'s embeddings, which are None")
        if sign and model is not None:
            models.append((sign, model))
    return models


def matched_losses(model: Embeddings, loss: Loss = "sigmoid") -> Float[Tensor, " B"]:
    """The loss of each example's matched pair, float64, nats: sigmoid, or the positive term of the softmax loss."""
    return _losses_of_matches(_logits(model, loss), loss)


def matched_scores(
    learner: Embeddings | None, reference: Embeddings | None, criterion: Criterion, loss: Loss = "sigmoid"
) -> Float[Tensor, " B"]:
    """The score of each example's matched pair by the criterion, float64, nats."""
    scores = [sign * matched_losses(model, loss) for sign, model in signed_models(learner, reference, criterion)]
    return torch.stack(scores).sum(0)


def _logits(model: Embeddings, loss: Loss) -> Tensor:
    """Logits of the matched pairs, float64, without the bias where the loss has none."""
    return (model if LOSSES[loss].has_bias else replace(model, logit_bias=0.0)).matched_logits().double()


def _losses_of_matches(logits: Tensor, loss: Loss) -> Tensor:
    return F.softplus(-logits) if loss == "sigmoid" else -logits


class ConditionalScores:
    """What each example would add to the score of the examples drawn so far: Algorithm 1's logits, as running sums.

    sigmoid: S_ii + the sum over drawn examples k of (S_ik + S_ki), exactly the change of the set's score.
    softmax: the positive term plus half of the log-sum-exps over the drawn texts and over the drawn images. A
    log-sum-exp is not additive, so the running value is one itself (as in the code of DRRho-CLIP, Wei et al. 2025,
    arXiv:2505.06699).
    """

    def __init__(
        self,
        models: list[SignedModel],
        loss: Loss = "sigmoid",
        tile: int = TILE,
        precision: Precision = "exact",
    ) -> None:
        self.models, self.loss, self.tile, self.precision = models, loss, tile, precision
        shape, device = (len(models[0][1]),), models[0][1].image.device
        self.diagonal = torch.zeros(shape, dtype=torch.float64, device=device)  # (B,) S_ii: scores before any draw
        self.matched_logits = torch.zeros_like(self.diagonal)  # (B,) of the matched pairs, learner minus reference
        for sign, model in models:
            logits = _logits(model, loss)
            self.matched_logits += sign * logits
            self.diagonal += sign * _losses_of_matches(logits, loss)
        self.sums = torch.zeros_like(self.diagonal)  # (B,) what pairs with the drawn examples add
        self.log_sums = [torch.full((2, *shape), -torch.inf, dtype=torch.float64, device=device) for _ in models]

    def __call__(self) -> Float[Tensor, " B"]:
        """The scores given what was drawn, float64."""
        return self.diagonal + self.sums

    def add(self, drawn: list[Embeddings], rows: Tensor | slice = slice(None)) -> None:
        """Add newly drawn examples: their embeddings by each of the models, in the order of the models.

        rows: the examples whose scores are still needed; the scores of the others are not brought up to date.
        """
        if self.loss == "sigmoid":
            self.sums[rows] += self._mismatches(drawn, rows)
        else:
            self.sums[rows] = 0.0
            for (sign, model), new, log_sums in zip(self.models, drawn, self.log_sums, strict=True):
                added = _cross_log_sums(model[rows], new, self.tile, self.precision)
                log_sums[:, rows] = torch.logaddexp(log_sums[:, rows], added)
                self.sums[rows] += sign * 0.5 * log_sums[:, rows].sum(0)

    def remove(self, drawn: list[Embeddings]) -> None:
        """Remove drawn examples; with the sigmoid loss only, as subtraction from a log-sum-exp loses its digits."""
        self.sums -= self._mismatches(drawn, slice(None))

    def set_score(self, members: Int[Tensor, " k"]) -> Float[Tensor, ""]:
        """The part of these members in the score of the set of all drawn examples; over all members, that score.

        A member is itself among the drawn examples: its sums contain its own pair as a mismatch, for the sigmoid loss
        once in each direction, and every pair of two members is in the sums of both.
        """
        share = 0.5 if self.loss == "sigmoid" else 1.0
        # softplus(l) - l = softplus(-l): minus its logit, the own pair counts as a match
        return (share * self.sums[members] - self.matched_logits[members]).sum()

    def _mismatches(self, drawn: list[Embeddings], rows: Tensor | slice) -> Tensor:
        losses = (
            sign * cross_losses(model[rows], new, self.tile, self.precision)
            for (sign, model), new in zip(self.models, drawn, strict=True)
        )
        return torch.stack(list(losses)).sum(0)


def cross_losses(
    model: Embeddings, drawn: Embeddings, tile: int = TILE, precision: Precision = "exact"
) -> Float[Tensor, " B"]:
    """Sigmoid losses of each example with every drawn one as mismatches, in both directions, summed; float64.

    For example i: the sum over drawn k of softplus(logit of image i, text k) + softplus(logit of image k, text i).
    """
    if has_fused_kernel(model.image.device):
        from jest_core.selection import kernels

        sides = (model.image, model.text, drawn.image, drawn.text)
        with torch.cuda.device(model.image.device):  # Triton launches on the current device
            return kernels.cross_losses(*sides, model.logit_scale, model.logit_bias, fast=precision == "fast")
    out = torch.zeros(len(model), dtype=torch.float64, device=model.image.device)
    for _, rows, logits in _cross_tiles(model, drawn, tile, precision):
        out[rows] += softplus_sums(logits.add_(model.logit_bias))
    return out


def has_fused_kernel(device: torch.device) -> bool:
    """Whether the GPU multiplies bfloat16 and TF32, as the kernel does, and Triton can compile it here."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and _compiles(device)


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Whether a small kernel runs: Triton needs a C compiler, which many images lack. A warning says if it does not."""
    x = torch.ones(1, 16, device=device)
    try:
        from jest_core.selection import kernels

        with torch.cuda.device(device):
            kernels.cross_losses(x, x, x, x, 1.0, 0.0)
    except Exception as error:  # of Triton, of the compiler, of the driver: whatever it is, PyTorch computes the same
        warnings.warn(
            f"the selection's Triton kernel cannot be used ({type(error).__name__}: {error}); PyTorch computes the "
            "same, more slowly and with more memory: install Triton and a C compiler (gcc)",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _cross_log_sums(model: Embeddings, drawn: Embeddings, tile: int, precision: Precision) -> Float[Tensor, "2 B"]:
    """log sum exp of each image's logits over the drawn texts, and of each text's over the drawn images; float64."""
    out = torch.full((2, len(model)), -torch.inf, dtype=torch.float64, device=model.image.device)
    for side, rows, logits in _cross_tiles(model, drawn, tile, precision):
        out[side, rows] = torch.logaddexp(out[side, rows], logits.logsumexp(1).double())
    return out


def _cross_tiles(
    model: Embeddings, drawn: Embeddings, tile: int, precision: Precision
) -> Iterator[tuple[int, slice, Tensor]]:
    """Logits, without bias, of each image with the drawn texts (side 0) and of each text with the drawn images (1)."""
    for side, (rows, columns) in enumerate(((model.image, drawn.text), (model.text, drawn.image))):
        for part, logits in logit_tiles(rows, columns, model.logit_scale, tile, fast=precision == "fast"):
            yield side, part, logits


@torch.no_grad()
def batch_score(
    learner: Embeddings | None,
    reference: Embeddings | None,
    indices: Int[Tensor, " b"],
    criterion: Criterion = "learnability",
    loss: Loss = "sigmoid",
    tile: int = TILE,
) -> Float[Tensor, ""]:
    """The exact score of a set of examples, in nats, summed over its pairs; divide by b for a mean per example."""
    members = [(sign, model[indices]) for sign, model in signed_models(learner, reference, criterion)]
    scores = ConditionalScores(members, loss, tile)
    scores.add([model for _, model in members])
    return scores.set_score(torch.arange(len(indices), device=indices.device))


def pair_scores(
    learner: Embeddings | None, reference: Embeddings | None, criterion: Criterion = "learnability"
) -> Float[Tensor, "B B"]:
    """The whole matrix S of Algorithm 1, nats: for tests and figures of small batches."""
    return torch.stack(
        [
            sign * sigmoid_pair_losses(m.image.float(), m.text.float(), m.logit_scale, m.logit_bias)
            for sign, m in signed_models(learner, reference, criterion)
        ]
    ).sum(0)
