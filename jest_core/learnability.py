"""Scores of sets of examples: learner loss minus reference loss, over all pairs of the set (paper section 2).

A score is a sum over pairs, never a mean, and no (B, B) matrix is built: what a candidate would add to the examples
already taken needs its own row and column against those alone.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from jest_core.losses import sigmoid_pair_losses

Criterion = Literal["learnability", "hard", "easy"]
Loss = Literal["sigmoid", "softmax"]
TILE = 1024  # rows of logits held at once


@dataclass(frozen=True)
class Embeddings:
    """One model's unit-norm embeddings of a super-batch, or of a learner's share of it.

    image, text: (B, D) in float16, bfloat16 or float32. logit_scale is the multiplier, not its logarithm.
    logit_bias is added to the logits; the softmax loss does not use it.
    """

    image: Tensor  # (B, D); `select` checks what it is given, with messages of its own
    text: Tensor
    logit_scale: float | Tensor
    logit_bias: float | Tensor = 0.0

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: Tensor | slice) -> "Embeddings":
        return Embeddings(self.image[rows], self.text[rows], self.logit_scale, self.logit_bias)

    def matched_logits(self) -> Float[Tensor, "B"]:
        """The logit of every example's own pair, float32."""
        return self.logit_scale * (self.image.float() * self.text.float()).sum(1) + self.logit_bias


def signed_models(
    learner: Embeddings | None, reference: Embeddings | None, criterion: Criterion
) -> list[tuple[int, Embeddings]]:
    """The models whose losses make up the criterion, with their signs: learner +, reference -."""
    wanted = {"learnability": (1, -1), "hard": (1, 0), "easy": (0, -1)}[criterion]
    models: list[tuple[int, Embeddings]] = []
    for name, sign, model in zip(("learner", "reference"), wanted, (learner, reference), strict=True):
        if sign and model is None:
            raise ValueError(f"criterion {criterion!r} needs the {name}'s embeddings, which are None")
        if sign and model is not None:
            models.append((sign, model))
    return models


def matched_losses(model: Embeddings, loss: Loss = "sigmoid") -> Float[Tensor, "B"]:
    """What each example costs by itself, float64: its matched pair's sigmoid loss, or softmax's positive term."""
    if loss == "sigmoid":
        return F.softplus(-model.matched_logits()).double()
    return -replace(model, logit_bias=0.0).matched_logits().double()


class ConditionalScores:
    """What each example would add to the score of those taken so far: Algorithm 1's logits, kept as running sums.

    sigmoid: S_ii + sum over taken k of (S_ik + S_ki), exactly the change of the set's score.
    softmax: the positive term plus half of the log-sum-exps over the taken texts and over the taken images; the
    log-sum-exp is not additive, so it is carried as such (paper section 2.5, as adapted by DRRho-CLIP).
    """

    def __init__(self, models: list[tuple[int, Embeddings]], loss: Loss, tile: int = TILE) -> None:
        self.models, self.loss, self.tile = models, loss, tile
        first = models[0][1]
        own = [sign * matched_losses(model, loss) for sign, model in models]
        self.own: Float[Tensor, "B"] = torch.stack(own).sum(0)
        self.sums = torch.zeros(len(first), dtype=torch.float64, device=first.image.device)
        self.log_sums = [
            torch.full((2, len(first)), -torch.inf, dtype=torch.float64, device=first.image.device) for _ in models
        ]

    def __call__(self) -> Float[Tensor, "B"]:
        """The scores given what was taken, float64."""
        return self.own + self.sums

    def take(self, taken: list[Embeddings]) -> None:
        """Add newly taken examples (their embeddings by each of the models, in the models' order)."""
        if self.loss == "sigmoid":
            for (sign, model), new in zip(self.models, taken, strict=True):
                self.sums += sign * cross_losses(model, new, self.tile)
        else:
            self.sums.zero_()
            for i, ((sign, model), new) in enumerate(zip(self.models, taken, strict=True)):
                self.log_sums[i] = torch.logaddexp(self.log_sums[i], _cross_log_sums(model, new, self.tile))
                self.sums += sign * 0.5 * self.log_sums[i].sum(0)


