"""The two towers: an open_clip model as learner or as frozen reference, pixels and tokens -> unit-norm embeddings."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from jest_core.choices import ForwardPrecision, Loss
from jest_core.examples.inputs import Inputs
from jest_core.examples.preprocess import normalise, resize
from jest_core.examples.view import View
from jest_core.models import configurations, flexible, sharding
from jest_core.models.flexible import Resolution
from jest_core.run_file import Model
from jest_core.selection.learnability import Embeddings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Towers:
    """An open_clip model with what its inputs need."""

    model: Any  # an open_clip model: an nn.Module with encode_image, encode_text, logit_scale, logit_bias
    name: str
    inputs: Inputs
    compiled: bool = False
    sharded: bool = False

    @property
    def view(self) -> View:
        return self.inputs.view

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def tokens(self, captions: list[str]) -> Int[Tensor, "B L"]:
        return torch.from_numpy(self.inputs.tokenizer(captions))

    @property
    def loss(self) -> Loss:
        """What the model was made for: a sigmoid loss has a logit_bias and a softmax loss none."""
        return "softmax" if self.model.logit_bias is None else "sigmoid"

    def compile(self) -> None:
        """torch.compile both towers, in place; the first batches take a minute."""
        text = self.model.text if hasattr(self.model, "text") else self.model.transformer
        self.model.visual.compile()
        text.compile()
        self.compiled = True

    def checkpoint_activations(self) -> None:
        """Hold the activations of one layer at a time. Raises ValueError where the image tower cannot."""
        trunk = getattr(self.model.visual, "trunk", None)
        try:
            if trunk is not None:  # open_clip would only log that it cannot
                trunk.set_grad_checkpointing(True)
            self.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"training.activation_checkpointing: the image tower of {self.name} does not support it ({error}); "
                "give training.micro_batch_size instead"
            ) from error

    def shard(self, group: ProcessGroup) -> None:
        """Share the weights among the learners, in place: whatever embeds is collective then."""
        sharding.shard(self.model, group)
        self.sharded = True

    def resolution(self, image_size: int | None = None, patch_size: int | None = None) -> Resolution:
        """The model's own, but for what is given. Towers without patches, or with fixed ones, have no patch_size."""
        return _resolution(self.name, self.model.visual, image_size, patch_size)

    @torch.no_grad()
    def embed(
        self,
        pixels: UInt8[Tensor, "B 3 H W"],
        tokens: Int[Tensor, "B L"],
        *,
        batch_size: int,
        resolution: Resolution | None = None,
        precision: ForwardPrecision = "fp32",
    ) -> Embeddings:
        """Embeddings with the model's current weights, without gradients, in micro-batches of batch_size; float32.

        resolution: at which the image tower looks, its own if not given; larger pictures are reduced. precision: of the
        forward pass (autocast).
        """
        was_training = self.model.training
        self.model.eval()
        full = batch_size if len(pixels) > batch_size else len(pixels)
        batches = zip(pixels.split(batch_size), tokens.split(batch_size), strict=True)
        with self._autocast(precision):  # around all, so that weights are converted once
            parts = [self.encode(*self._filled(*batch, full), resolution, precision) for batch in batches]
        self.model.train(was_training)
        image, text = (torch.cat(side)[: len(pixels)] for side in zip(*parts, strict=True))
        return Embeddings(image, text, *self.scale_and_bias())

    def encode(
        self, pixels: Tensor, tokens: Tensor, resolution: Resolution | None, precision: ForwardPrecision
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Unit-norm image and text embeddings, float32, of pictures of 0..255 in one pass, differentiable."""
        image = self.image(pixels, resolution, precision)
        with self._autocast(precision):
            text = self.model.encode_text(tokens.to(self.device), normalize=False)
        return nn.functional.normalize(image, dim=-1), nn.functional.normalize(text.float(), dim=-1)

    def image(
        self, pixels: Tensor, resolution: Resolution | None = None, precision: ForwardPrecision = "fp32"
    ) -> Float[Tensor, "B D"]:
        """What the image tower gives for pictures of 0..255, not normalised, float32, differentiable."""
        resolution = resolution or self.resolution()
        shown = resize(pixels.to(self.device), resolution.image_size)
        shown = normalise(shown, self.inputs.mean, self.inputs.std)
        with self._autocast(precision), flexible.at(self.model.visual, resolution):
            found: Tensor = self.model.encode_image(shown, normalize=False)
        return found.float()

    def _autocast(self, precision: ForwardPrecision) -> torch.autocast:
        cached = not self.sharded  # weights in that precision, which would stay after their layer
        return torch.autocast(self.device.type, _DTYPES[precision], enabled=precision != "fp32", cache_enabled=cached)

    def _filled(self, pixels: Tensor, tokens: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Compiled towers are compiled again for another batch size: a last, smaller one is filled up."""
        missing = batch_size - len(pixels)
        if not self.compiled or missing <= 0:
            return pixels, tokens
        first = torch.zeros(missing, dtype=torch.int64)
        return torch.cat([pixels, pixels[first]]), torch.cat([tokens, tokens[first]])

    def scale_and_bias(self) -> tuple[float, float]:
        """logit_scale (the multiplier) and logit_bias; a softmax model has no bias, and 0 stands for it."""
        bias = self.model.logit_bias
        return float(self.model.logit_scale.detach().exp()), 0.0 if bias is None else float(bias.detach())


@lru_cache(maxsize=4)
def outline(name: str, given_context_length: int | None = None) -> Any:
    """An open_clip model without weights, on PyTorch's meta device: its sizes, and what it would compute."""
    options = {"load_weights": False, "output_dict": True, "device": "meta"}
    length = configurations.context_length(name, given_context_length)
    with torch.device("meta"), _warnings_off():
        model = open_clip.create_model(name, force_context_length=length, **options)
    flexible.make_flexible(model.visual)
    return model.eval().requires_grad_(False)  # torch's counter trips over attention pooling otherwise


def create(name: str, *, seed: int, pretrained: str | None = None, takes: Inputs | None = None) -> Towers:
    """An open_clip model by name with fresh weights from `seed`, or with those of a pretrained tag.

    takes: its inputs, where not those of its configuration. ViTs come flexible. Refuses towers whose output depends on
    the batch.
    """
    takes = takes or configurations.inputs(name, pretrained)
    options = {"output_dict": True, "force_context_length": takes.tokenizer.context_length}
    if pretrained is not None:
        model = open_clip.create_model(name, pretrained, **options)
    else:
        with torch.random.fork_rng(), _warnings_off():  # open_clip warns of weights that were never asked for
            torch.manual_seed(seed)
            model = open_clip.create_model(name, load_weights=False, **options)
    refuse_batch_norm(model)
    flexible.make_flexible(model.visual)
    return Towers(model, name, takes)


def build(model: Model, seed: int) -> Towers:
    """A run file's model, with weights from `seed` or those of its tag."""
    return create(model.name, seed=seed, pretrained=model.pretrained, takes=configurations.inputs_of(model))


@contextmanager
def _warnings_off() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def refuse_batch_norm(model: nn.Module) -> None:
    """Scores must not depend on which examples share a micro-batch (design: Views)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a {type(module).__name__}: its output depends on the batch; use layer or group norm"
            )


def refuse_loss(towers: Towers, loss: Loss, field: str) -> None:
    """A sigmoid loss has a logit_bias and a softmax loss none: it is learnt by the one, and left over by the other."""
    has_bias = towers.model.logit_bias is not None
    if has_bias != (loss == "sigmoid"):
        remedy = "take init_logit_bias out of the model's configuration" if has_bias else "give it an init_logit_bias"
        raise ValueError(
            f"{field} {loss!r} does not fit model {towers.name}, which has {'a' if has_bias else 'no'} logit_bias: "
            f"{remedy}, or change the loss"
        )


def _resolution(name: str, visual: nn.Module, size: int | None, patch_size: int | None) -> Resolution:
    own = flexible.patch_size(visual) if flexible.is_flexible(visual) else None
    return Resolution(size or configurations.image_size(name), patch_size or own)


def refuse_resolution(model: Model, part: str, size: int | None, patch_size: int | None) -> Resolution:
    """Refuse what the image tower cannot do; part is that of the run file that gives the sizes, and their prefix."""
    visual = outline(model.name, model.context_length).visual
    own, given = (_resolution(model.name, visual, *sizes) for sizes in ((None, None), (size, patch_size)))
    if given == own:
        return own
    if given.image_size > own.image_size:
        raise ValueError(
            f"{part}image_size {size} is larger than the pictures of {own.image_size} that {model.name} takes"
        )
    if patch_size is not None and not flexible.is_flexible(visual):
        raise ValueError(
            f"model {model.name} has no patches whose size can change, as plain ViTs have: give {part}image_size "
            f"instead of {part}patch_size {patch_size}"
        )
    if given.patch_size is not None and given.image_size % given.patch_size:
        raise ValueError(
            f"pictures of {given.image_size} pixels do not divide into patches of {given.patch_size}: change "
            f"{part}image_size or {part}patch_size"
        )
    try:
        with torch.no_grad(), flexible.at(visual, given):
            visual(torch.zeros(2, 3, given.image_size, given.image_size, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"model {model.name} takes pictures of {own.image_size} pixels and not of {part}image_size {size} "
            f"({error}): leave it out, or take a model that does"
        ) from error
    return given


def load_weights(towers: Towers, checkpoint: dict[str, Any]) -> None:
    """Take the weights of an open_clip checkpoint dictionary; names may start with `module.`."""
    own = towers.model.state_dict()
    state = {name.removeprefix("module."): v for name, v in checkpoint.get("state_dict", checkpoint).items()}
    towers.model.load_state_dict({name: sharding.placed(v, own.get(name, v)) for name, v in state.items()})


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in _sorted_state(model):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if value.ndim
            else repr(value.item()).encode()
        )
    return digest.hexdigest()


def _sorted_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from sorted(model.state_dict().items())
