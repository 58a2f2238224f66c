"""One step of a learner: draw the sub-batch, and update on it."""

from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import nn

from jest_core.collectives import Learners
from jest_core.examples.super_batch import Examples
from jest_core.losses import sigmoid_loss, softmax_loss
from jest_core.models import sharding
from jest_core.selection.agreement import Agreement
from jest_core.training import optim
from jest_core.training.draw import Selector, draw, timed
from jest_core.training.forward import Features, Group
from jest_core.training.step_log import StepLog


@dataclass
class Learner(Selector):
    """A selector that trains its model."""

    optimizer: torch.optim.Optimizer = field(kw_only=True)
    # a TrainingPass, wrapped in DistributedDataParallel where each of several learners has all weights
    wrapped: nn.Module = field(kw_only=True)


class Optimisation(TypedDict):
    """What an update did."""

    loss: float  # nats per example
    learning_rate: float
    gradient_norm: float  # before clipping
    logit_scale: float  # the multiplier
    logit_bias: float


@dataclass
class StepResult(StepLog):
    """What one step did; all but `seconds` is the same on every learner."""

    optimisation: Optimisation
    agreement: Agreement  # of scoring at low and at full resolution
    seconds: dict[str, float]  # by part of the step


def train_step(learner: Learner, super_batch: Examples, step: int) -> StepResult:
    """Select from this learner's share of a super-batch, with all others, and update on the sub-batch (Algorithm 1).

    Collective: all learners call it with the same step.
    """
    drawn = draw(learner, super_batch, step)
    with timed(drawn.seconds, "train"):
        optimisation = _update(learner, drawn.groups, step)
    log = drawn.log
    log.summary["loss"] = optimisation["loss"]
    return StepResult(log.picks, log.bad_rows, log.summary, optimisation, drawn.agreement, drawn.seconds)


def _update(learner: Learner, groups: list[Group], step: int) -> Optimisation:
    """Forward, loss over all learners' shares, backward, AdamW."""
    config = learner.run.training
    rate = optim.learning_rate(
        step,
        peak=config.learning_rate,
        warmup_steps=config.warmup_steps,
        n_steps=learner.run.n_steps,
        schedule=config.schedule,
        cooldown_steps=config.cooldown_steps,
        timescale_steps=config.timescale_steps,
    )
    for parameters in learner.optimizer.param_groups:
        parameters["lr"] = rate
    learner.wrapped.train()
    out: Features = learner.wrapped(groups, step)
    if config.loss == "sigmoid":
        assert out.logit_bias is not None
        loss = sigmoid_loss(*out[:3], out.logit_bias, tile=config.loss_tile, group=learner.group)
    else:
        loss = softmax_loss(*out[:3], tile=config.loss_tile, group=learner.group)
    learner.optimizer.zero_grad(set_to_none=True)
    n_learners = Learners(learner.group).size
    (loss * n_learners).backward()  # gradients are averaged over the learners, and their sum is wanted
    if learner.towers.sharded:
        sharding.sum_scalar_gradients(learner.towers.model, Learners(learner.group))
    norm = optim.clip_gradients(learner.towers.model, config.gradient_clip)
    learner.optimizer.step()
    if config.loss == "softmax":
        optim.limit_scale(learner.towers.model)
    scale, bias = learner.towers.scale_and_bias()
    return {
        "loss": loss.item(),
        "learning_rate": rate,
        "gradient_norm": norm.item(),
        "logit_scale": scale,
        "logit_bias": bias,
    }
