"""Sigmoid and softmax loss, forward and backward, over a batch of one card: against open_clip's, in time and memory."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from deploy.gpu import timing
from deploy.gpu.results import Results
from tests import oracles
from tests.benchmarks import bench_loss
from tests.benchmarks.bench_loss import Leaves

KINDS: dict[str, tuple[Callable[[Leaves], Tensor], Callable[[Leaves], Tensor]]] = {
    "sigmoid": (bench_loss.jest_sigmoid, bench_loss.open_clip_sigmoid),
    "softmax": (bench_loss.jest_softmax, bench_loss.open_clip_softmax),
}
RTOL = 1e-4  # of the largest gradient


def run(results: Results) -> None:
    with results.attempt("sigmoid loss against the double loop"):
        _against_loops(results)
    compared, timed = (256, 512) if results.small else (4096, 32_768)
    width = 64 if results.small else 768
    rate = timing.product_rate(results.device, torch.float32, 512 if results.small else 8192)
    results.row("what the device sustains", float32_products_tflops=rate / 1e12)
    for kind, (ours, theirs) in KINDS.items():
        with results.attempt(f"{kind}: gradients against open_clip's"):
            _compare(results, kind, ours, theirs, compared, width)
    x = bench_loss.leaves(timed, width, results.device, "float32")
    for kind, pair in KINDS.items():
        # logits, and the gradients of both sides; of the softmax the logits twice
        floor = (4 if kind == "softmax" else 3) * 2 * timed**2 * width / rate
        for name, loss in zip(("jest", "open_clip"), pair, strict=True):
            what = f"{kind}, {name}: forward and backward, b = {timed:,}, D = {width}, float32"
            with results.attempt(what):
                step = partial(bench_loss.step, loss, x)
                taken = timing.seconds(step, results.device, repeats=3)
                peak = timing.peak_mb(step, results.device)
                results.row(what, milliseconds=1e3 * taken, times_its_products=taken / floor, peak_mb=peak)
            for leaf in x:
                leaf.grad = None
            if results.cuda:
                torch.cuda.empty_cache()


def _against_loops(results: Results) -> None:
    x = bench_loss.leaves(37, 40, results.device, "float32")
    dense = oracles.sigmoid_pair_losses(x[0].tolist(), x[1].tolist(), 20.0, -8.0)
    expected = sum(map(sum, dense)) / 37
    found = bench_loss.jest_sigmoid(x).item()
    off = abs(found / expected - 1)
    results.check("sigmoid loss against the double loop", off <= 1e-5, relative_error=off)


def _compare(
    results: Results,
    kind: str,
    ours: Callable[[Leaves], Tensor],
    theirs: Callable[[Leaves], Tensor],
    b: int,
    width: int,
) -> None:
    x = bench_loss.leaves(b, width, results.device, "float32")
    trained = x[:3] if kind == "softmax" else x
    losses, gradients = [], []
    for loss in (ours, theirs):
        value = loss(x)
        gradients.append(torch.autograd.grad(value, trained))
        losses.append(value.item())
    off = abs(losses[0] / losses[1] - 1)
    worst = max(float((a - c).abs().max() / c.abs().max()) for a, c in zip(*gradients, strict=True))
    what = f"{kind}: gradients against open_clip's, b = {b:,}, D = {width}"
    results.check(what, off <= RTOL and worst <= RTOL, loss_off_by=off, worst_gradient_off_by=worst)
