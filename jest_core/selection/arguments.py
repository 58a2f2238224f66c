"""The arguments of a selection, checked, in the form that the algorithm works on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import get_args

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from jest_core.choices import CRITERIA, METHODS, Criterion, Draw, Loss, Method, Precision
from jest_core.collectives import Learners, offsets_of
from jest_core.losses import TILE
from jest_core.selection.consensus import Statement, refuse_together
from jest_core.selection.embeddings import Embeddings
from jest_core.selection.learnability import ConditionalScores, SignedModel, signed_models

Uids = Tensor | NDArray[np.uint64] | Sequence[str]  # (B, 2) halves as integers, or B strings of 32 hex digits


class Diverged(ValueError):
    """A model's embeddings or logits are NaN or infinite: another try with the same weights would fail too."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `select` that are the same on all learners."""

    method: Method = "joint"
    criterion: Criterion
    loss: Loss = "sigmoid"
    draw: Draw = "sample"
    precision: Precision
    sub_batch_size: int
    n_chunks: int = 1
    gain: float
    seed: int
    step: int
    tile: int = TILE

    @property
    def n_draws(self) -> int:
        """How many chunks are drawn one after the other."""
        return METHODS[self.method].n_draws(self.n_chunks)

    def check(self) -> None:
        """Raises ValueError where a word or a number is not one that a selection can be made with."""
        words = {
            "method": [name for name, method in METHODS.items() if method.selects],
            "criterion": CRITERIA,
            "loss": get_args(Loss),
            "draw": get_args(Draw),
            "precision": get_args(Precision),
        }
        for name, choices in words.items():
            if (value := getattr(self, name)) not in choices:
                why = "; uniform batches need no selection" if value == "uniform" else ""
                raise ValueError(f"{name} {value!r} is none of {', '.join(choices)}{why}")
        b, n = self.sub_batch_size, self.n_chunks
        if not isinstance(b, int) or not isinstance(n, int):
            raise ValueError(f"sub_batch_size {b!r} and n_chunks {n!r} are not both whole numbers")
        if n < 1 or b < 1 or b % n:
            raise ValueError(f"sub_batch_size {b} is not a positive multiple of n_chunks {n}")
        if not 0 <= self.gain < float("inf"):
            raise ValueError(f"gain {self.gain} is not a finite number of at least 0")
        if self.tile < 1:
            raise ValueError(f"tile {self.tile} is not a positive number of rows")


@dataclass(frozen=True)
class Share:
    """This learner's share of a super-batch, on the device of the embeddings."""

    learner: Embeddings | None
    reference: Embeddings | None
    models: list[SignedModel]  # those of the two that the criterion uses
    uids: Int[Tensor, "B 2"]
    occurrences: Int[Tensor, " B"]
    valid: Bool[Tensor, " B"]  # False where a slot cannot be selected
    offsets: Int[Tensor, " R"]  # learner r has the positions offsets[r] .. offsets[r + 1] of the super-batch

    def __len__(self) -> int:
        return len(self.uids)

    @property
    def width(self) -> int:
        """Of the embeddings of the first model."""
        return self.models[0][1].image.shape[1]


def checked(
    learner: Embeddings | None,
    reference: Embeddings | None,
    settings: Settings,
    learners: Learners,
    *,
    uids: Uids,
    occurrences: Tensor | None,
    valid: Tensor | None,
) -> Share:
    """This learner's share. Raises ValueError, on all learners, where the arguments of one of them do not fit."""
    stated: Statement = asdict(settings)
    raised, slots = None, None
    try:
        settings.check()
        slots = _slots([m for m in (learner, reference) if m is not None], uids, occurrences, valid)
        learner, reference = _with_numbers(learner, reference)
        stated |= {"learner": _kind(learner), "reference": _kind(reference)}
        models = signed_models(learner, reference, settings.criterion)
    except Exception as error:
        raised = error
    counts = refuse_together(learners, raised, stated, 0 if slots is None else len(slots[0]))
    assert slots is not None
    words, times, valid = slots
    return Share(learner, reference, models, words, times, valid, offsets_of(counts).to(words.device))


