"""What makes arithmetic faster on a learner's machine: what advice on it rests on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import node_checks

if TYPE_CHECKING:
    import torch

_AMPERE = 8  # the first major number of CUDA's compute capability with products of bfloat16


@dataclass(frozen=True)
class Hardware:
    """gpu: whether the learner computes on one. bf16: whether products of bfloat16 are faster than those of float32
    there. compiles: whether torch.compile finds its compilers."""

    gpu: bool
    bf16: bool
    compiles: bool


def of(device: torch.device) -> Hardware:
    """That of this machine. A CPU multiplies bfloat16 faster where it has instructions for it (AVX512_BF16, AMX, Arm's
    BF16); on others PyTorch converts each product, and takes many times as long as with float32."""
    import torch

    from jest_core import losses

    gpu = device.type == "cuda"
    bf16 = torch.cuda.get_device_capability(device)[0] >= _AMPERE if gpu else losses.has_bfloat16_products(device)
    return Hardware(gpu, bf16, not node_checks.lacks(gpus=gpu, compiled=True))
