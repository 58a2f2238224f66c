"""A training pass of a model without weights, before a run starts: what it would do that nobody sees.

PyTorch's meta device computes shapes and the graph of gradients alone, so that this costs a second for any model.
"""

import random
from typing import Any, TypedDict

import numpy as np
import torch
from torch import nn

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_PASSES = 5  # in which a model that draws numbers does so each time, and another thread of the process hardly


class Trial(TypedDict):
    """What a training pass does beside computing embeddings."""

    untrained: list[str]  # parameters that the contrastive loss does not depend on
    hidden: list[str]  # sentences: state that changes in the pass, or that it draws random numbers from


def training_pass(model: Any) -> Trial:
    """One pass, forward and backward, of an open_clip model on the meta device in training mode; several where numbers
    are drawn meanwhile, as Python and NumPy have one generator for all threads."""
    versions = {name: buffer._version for name, buffer in model.named_buffers()}
    draws = all(_draws_in_pass(model) for _ in range(_PASSES))
    hidden = [f"{name} draws from {kind}" for name, kind in _own_generators(model)]
    hidden += [f"its buffer {name} changes" for name, b in model.named_buffers() if b._version != versions.get(name)]
    if draws:
        hidden.append("it draws from the generator of Python or NumPy")
    return {"untrained": [name for name, p in model.named_parameters() if p.grad is None], "hidden": hidden}


def _draws_in_pass(model: Any) -> bool:
    """Make a pass; whether a generator of Python or NumPy changed meanwhile."""
    before = _states()
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    length = getattr(model, "context_length", None) or model.text.context_length
    image = model.encode_image(torch.zeros(2, 3, height, width, device="meta"), normalize=True)
    text = model.encode_text(torch.zeros(2, length, dtype=torch.int64, device="meta"), normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
    (logits if model.logit_bias is None else logits + model.logit_bias).sum().backward()
    return _states() != before


def _own_generators(model: nn.Module) -> list[tuple[str, str]]:
    """Modules with a generator of their own, and what it is."""
    kinds = [(name, type(value)) for name, module in model.named_modules() for value in vars(module).values()]
    return [(name, f"a {kind.__name__} of its own") for name, kind in kinds if issubclass(kind, _GENERATORS)]


def _states() -> tuple[Any, ...]:
    numpy: Any = np.random.get_state()
    return random.getstate(), numpy[1].tobytes(), numpy[2]
