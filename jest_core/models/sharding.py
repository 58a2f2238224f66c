"""Weights, gradients and AdamW's moments in shares over the learners (FSDP2), for towers that do not fit on each.

Each layer's weights are gathered when it computes, and let go after it. logit_scale and logit_bias stay whole on every
learner. What leaves a run, checkpoints and evaluated towers, is whole again.
"""

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from jest_core.collectives import Learners


def shard(model: nn.Module, group: ProcessGroup) -> None:
    """An open_clip model in place, and before the optimizer is made. From then on a forward pass is collective, for
    scoring too."""
    mesh = DeviceMesh.from_group(group, next(model.parameters()).device.type)
    for module in (*_layers(model), model):
        fully_shard(module, mesh=mesh, ignored_params=set(_scalars(model)))
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def n_gathered(model: nn.Module) -> int:
    """How many weights a learner holds whole at once, at most: those outside the layers, the largest layer's, and as
    many of the next one, which are gathered meanwhile."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in _layers(model)]
    return sum(p.numel() for p in model.parameters()) - sum(layers) + 2 * max(layers, default=0)


def sum_scalar_gradients(model: nn.Module, learners: Learners) -> None:
    """As the other gradients are, after the backward pass: averaged over the learners."""
    for parameter in _scalars(model):
        assert parameter.grad is not None
        parameter.grad = learners.sum(parameter.grad) / learners.size


def whole(value: Tensor) -> Tensor:
    """A tensor of which learners hold shares, whole on each; collective for such, itself where it was whole."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every learner has -> this learner's share, where `like` is one."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The elements of a model's outermost lists and sequences: a transformer's blocks, a convolutional tower's
    stages."""
    found: list[nn.Module] = []
    for child in module.children():
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        found += [c for c in child.children() if next(c.parameters(), None) is not None] if is_list else _layers(child)
    return found


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 0]