def check_scores(conditional: ConditionalScores, valid: Tensor, sub_batch_size: int, learners: Learners) -> None:
    """Raises Diverged or ValueError, on all learners, where a valid logit is not finite, or too few slots are valid."""
    n_bad = (valid & ~torch.isfinite(conditional.matched_logits)).sum()  # a logit is finite where its embeddings are
    n_valid, n_bad = learners.sum(torch.stack([valid.sum(), n_bad])).tolist()
    if n_bad:
        raise Diverged(
            f"{n_bad} examples have NaN or infinite embeddings or logits: the model's weights have diverged, for which "
            "a lower learning rate or a longer warm-up is the cure; or mask these examples with valid"
        )
    if n_valid < sub_batch_size:
        raise ValueError(f"sub_batch_size {sub_batch_size} exceeds the {n_valid} valid examples of the super-batch")


def uid_words(uids: Uids) -> Int[Tensor, "B 2"]:
    """The two 64-bit halves of each uid, as int64; from (B, 2) uint64, or B strings of 32 hex digits."""
    if isinstance(uids, Tensor):
        words = uids.view(torch.int64) if uids.dtype == torch.uint64 else uids
    elif isinstance(uids, np.ndarray) and uids.dtype.kind in "iu":
        words = torch.from_numpy(np.ascontiguousarray(uids).view(np.int64))
    else:
        if bad := [u for u in uids if len(u) != 32]:
            raise ValueError(f"uid {bad[0]!r} does not have 32 hex digits")
        halves = np.array([(int(u[:16], 16), int(u[16:], 16)) for u in uids], dtype=np.uint64).reshape(-1, 2)
        words = torch.from_numpy(halves.view(np.int64))
    if words.ndim != 2 or words.shape[1] != 2:
        raise ValueError(f"uids have shape {tuple(words.shape)}, not (B, 2)")
    return words


def _slots(
    models: Sequence[Embeddings], uids: Uids, occurrences: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """uid words, occurrences and validity of each slot, on the embeddings' device."""
    if not models:
        raise ValueError("neither the learner's nor the reference's embeddings are given")
    n, device = len(models[0]), models[0].image.device
    for model in models:
        _check_embeddings(model, device)
        if len(model) != n:
            raise ValueError(f"learner and reference embeddings differ in number: {n} and {len(model)}")
    words = uid_words(uids).to(device)
    times = torch.zeros(len(words), dtype=torch.int64) if occurrences is None else occurrences
    valid = torch.ones(len(words), dtype=torch.bool) if valid is None else valid
    if len(words) != n or times.shape != (n,) or valid.shape != (n,):
        raise ValueError(
            f"{n} embeddings, {len(words)} uids, {tuple(times.shape)} occurrences and {tuple(valid.shape)} valid flags:"
            " one of each per example"
        )
    if times.is_floating_point() or valid.dtype != torch.bool:
        raise ValueError(f"occurrences are {times.dtype} and valid is {valid.dtype}, not integers and booleans")
    return words, times.to(device, torch.int64), valid.to(device)


def _check_embeddings(model: Embeddings, device: torch.device) -> None:
    image, text = model.image, model.text
    if image.shape != text.shape or image.ndim != 2 or not image.shape[1]:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} embeddings are not both (B, D)")
    if {image.dtype, text.dtype} - {torch.float16, torch.bfloat16, torch.float32}:
        raise ValueError(
            f"embeddings are {image.dtype} and {text.dtype}, not floating point of 16 or 32 bits; convert them"
        )
    if image.device != device or text.device != device:
        raise ValueError(f"embeddings are on {device}, {image.device} and {text.device}: put them on one device")


def _with_numbers(*models: Embeddings | None) -> list[Embeddings | None]:
    """The models with logit_scale and logit_bias as Python numbers, which are read from the device once for all."""
    values = [x for model in models if model is not None for x in (model.logit_scale, model.logit_bias)]
    tensors = [x.double().reshape(()) for x in values if isinstance(x, Tensor)]
    if len({x.device for x in tensors}) > 1:
        tensors = [x.cpu() for x in tensors]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    numbers = iter([next(read) if isinstance(x, Tensor) else float(x) for x in values])
    return [model and replace(model, logit_scale=next(numbers), logit_bias=next(numbers)) for model in models]


def _kind(model: Embeddings | None) -> list[str | int | float] | None:
    """What the embeddings of one model have in common on all learners."""
    if model is None:
        return None
    image, text = model.image, model.text
    numbers = float(model.logit_scale), float(model.logit_bias)
    return [str(image.dtype), str(text.dtype), image.shape[1], text.shape[1], *numbers]
