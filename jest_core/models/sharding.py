"""Weights, gradients and AdamW's moments sharded over the learners (FSDP2), for models too large for one GPU.

The weights of a layer are gathered while it computes, and freed afterwards. logit_scale and logit_bias stay whole on
every learner. Checkpoints and evaluated models have whole weights.
"""

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from jest_core.collectives import Learners


def shard(model: nn.Module, group: ProcessGroup) -> None:
    """Shard an open_clip model in place, before its optimizer is created. Each forward pass, also for scoring, is
    collective from then on."""
    mesh = DeviceMesh.from_group(group, next(model.parameters()).device.type)
    for module in (*_layers(model), model):
        fully_shard(module, mesh=mesh, ignored_params=set(_scalars(model)))
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def n_gathered(model: nn.Module) -> int:
    """How many weights a learner has whole at the same time, at most: those outside the layers, those of the largest
    layer, and as many of the next one, which are gathered in the meantime."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in _layers(model)]
    return sum(p.numel() for p in model.parameters()) - sum(layers) + 2 * max(layers, default=0)


def sum_scalar_gradients(model: nn.Module, learners: Learners) -> None:
    """Average the gradients of logit_scale and logit_bias over the learners, as FSDP does the others."""
    for parameter in _scalars(model):
        assert parameter.grad is not None
        parameter.grad = learners.sum(parameter.grad) / learners.size


def whole(value: Tensor) -> Tensor:
    """A sharded tensor, gathered on each learner, which is collective; any other tensor itself."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def placed(value: Tensor, like: Tensor) -> Tensor:
    """This learner's share of a whole tensor that every learner has, if `like` is sharded; else the tensor itself."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _layers(module: nn.Module) -> list[nn.Module]:
    """The elements of a model's outermost lists and sequences: a transformer's blocks, a convolutional tower's
    stages."""
    layers: list[nn.Module] = []
    for child in module.children():
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        layers += [c for c in child.children() if next(c.parameters(), None) is not None] if is_list else _layers(child)
    return layers


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 0]
