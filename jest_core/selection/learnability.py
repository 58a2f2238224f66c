"""Scores of sets of examples: learner loss minus reference loss, over all pairs of the set (paper section 2).

A score is a sum over pairs, never a mean, and no (B, B) matrix is built: what a candidate would add to the examples
already taken needs its own row and column against those alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from jest_core.choices import Criterion, Loss, Precision
from jest_core.losses import TILE, logit_tiles, sigmoid_pair_losses, softplus_sums


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

    def matched_logits(self) -> Float[Tensor, " B"]:
        """The logit of every example's own pair, float32; NaN or infinite where an embedding is."""
        tiles = zip(self.image.split(TILE), self.text.split(TILE), strict=True)
        cosines = torch.cat([(image.float() * text.float()).sum(1) for image, text in tiles])
        return self.logit_scale * cosines + self.logit_bias


def signed_models(
    learner: Embeddings | None, reference: Embeddings | None, criterion: Criterion
) -> list[tuple[int, Embeddings]]:
    """The models whose losses make up the criterion, with their signs: learner +, reference -."""
    signs = {"learnability": (1, -1), "hard": (1, 0), "easy": (0, -1)}[criterion]
    models: list[tuple[int, Embeddings]] = []
    for name, sign, model in zip(("learner", "reference"), signs, (learner, reference), strict=True):
        if sign and model is None:
            raise ValueError(f"criterion {criterion!r} needs the {name}'s embeddings, which are None")
        if sign and model is not None:
            models.append((sign, model))
    return models


def matched_losses(model: Embeddings, loss: Loss = "sigmoid") -> Float[Tensor, " B"]:
    """What each example's own pair costs, float64: its sigmoid loss, or the positive term of the softmax loss."""
    return _own_losses(_logits(model, loss), loss)


def matched_scores(
    learner: Embeddings | None, reference: Embeddings | None, criterion: Criterion, loss: Loss = "sigmoid"
) -> Float[Tensor, " B"]:
    """What each example's own pair scores by the criterion, float64."""
    scores = [sign * matched_losses(model, loss) for sign, model in signed_models(learner, reference, criterion)]
    return torch.stack(scores).sum(0)


def _logits(model: Embeddings, loss: Loss) -> Tensor:
    """Matched logits, float64; the softmax is blind to the bias."""
    return (model if loss == "sigmoid" else replace(model, logit_bias=0.0)).matched_logits().double()


def _own_losses(logits: Tensor, loss: Loss) -> Tensor:
    return F.softplus(-logits) if loss == "sigmoid" else -logits