def cross_losses(model: Embeddings, taken: Embeddings, tile: int = TILE) -> Float[Tensor, "B"]:
    """Sigmoid losses of each example as a mismatch of every taken one, both ways round, summed; float64.

    For example i: sum over taken k of softplus(logit of image i, text k) + softplus(logit of image k, text i).
    """
    out = torch.empty(len(model), dtype=torch.float64, device=model.image.device)
    taken_image, taken_text = taken.image.float(), taken.text.float()
    for start in range(0, len(model), tile):
        rows = model[slice(start, start + tile)]
        as_image = model.logit_scale * (rows.image.float() @ taken_text.T) + model.logit_bias
        as_text = model.logit_scale * (rows.text.float() @ taken_image.T) + model.logit_bias
        out[start : start + tile] = (F.softplus(as_image) + F.softplus(as_text)).sum(1)
    return out


def _cross_log_sums(model: Embeddings, taken: Embeddings, tile: int) -> Float[Tensor, "2 B"]:
    """log sum exp of each image's logits over the taken texts, and of each text's over the taken images; float64."""
    out = torch.empty(2, len(model), dtype=torch.float64, device=model.image.device)
    taken_image, taken_text = taken.image.float(), taken.text.float()
    for start in range(0, len(model), tile):
        rows = model[slice(start, start + tile)]
        out[0, start : start + tile] = (model.logit_scale * (rows.image.float() @ taken_text.T)).logsumexp(1)
        out[1, start : start + tile] = (model.logit_scale * (rows.text.float() @ taken_image.T)).logsumexp(1)
    return out


def set_loss(model: Embeddings, loss: Loss = "sigmoid", rows: slice = slice(None), tile: int = TILE) -> Tensor:
    """Sum over a set's examples (those of `rows`) of their losses within the whole set, float64.

    sigmoid: all pairs of an image of `rows` with any text. softmax: both directions, halved (Eq. 1, 2).
    """
    if loss == "softmax":
        model = replace(model, logit_bias=0.0)  # the softmax is blind to it
    start_all, stop_all, _ = rows.indices(len(model))
    total = torch.zeros((), dtype=torch.float64, device=model.image.device)
    image, text = model.image.float(), model.text.float()
    matched = model.matched_logits()[rows].double()
    for start in range(start_all, stop_all, tile):
        part = slice(start, min(start + tile, stop_all))
        logits = model.logit_scale * (image[part] @ text.T) + model.logit_bias
        if loss == "sigmoid":
            total += F.softplus(logits).sum(dtype=torch.float64)
        else:
            back = model.logit_scale * (text[part] @ image.T) + model.logit_bias
            total += 0.5 * (logits.logsumexp(1).double() + back.logsumexp(1).double()).sum()
    return total - matched.sum()  # sigmoid: softplus(-l) = softplus(l) - l on the diagonal; softmax: the positive term


def batch_score(
    learner: Embeddings | None,
    reference: Embeddings | None,
    indices: Int[Tensor, "b"],
    criterion: Criterion = "learnability",
    loss: Loss = "sigmoid",
    tile: int = TILE,
) -> Float[Tensor, ""]:
    """The exact score of a set of examples, in nats, summed over its pairs; divide by b for a mean per example."""
    models = signed_models(learner, reference, criterion)
    return torch.stack([sign * set_loss(model[indices], loss, tile=tile) for sign, model in models]).sum()


def pair_scores(
    learner: Embeddings | None, reference: Embeddings | None, criterion: Criterion = "learnability"
) -> Float[Tensor, "B B"]:
    """The matrix S of Algorithm 1, whole: for tests and pictures of small batches."""
    return torch.stack(
        [
            sign * sigmoid_pair_losses(m.image.float(), m.text.float(), m.logit_scale, m.logit_bias)
            for sign, m in signed_models(learner, reference, criterion)
        ]
    ).sum(0)
