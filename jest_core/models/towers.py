"""An open_clip model, image tower and text tower, as learner or frozen reference: pixels and tokens -> embeddings."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from jest_core.choices import LOSSES, Decoder, ForwardPrecision, Loss
from jest_core.examples.decode import View
from jest_core.examples.inputs import Inputs
from jest_core.examples.preprocess import normalise, resize
from jest_core.models import configurations, flexible, folders, sharding, weights
from jest_core.models.flexible import Resolution
from jest_core.run_file import Model
from jest_core.selection import Embeddings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Towers:
    """An open_clip model, with the pixels and tokens that it needs."""

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
        """The loss that the model was configured for: with a logit_bias sigmoid, without one softmax."""
        return "softmax" if self.model.logit_bias is None else "sigmoid"

    def compile(self) -> None:
        """torch.compile both towers, in place; the first batches then take a minute."""
        text = self.model.text if hasattr(self.model, "text") else self.model.transformer
        self.model.visual.compile()
        text.compile()
        self.compiled = True

    def checkpoint_activations(self) -> None:
        """Keep the activations of one layer at a time. Raises ValueError where the image tower does not support it."""
        trunk = getattr(self.model.visual, "trunk", None)
        try:
            if trunk is not None:  # open_clip would only log that the tower does not support it
                trunk.set_grad_checkpointing(True)
            self.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"training.activation_checkpointing: the image tower of {self.name} does not support it ({error}); "
                "give training.micro_batch_size instead"
            ) from error

    def shard(self, group: ProcessGroup) -> None:
        """Shard the weights over the learners, in place; embedding is collective from then on."""
        sharding.shard(self.model, group)
        self.sharded = True

    def resolution(self, image_size: int | None = None, patch_size: int | None = None) -> Resolution:
        """The model's resolution, except for what is given; without patch_size where patches have no variable size."""
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

        resolution: of the image tower, its own if not given; larger images are reduced. precision: of the forward pass
        (autocast).
        """
        was_training = self.model.training
        self.model.eval()
        full = batch_size if len(pixels) > batch_size else len(pixels)
        batches = zip(pixels.split(batch_size), tokens.split(batch_size), strict=True)
        with self._autocast(precision):  # around all batches, so that the weights are converted once
            parts = [self.encode(*self._filled(*batch, full), resolution, precision) for batch in batches]
        self.model.train(was_training)
        image, text = (torch.cat(side)[: len(pixels)] for side in zip(*parts, strict=True))
        return Embeddings(image, text, *self.scale_and_bias())

    def encode(
        self, pixels: Tensor, tokens: Tensor, resolution: Resolution | None, precision: ForwardPrecision
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]:
        """Unit-norm image and text embeddings, float32, of pixels in 0..255 in one forward pass, differentiable."""
        image = self.image(pixels, resolution, precision)
        with self._autocast(precision):
            text = self.model.encode_text(tokens.to(self.device), normalize=False)
        return nn.functional.normalize(image, dim=-1), nn.functional.normalize(text.float(), dim=-1)

    def image(
        self, pixels: Tensor, resolution: Resolution | None = None, precision: ForwardPrecision = "fp32"
    ) -> Float[Tensor, "B D"]:
        """Image embeddings of pixels in 0..255, not normalised, float32, differentiable."""
        resolution = resolution or self.resolution()
        pixels = resize(pixels.to(self.device, non_blocking=True), resolution.image_size)
        inputs = normalise(pixels, self.inputs.mean, self.inputs.std)
        with self._autocast(precision), flexible.at(self.model.visual, resolution):
            embeddings: Tensor = self.model.encode_image(inputs, normalize=False)
        return embeddings.float()

    def _autocast(self, precision: ForwardPrecision) -> torch.autocast:
        cached = not self.sharded  # a cache of converted weights would keep gathered layers in memory
        return torch.autocast(self.device.type, _DTYPES[precision], enabled=precision != "fp32", cache_enabled=cached)

    def _filled(self, pixels: Tensor, tokens: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """The batch, filled up to batch_size for compiled towers, which another size would compile again."""
        missing = batch_size - len(pixels)
        if not self.compiled or missing <= 0:
            return pixels, tokens
        first = torch.zeros(missing, dtype=torch.int64)
        return torch.cat([pixels, pixels[first]]), torch.cat([tokens, tokens[first]])

    def scale_and_bias(self) -> tuple[float, float]:
        """logit_scale (the multiplier) and logit_bias, which is 0 for a model without one."""
        bias = self.model.logit_bias
        return float(self.model.logit_scale.detach().exp()), 0.0 if bias is None else float(bias.detach())


@lru_cache(maxsize=4)
def outline(name: str, given_context_length: int | None = None) -> Any:
    """An open_clip model without weights, on PyTorch's meta device, to count parameters and FLOPs with."""
    # in training mode PyTorch's FLOP counter fails on attention pooling
    return without_weights(name, given_context_length).eval().requires_grad_(False)


