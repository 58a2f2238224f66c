"""Embeddings -> zero-shot, few-shot and retrieval scores, by the protocol of big_vision.

Batches are added one after the other: memory does not grow with the number of images, except for retrieval, which needs
all embeddings. A tie counts against the model, so that a model with the same embedding for all images scores 0.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from open_clip.tokenizer import canonicalize_text
from torch import Tensor, nn

from jest_core.models.towers import Towers

_BIAS_FEATURE = 100.0  # large, so that its weight is hardly regularised


@dataclass(frozen=True)
class ClassNames:
    """A zero-shot task: class identifiers, the names of each, and the prompt templates (`{}` is the name).

    canonical: prompts in lower case and without punctuation, as big_vision presents them.
    """

    ids: Sequence[str]
    names: Sequence[Sequence[str]]
    templates: Sequence[str]
    canonical: bool = False

    def prompts(self) -> list[tuple[int, str]]:
        """Each prompt with the number of its class."""
        filled = (
            (i, template.format(name))
            for i, names in enumerate(self.names)
            for name in names
            for template in self.templates
        )
        return [(i, canonicalize_text(text) if self.canonical else text) for i, text in filled]


@torch.no_grad()
def text_embeddings(towers: Towers, texts: Sequence[str]) -> Float[Tensor, "M D"]:
    """Unit-norm embeddings, float32, on the device of the towers."""
    with _evaluating(towers.model):
        text: Tensor = towers.model.encode_text(towers.tokens(list(texts)).to(towers.device), normalize=True)
    return text.float()


@torch.no_grad()
def image_embeddings(towers: Towers, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
    """Unit-norm embeddings, float32, on the device of the towers."""
    with _evaluating(towers.model):
        return F.normalize(towers.image(pixels), dim=1)


@torch.no_grad()
def represent(towers: Towers, pixels: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N F"]:
    """The input of a linear classifier: the image tower's pooled output, before the projection to the embedding where
    there is one (ViTs of open_clip and timm), float32."""
    with _evaluating(towers.model), _unprojected(towers.model.visual):
        return towers.image(pixels)


def class_embeddings(towers: Towers, classes: ClassNames, batch_size: int = 512) -> Float[Tensor, "C D"]:
    """Per class, the mean of the unit-norm embeddings of its prompts, normalised again (big_vision)."""
    prompts = classes.prompts()
    sums: Tensor | None = None
    for start in range(0, len(prompts), batch_size):
        owners, texts = zip(*prompts[start : start + batch_size], strict=True)
        text = text_embeddings(towers, texts)
        if sums is None:
            sums = torch.zeros(len(classes.ids), text.shape[1], device=text.device)
        sums.index_add_(0, torch.tensor(owners, device=text.device), text)
    if sums is None:
        raise ValueError("no class has a name and a template")
    return F.normalize(sums, dim=1)


class ZeroShot:
    """Classification by the nearest class embedding, over batches of images."""

    def __init__(self, classes: Float[Tensor, "C D"]) -> None:
        self.classes = classes
        self.hits = torch.zeros(3, len(classes), dtype=torch.int64)  # by class: hits at 1, hits at 5, number of images

    def add(self, image: Float[Tensor, "N D"], labels: Int[Tensor, " N"]) -> None:
        """labels: number of the class of each image; the caller leaves out images without a class."""
        scores = image @ self.classes.to(image).T
        labels = labels.to(scores.device)
        of_class = scores.gather(1, labels[:, None])
        ranks = (~(scores < of_class)).sum(1) - 1  # a NaN is a tie with everything
        for row, values in enumerate((ranks < 1, ranks < 5, torch.ones_like(ranks))):
            self.hits[row].index_add_(0, labels.cpu(), values.long().cpu())

    def result(self) -> dict[str, float]:
        """acc1, acc5 and mean_per_class_recall, as in CLIP_benchmark, in 0..1. Raises ValueError without images."""
        at_1, at_5, count = self.hits.double()
        if not count.sum():
            raise ValueError("no image of any class")
        present = count > 0
        return {
            "acc1": float(at_1.sum() / count.sum()),
            "acc5": float(at_5.sum() / count.sum()),
            "mean_per_class_recall": float((at_1[present] / count[present]).mean()),
        }


@dataclass(frozen=True)
class FewShotClassifier:
    """Ridge regression on whitened features, in closed form (big_vision, fewshot_lsr)."""

    mean: Float[Tensor, " D"]
    deviation: Float[Tensor, " D"]
    weights: Float[Tensor, "D+1 C"]  # the last row is of the constant feature

    @classmethod
    def fit(
        cls, features: Float[Tensor, "N D"], labels: Int[Tensor, " N"], n_classes: int, l2: float
    ) -> "FewShotClassifier":
        """Targets are -1 and 1. features: of the few shots alone; l2: the penalty, 2^10 in big_vision."""
        features = features.double()
        mean, deviation = features.mean(0), features.std(0, correction=0) + 1e-5
        x = _with_bias((features - mean) / deviation)
        y = 2.0 * F.one_hot(labels, n_classes).double() - 1
        if len(x) >= x.shape[1]:
            weights = torch.linalg.solve(x.T @ x + l2 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
        else:  # the same solution by the smaller system
            weights = x.T @ torch.linalg.solve(x @ x.T + l2 * torch.eye(len(x), dtype=x.dtype), y)
        return cls(mean, deviation, weights)

    def scores(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        return _with_bias((features.double() - self.mean) / self.deviation) @ self.weights


def _with_bias(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x[:, :1], _BIAS_FEATURE)], 1)


def draw_shots(labels: Sequence[int], n_classes: int, n_shots: int, seed: int) -> list[int]:
    """Positions of n_shots examples of each class, fewer where a class has fewer; as big_vision draws them."""
    generator, classes = np.random.default_rng(seed), np.asarray(labels)
    drawn = [generator.permutation(np.flatnonzero(classes == c))[:n_shots] for c in range(n_classes)]
    return [int(i) for positions in drawn for i in positions]


class FewShot:
    """Accuracy of several few-shot classifiers (one per seed), over batches of images."""

    def __init__(self, classifiers: Iterable[FewShotClassifier]) -> None:
        self.classifiers = list(classifiers)
        self.hits, self.count = torch.zeros(len(self.classifiers), dtype=torch.int64), 0

    def add(self, features: Float[Tensor, "N D"], labels: Int[Tensor, " N"]) -> None:
        features = features.cpu()
        for i, classifier in enumerate(self.classifiers):
            self.hits[i] += (classifier.scores(features).argmax(1) == labels).sum()
        self.count += len(labels)

    def result(self) -> dict[str, float]:
        """acc1: the mean over seeds; acc1_seed0 and so on."""
        if not self.count:
            raise ValueError("no image of any class")
        accuracy = (self.hits.double() / self.count).tolist()
        return {"acc1": float(np.mean(accuracy)), **{f"acc1_seed{i}": a for i, a in enumerate(accuracy)}}


def ranks(
    query: Float[Tensor, "N D"],
    query_group: Int[Tensor, " N"],
    key: Float[Tensor, "M D"],
    key_group: Int[Tensor, " M"],
    tile: int = 512,
) -> Int[Tensor, " N"]:
    """How many keys of other groups are at least as near to a query as the nearest of its group; M if that has none.

    O(tile * M) memory.
    """
    out = []
    for part, group in zip(query.split(tile), query_group.split(tile), strict=True):
        scores = part @ key.T
        same = group[:, None] == key_group[None, :]
        best = scores.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        rank = (~(scores < best) & ~same).sum(1)
        out.append(torch.where(same.any(1), rank, len(key)))
    return torch.cat(out)


def retrieval(
    image: Float[Tensor, "N D"],
    image_group: Int[Tensor, " N"],
    text: Float[Tensor, "M D"],
    text_group: Int[Tensor, " M"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k in both directions, and mean and median rank; a caption belongs to the images of its group.

    text_retrieval_recall@k: share of images with a caption of theirs among the k nearest (image to text).
    image_retrieval_recall@k: share of captions with an image of theirs among the k nearest (text to image). Names are
    CLIP_benchmark's, in 0..1; ranks are open_clip's, from 1.
    """
    out: dict[str, float] = {}
    for name, rank in (
        ("text_retrieval", ranks(image, image_group, text, text_group)),
        ("image_retrieval", ranks(text, text_group, image, image_group)),
    ):
        out |= {f"{name}_recall@{k}": float((rank < k).double().mean()) for k in ks}
        out[f"{name}_mean_rank"] = float(rank.double().mean()) + 1
        out[f"{name}_median_rank"] = float(np.floor(np.median(rank.cpu().numpy()))) + 1
    return out


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _unprojected(visual: nn.Module) -> Iterator[None]:
    """The image tower without its last projection."""
    if hasattr(visual, "trunk") and hasattr(visual, "head"):
        name, without = "head", nn.Identity()
    elif isinstance(getattr(visual, "proj", None), nn.Parameter):
        name, without = "proj", None
    else:
        yield
        return
    projection = getattr(visual, name)
    setattr(visual, name, without)
    try:
        yield
    finally:
        setattr(visual, name, projection)
