"""Each formula once more, as plain loops over Python floats, written from the paper."""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def sigmoid_pair_losses(image: Rows, text: Rows, scale: float, bias: float) -> list[list[float]]:
    """Eq. 2, entry by entry."""
    out = []
    for i, z_image in enumerate(image):
        row = []
        for j, z_text in enumerate(text):
            logit = scale * dot(z_image, z_text) + bias
            row.append(math.log1p(math.exp(-logit if i == j else logit)))
        out.append(row)
    return out


def softmax_losses(image: Rows, text: Rows, scale: float) -> list[float]:
    """Eq. 1 for each example of a batch."""
    n = len(image)
    logits = [[scale * dot(image[i], text[j]) for j in range(n)] for i in range(n)]
    out = []
    for i in range(n):
        over_texts = math.log(sum(math.exp(logits[i][j]) for j in range(n)))
        over_images = math.log(sum(math.exp(logits[j][i]) for j in range(n)))
        out.append(-0.5 * ((logits[i][i] - over_texts) + (logits[i][i] - over_images)))
    return out


def conditional_scores(scores: Rows, taken: Sequence[int]) -> list[float]:
    """Algorithm 1, line by line: the diagonal, plus column sums, plus row sums over what is taken."""
    n = len(scores)
    out = []
    for i in range(n):
        column = sum(scores[k][i] for k in taken)
        row = sum(scores[i][k] for k in taken)
        out.append(scores[i][i] + column + row)
    return out


def softmax_conditional_scores(models: Sequence[tuple[int, Rows, Rows, float]], taken: Sequence[int]) -> list[float]:
    """Section 2.5 of the fact sheet: positive term, and half the log-sum-exps over taken texts and taken images."""
    n = len(models[0][1])
    out = []
    for i in range(n):
        total = 0.0
        for sign, image, text, scale in models:
            total -= sign * scale * dot(image[i], text[i])
            if taken:
                over_texts = math.log(sum(math.exp(scale * dot(image[i], text[k])) for k in taken))
                over_images = math.log(sum(math.exp(scale * dot(image[k], text[i])) for k in taken))
                total += sign * 0.5 * (over_texts + over_images)
        out.append(total)
    return out


def set_score(scores: Rows, members: Sequence[int]) -> float:
    """The sum of a set's block of the score matrix."""
    return sum(scores[i][j] for i in members for j in members)
