"""Embeddings -> zero-shot classification and retrieval scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from jest_core.towers import Towers


@dataclass(frozen=True)
class ClassNames:
    """A zero-shot task: class identifiers, the names of each, and the prompt templates (`{}` is the name)."""

    ids: Sequence[str]
    names: Sequence[Sequence[str]]
    templates: Sequence[str]


@torch.no_grad()
def class_embeddings(towers: Towers, classes: ClassNames, batch_size: int = 512) -> Float[Tensor, "C D"]:
    """Per class the mean of its prompts' unit-norm embeddings, normalised again (paper section 9)."""
    prompts = [template.format(name) for names in classes.names for name in names for template in classes.templates]
    owner = torch.tensor(
        [i for i, names in enumerate(classes.names) for _ in range(len(names) * len(classes.templates))]
    )
    was_training = towers.model.training
    towers.model.eval()
    parts = [
        towers.model.encode_text(towers.tokens(prompts[i : i + batch_size]).to(towers.device), normalize=True)
        .float()
        .cpu()
        for i in range(0, len(prompts), batch_size)
    ]
    towers.model.train(was_training)
    sums = torch.zeros(len(classes.ids), parts[0].shape[1]).index_add_(0, owner, torch.cat(parts))
    return F.normalize(sums, dim=1)


def zero_shot(image: Float[Tensor, "N D"], classes: Float[Tensor, "C D"], labels: Int[Tensor, "N"]) -> dict[str, float]:
    """acc1, acc5 and mean_per_class_recall, as CLIP_benchmark names them, in 0..1."""
    ranked = (image @ classes.T).topk(min(5, len(classes)), dim=1).indices
    hits = ranked == labels[:, None]
    present = labels.unique()
    recalls = torch.stack([hits[labels == c, 0].float().mean() for c in present])
    return {
        "acc1": hits[:, 0].float().mean().item(),
        "acc5": hits.any(1).float().mean().item(),
        "mean_per_class_recall": recalls.mean().item(),
    }


def retrieval(
    image: Float[Tensor, "N D"],
    text: Float[Tensor, "M D"],
    matches: Bool[Tensor, "N M"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k both ways: some matching caption (or image) is among the k nearest; names as CLIP_benchmark's."""
    similarity = image @ text.T
    out = {}
    for k in ks:
        for name, scores, truth in (
            ("text_retrieval_recall", similarity, matches),  # image -> text
            ("image_retrieval_recall", similarity.T, matches.T),  # text -> image
        ):
            near = scores.topk(min(k, scores.shape[1]), dim=1).indices
            out[f"{name}@{k}"] = truth.gather(1, near).any(1).float().mean().item()
    return out
