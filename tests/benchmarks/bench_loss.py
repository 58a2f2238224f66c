"""The tiled losses, forward and backward, compared with open_clip's.

python -m tests.benchmarks.bench_loss [--device cuda] [--batch 32768 --width 768 --dtype bfloat16] [--smaller 16]
"""

from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F
import typer
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from jest_core.losses import sigmoid_loss, softmax_loss
from tests.benchmarks.measure import console, machine, peak_bytes, seconds, table, threads
from tests.synthetic import structured_models

Leaves = tuple[Tensor, Tensor, Tensor, Tensor]
CHUNK = 1024


def leaves(batch: int, width: int, device: str, dtype: str) -> Leaves:
    learner, _ = structured_models(batch, width)
    embeddings = (x.to(device, getattr(torch, dtype)).requires_grad_() for x in (learner.image, learner.text))
    image, text = embeddings
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (20.0, -8.0))
    return image, text, scale, bias


def open_clip_sigmoid(x: Leaves) -> Tensor:
    return SigLipLoss()(*x)


def open_clip_sigmoid_chunked(x: Leaves) -> Tensor:
    """What chunk_size does after open_clip 3.3, which lacks it: the same loss by rows, autograd keeping every chunk."""
    if "chunk_size" in signature(SigLipLoss).parameters:
        return SigLipLoss(chunk_size=CHUNK)(*x)
    image, text, scale, bias = x
    total = torch.zeros((), device=image.device)
    for start in range(0, len(image), CHUNK):
        logits = scale * image[start : start + CHUNK] @ text.T + bias
        total = total + F.softplus(logits).sum() - logits.diagonal(start).sum()
    return total / len(image)


def jest_sigmoid(x: Leaves) -> Tensor:
    return sigmoid_loss(*x)


def open_clip_softmax(x: Leaves) -> Tensor:
    return ClipLoss()(*x[:3])


def jest_softmax(x: Leaves) -> Tensor:
    return softmax_loss(*x[:3])


def step(loss: Callable[[Leaves], Tensor], x: Leaves) -> None:
    """Forward and backward."""
    loss(x).backward()
    for leaf in x:
        leaf.grad = None


def bytes_saved_for_backward(loss: Callable[[Leaves], Tensor], x: Leaves) -> int:
    """Bytes of the tensors that autograd saves between forward and backward, without the arguments themselves."""
    n_bytes = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        n_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = loss(x)
    for leaf in x:
        n_bytes.pop(leaf.untyped_storage().data_ptr(), None)
    del out
    return sum(n_bytes.values())


def main(batch: int = 8192, width: int = 512, device: str = "cpu", dtype: str = "float32", smaller: int = 1) -> None:
    threads()
    console.print(machine(device))
    batch //= smaller
    prepare = partial(leaves, batch, width, device, dtype)
    x = prepare()
    for kind in (
        {"open_clip SigLipLoss": open_clip_sigmoid, f"the same in chunks of {CHUNK} rows": open_clip_sigmoid_chunked,
         "jest sigmoid_loss": jest_sigmoid},
        {"open_clip ClipLoss": open_clip_softmax, "jest softmax_loss": jest_softmax},
    ):  # fmt: skip
        took = seconds({name: partial(step, loss, x) for name, loss in kind.items()}, 5, device)
        saved = {name: bytes_saved_for_backward(loss, x) for name, loss in kind.items()}
        peak = {name: peak_bytes(partial(step, loss), prepare, device)[0] for name, loss in kind.items()}
        rows = [
            [name, f"{took[name]:.2f}", f"{took[name] / list(took.values())[-1]:.2f}", f"{saved[name] / 1e6:,.0f}",
             f"{peak[name] / 1e6:,.0f}"] for name in kind
        ]  # fmt: skip
        columns = ["", "seconds", "of jest's", "MB held for backward", "peak MB above the embeddings"]
        table(f"forward and backward, B = {batch:,}, D = {width}, {dtype}", columns, rows)


if __name__ == "__main__":
    typer.run(main)