def without_weights(name: str, given_context_length: int | None = None) -> Any:
    """An open_clip model on PyTorch's meta device, in training mode."""
    options = {"load_weights": False, "output_dict": True, "device": "meta"}
    length = configurations.context_length(name, given_context_length)
    with torch.device("meta"), _warnings_off():
        model = open_clip.create_model(folders.on_disk(name), force_context_length=length, **options)
    flexible.make_flexible(model.visual)
    return model.train()


def create(name: str, *, seed: int, pretrained: str | None = None, inputs: Inputs | None = None) -> Towers:
    """An open_clip model by name with fresh weights from `seed`, or with those of a pretrained tag.

    inputs: where they are not those of the model's configuration. ViTs are made flexible. Raises ValueError for towers
    whose output depends on the batch.
    """
    inputs = inputs or configurations.inputs(name, pretrained)
    options = {"output_dict": True, "force_context_length": inputs.tokenizer.context_length}
    if pretrained is not None:
        model = open_clip.create_model(name, pretrained, **options)
    else:
        with torch.random.fork_rng(), _warnings_off():  # open_clip warns that no pretrained weights are loaded
            torch.manual_seed(seed)
            model = open_clip.create_model(folders.on_disk(name), load_weights=False, **options)
    refuse_batch_norm(model)
    flexible.make_flexible(model.visual)
    return Towers(model, name, inputs)


def build(model: Model, seed: int, decoder: Decoder = "pillow") -> Towers:
    """A run file's model, with fresh weights from `seed` or with those of its pretrained tag. decoder: data.decoder."""
    inputs = configurations.inputs_of(model, decoder)
    return create(model.name, seed=seed, pretrained=model.pretrained, inputs=inputs)


@contextmanager
def _warnings_off() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def refuse_batch_norm(model: nn.Module) -> None:
    """Raises ValueError for batch norm: scores must not depend on which examples are in the same micro-batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{name} is a {type(module).__name__}: its output depends on the batch; use layer or group norm"
            )


def refuse_loss(towers: Towers, loss: Loss, field: str) -> None:
    """Raises ValueError for a sigmoid loss of a model without logit_bias, and for a softmax loss of one with it."""
    has_bias = towers.model.logit_bias is not None
    if has_bias != LOSSES[loss].has_bias:
        remedy = "take init_logit_bias out of the model's configuration" if has_bias else "give it an init_logit_bias"
        raise ValueError(
            f"{field} {loss!r} does not fit model {towers.name}, which has {'a' if has_bias else 'no'} logit_bias: "
            f"{remedy}, or change the loss"
        )


def _resolution(name: str, visual: nn.Module, size: int | None, patch_size: int | None) -> Resolution:
    default = flexible.patch_size(visual) if flexible.is_flexible(visual) else None
    return Resolution(size or configurations.image_size(name), patch_size or default)


def refuse_resolution(model: Model, part: str, size: int | None, patch_size: int | None) -> Resolution:
    """The model's resolution with these sizes. Raises ValueError where the image tower does not work at it.

    part: what stands before image_size and patch_size in the run file, for the error.
    """
    visual = outline(model.name, model.context_length).visual
    full, wanted = (_resolution(model.name, visual, *sizes) for sizes in ((None, None), (size, patch_size)))
    if wanted == full:
        return full
    if wanted.image_size > full.image_size:
        raise ValueError(
            f"{part}image_size {size} is larger than the pictures of {full.image_size} that {model.name} takes"
        )
    if patch_size is not None and not flexible.is_flexible(visual):
        raise ValueError(
            f"model {model.name} has no patches whose size can change, as plain ViTs have: give {part}image_size "
            f"instead of {part}patch_size {patch_size}"
        )
    if wanted.patch_size is not None and wanted.image_size % wanted.patch_size:
        raise ValueError(
            f"pictures of {wanted.image_size} pixels do not divide into patches of {wanted.patch_size}: change "
            f"{part}image_size or {part}patch_size"
        )
    try:
        with torch.no_grad(), flexible.at(visual, wanted):
            visual(torch.zeros(2, 3, wanted.image_size, wanted.image_size, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"model {model.name} takes pictures of {full.image_size} pixels and not of {part}image_size {size} "
            f"({error}): leave it out, or choose a model that does"
        ) from error
    return wanted


def load_weights(towers: Towers, checkpoint: Mapping[str, Any], source: str = "the checkpoint") -> None:
    """Load the weights of a checkpoint of open_clip, of jest or of another program (`weights.fitted`), in place.

    source: the name of its file, for errors. Raises ValueError where the weights are not those of the model.
    """
    placed_as = towers.model.state_dict()
    state = weights.fitted(checkpoint, placed_as, towers.name, source)
    towers.model.load_state_dict({name: sharding.placed(v, placed_as[name]) for name, v in state.items()})


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
