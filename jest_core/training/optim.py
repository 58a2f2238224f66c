"""AdamW parameter groups and learning-rate schedules."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jest_core.choices import Schedule
from jest_core.models import sharding


def adamw(
    model: nn.Module, *, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with no weight decay on gains, biases, logit_scale and logit_bias, as open_clip groups them.

    Those two are a separate group, as they stay whole where the other parameters are sharded.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    scalars, plain = [p for p in trained if p.ndim == 0], [p for p in trained if p.ndim == 1]
    decayed = [p for p in trained if p.ndim >= 2]
    groups = [
        {"params": scalars, "weight_decay": 0.0},
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=eps, fused=True)


def limit_scale(model: nn.Module) -> None:
    """Clamp the logit_scale of a softmax loss to 1..100 (Radford et al. 2021, arXiv:2103.00020, section 2.5)."""
    with torch.no_grad():
        model.get_parameter("logit_scale").clamp_(0.0, math.log(100.0))


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """Scale the gradients down to a norm of at most `limit`; returns their norm before that, over all learners."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = [[g for g in gradients if isinstance(g, DTensor) == sharded] for sharded in (False, True)]
    norms = [sharding.whole(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


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
    constant: the peak. cooldown_steps: over the last so many updates the rate falls linearly towards zero, which update
    n_steps would have.
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
