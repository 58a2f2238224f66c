"""Slow references: each formula of the paper as plain loops over Python floats."""

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


def conditional_scores(scores: Rows, drawn: Sequence[int]) -> list[float]:
    """Algorithm 1, line by line: the diagonal, plus column and row sums over the examples drawn so far."""
    n = len(scores)
    out = []
    for i in range(n):
        column = sum(scores[k][i] for k in drawn)
        row = sum(scores[i][k] for k in drawn)
        out.append(scores[i][i] + column + row)
    return out


def softmax_conditional_scores(models: Sequence[tuple[int, Rows, Rows, float]], drawn: Sequence[int]) -> list[float]:
    """Algorithm 1 for the softmax loss: positive term, and half the log-sum-exps over drawn texts and drawn images."""
    n = len(models[0][1])
    out = []
    for i in range(n):
        total = 0.0
        for sign, image, text, scale in models:
            total -= sign * scale * dot(image[i], text[i])
            if drawn:
                over_texts = math.log(sum(math.exp(scale * dot(image[i], text[k])) for k in drawn))
                over_images = math.log(sum(math.exp(scale * dot(image[k], text[i])) for k in drawn))
                total += sign * 0.5 * (over_texts + over_images)
        out.append(total)
    return out


def set_score(scores: Rows, members: Sequence[int]) -> float:
    """The sum of a set's block of the score matrix."""
    return sum(scores[i][j] for i in members for j in members)


def vit_flops(name: str, image_size: int | None = None, patch_size: int | None = None) -> tuple[float, float]:
    """A forward pass of a ViT and of its text transformer, by the sizes that their papers give; two a multiply-add."""
    layers, width, pooled, context, vocabulary_width, out = {
        "ViT-B-16": (12, 768, False, 77, 512, 512),
        "ViT-B-16-SigLIP-256": (12, 768, True, 64, 768, 768),
        "ViT-L-16-SigLIP-256": (24, 1024, True, 64, 1024, 1024),
    }[name]
    size = image_size or (224 if name == "ViT-B-16" else 256)
    patch = patch_size or 16
    n = (size // patch) ** 2

    def layer(tokens: int, d: int) -> float:
        projections = tokens * (3 * d * d + d * d + 4 * d * d + 4 * d * d)  # query, key, value; output; MLP
        attention = 2 * tokens * tokens * d  # its weights, and their product with the values
        return 2.0 * (projections + attention)

    tokens = n + (0 if pooled else 1)  # a class token, or attention pooling
    image = 2.0 * n * 3 * patch * patch * width + layers * layer(tokens, width)
    if pooled:  # one query: its projection, keys and values, attention, output, MLP
        image += 2.0 * (width**2 + n * 2 * width**2 + 2 * n * width + width**2 + 8 * width**2)
    else:
        image += 2.0 * width * out
    text_layers = layers if pooled and width == 1024 else 12
    text = text_layers * layer(context, vocabulary_width) + 2.0 * vocabulary_width * out
    return image, text