class ConditionalScores:
    """What each example would add to the score of those taken so far: Algorithm 1's logits, kept as running sums.

    sigmoid: S_ii + sum over taken k of (S_ik + S_ki), exactly the change of the set's score.
    softmax: the positive term plus half of the log-sum-exps over the taken texts and over the taken images; the
    log-sum-exp is not additive, so it is carried as such (paper section 2.5, as adapted by DRRho-CLIP).
    """

    def __init__(
        self,
        models: list[tuple[int, Embeddings]],
        loss: Loss = "sigmoid",
        tile: int = TILE,
        precision: Precision = "exact",
    ) -> None:
        self.models, self.loss, self.tile, self.precision = models, loss, tile, precision
        shape, device = (len(models[0][1]),), models[0][1].image.device
        self.own = torch.zeros(shape, dtype=torch.float64, device=device)  # (B,) scores before anything is taken
        self.matched = torch.zeros_like(self.own)  # (B,) matched-pair logits, learner minus reference
        for sign, model in models:
            logits = _logits(model, loss)
            self.matched += sign * logits
            self.own += sign * _own_losses(logits, loss)
        self.sums = torch.zeros_like(self.own)  # (B,) what pairs with the taken examples add
        self.log_sums = [torch.full((2, *shape), -torch.inf, dtype=torch.float64, device=device) for _ in models]

    def __call__(self) -> Float[Tensor, " B"]:
        """The scores given what was taken, float64."""
        return self.own + self.sums

    def take(self, taken: list[Embeddings], rows: Tensor | slice = slice(None)) -> None:
        """Add newly taken examples (their embeddings by each of the models, in the models' order).

        rows: the examples whose scores are still needed; the others' are left behind.
        """
        if self.loss == "sigmoid":
            self.sums[rows] += self._mismatches(taken, rows)
        else:
            self.sums[rows] = 0.0
            for (sign, model), new, log_sums in zip(self.models, taken, self.log_sums, strict=True):
                added = _cross_log_sums(model[rows], new, self.tile, self.precision)
                log_sums[:, rows] = torch.logaddexp(log_sums[:, rows], added)
                self.sums[rows] += sign * 0.5 * log_sums[:, rows].sum(0)

    def drop(self, taken: list[Embeddings]) -> None:
        """Take examples back out; of the sigmoid loss only, as a log-sum-exp cannot be subtracted from safely."""
        self.sums -= self._mismatches(taken, slice(None))

    def set_score(self, members: Int[Tensor, " k"]) -> Float[Tensor, ""]:
        """What these members contribute to the score of the set of all examples taken; summed over the set, its score.

        A member is among the taken: its sums hold its own pair as a mismatch, for the sigmoid loss once each way, and
        every pair of two members appears in the sums of both.
        """
        share = 0.5 if self.loss == "sigmoid" else 1.0
        # softplus(l) - l = softplus(-l): with its logit subtracted the own pair counts as the match that it is
        return (share * self.sums[members] - self.matched[members]).sum()

    def _mismatches(self, taken: list[Embeddings], rows: Tensor | slice) -> Tensor:
        losses = (
            sign * cross_losses(model[rows], new, self.tile, self.precision)
            for (sign, model), new in zip(self.models, taken, strict=True)
        )
        return torch.stack(list(losses)).sum(0)


def cross_losses(
    model: Embeddings, taken: Embeddings, tile: int = TILE, precision: Precision = "exact"
) -> Float[Tensor, " B"]:
    """Sigmoid losses of each example as a mismatch of every taken one, both ways round, summed; float64.

    For example i: sum over taken k of softplus(logit of image i, text k) + softplus(logit of image k, text i).
    """
    if has_fused_kernel(model.image.device):
        from jest_core.selection import kernels

        sides = (model.image, model.text, taken.image, taken.text)
        with torch.cuda.device(model.image.device):  # Triton launches on the current one
            return kernels.cross_losses(*sides, model.logit_scale, model.logit_bias, fast=precision == "fast")
    out = torch.zeros(len(model), dtype=torch.float64, device=model.image.device)
    for _, rows, logits in _cross_tiles(model, taken, tile, precision):
        out[rows] += softplus_sums(logits.add_(model.logit_bias))
    return out


def has_fused_kernel(device: torch.device) -> bool:
    """Whether there is Triton, and a GPU with the products of bfloat16 and TF32 that the kernel is made of."""
    return (
        device.type == "cuda" and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _cross_log_sums(model: Embeddings, taken: Embeddings, tile: int, precision: Precision) -> Float[Tensor, "2 B"]:
    """log sum exp of each image's logits over the taken texts, and of each text's over the taken images; float64."""
    out = torch.full((2, len(model)), -torch.inf, dtype=torch.float64, device=model.image.device)
    for side, rows, logits in _cross_tiles(model, taken, tile, precision):
        out[side, rows] = torch.logaddexp(out[side, rows], logits.logsumexp(1).double())
    return out


def _cross_tiles(
    model: Embeddings, taken: Embeddings, tile: int, precision: Precision
) -> Iterator[tuple[int, slice, Tensor]]:
    """Logits, without bias, of each image with the taken texts (side 0) and of each text with the taken images (1)."""
    for side, (rows, columns) in enumerate(((model.image, taken.text), (model.text, taken.image))):
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
    scores.take([model for _, model in members])
    return scores.set_score(torch.arange(len(indices), device=indices.device))


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
