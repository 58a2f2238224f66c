"""AdamW parameter groups and learning-rate schedules."""

import math

import torch
from torch import nn

from jest_core.choices import Schedule


def adamw(
    model: nn.Module, *, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with no weight decay on gains, biases, logit_scale and logit_bias, as open_clip groups them."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for _, p in named if p.ndim < 2]
    decayed = [p for _, p in named if p.ndim >= 2]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=eps, fused=True)


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    n_steps: int,
    schedule: Schedule,
    cooldown_steps: int = 0,
    timescale_steps: int = 10_000,
) -> float:
    """The learning rate of update `step` (from 0): a linear warm-up, then one of the schedules.

    cosine: half a cosine to zero. rsqrt: peak / sqrt(1 + steps since the warm-up / timescale_steps), as in big_vision.
    constant: the peak. cooldown_steps: the last so many updates go linearly towards zero, which update n_steps would
    reach.
    """
    if step < warmup_steps:
        rate = peak * (step + 1) / warmup_steps
    elif schedule == "cosine":
        rate = peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, n_steps - warmup_steps)))
    elif schedule == "rsqrt":
        rate = peak / math.sqrt(1 + (step - warmup_steps) / timescale_steps)
    else:
        rate = peak
    return rate * min(1.0, (n_steps - step) / cooldown_steps) if cooldown_steps else rate
