"""The Triton kernel against float64 and the plain loops of tests/oracles.py; selection on the device against the CPU.

On the CPU the kernel runs in Triton's interpreter, which has no bfloat16.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deploy.gpu.results import Results
from jest_core.selection import Embeddings
from jest_core.selection.learnability import ConditionalScores, signed_models
from tests import oracles
from tests.synthetic import structured_models, uids

RTOL = 5e-6  # of a sum; what tests/core/selection/test_kernels.py asks for too
FAST_RTOL = 2e-2  # of products of bfloat16: a logit is off by 2**-8 of the scale at most
SIZES = [(163_840, 2048, 768), (8192, 2048, 512), (4097, 1025, 513), (130, 150, 33), (37, 21, 40), (5, 1, 1)]
SMALL_SIZES = [(130, 70, 33), (37, 21, 40), (5, 1, 1)]
SAME = 0.99  # share of a selection; sums differ in their last bits, and with them a few draws


def run(results: Results) -> None:
    broken = None if results.cuda else _interpreter_error()
    for size in SMALL_SIZES if results.small else SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            what = f"kernel, {size[0]:,} x {size[1]:,}, D = {size[2]}, {str(dtype).removeprefix('torch.')}"
            if dtype == torch.bfloat16 and not results.cuda:
                results.skip(what, "needs CUDA: Triton's interpreter has no bfloat16")
                continue
            if broken is not None:
                results.skip(what, f"needs CUDA: Triton's interpreter does not run here: {broken}")
                continue
            with results.attempt(what):
                _kernel(results, what, *size, dtype)
    with results.attempt("conditional scores against Algorithm 1 in plain loops"):
        _against_loops(results)
    if not results.cuda:
        results.skip("selection on the device against the CPU's", "needs CUDA")
        return
    for n, b, width in [(2048, 512, 64)] if results.small else [(2048, 512, 64), (8192, 2048, 512)]:
        what = f"selection on the device against the CPU's, B = {n:,}, b = {b:,}, D = {width}"
        with results.attempt(what):
            _against_the_cpu(results, what, n, b, width)


def _interpreter_error() -> str | None:
    """Why Triton's interpreter does not run here, as that of Triton 3.6 does not with NumPy 2.5."""
    from triton.runtime.errors import InterpreterError

    from jest_core.selection import kernels

    try:
        x = torch.ones(2, 2)
        kernels.cross_losses(x, x, x, x, 1.0, 0.0)
    except InterpreterError as error:
        return str(error)
    return None


def _kernel(results: Results, what: str, n: int, n_taken: int, width: int, dtype: torch.dtype) -> None:
    from jest_core.selection import kernels

    rows, taken = structured_models(max(n, n_taken), width, device=results.device)
    image, text = rows.image[:n].to(dtype), rows.text[:n].to(dtype)
    taken_image, taken_text = taken.image[:n_taken].to(dtype), taken.text[:n_taken].to(dtype)
    expected = _in_float64(image, text, taken_image, taken_text)

    def worst(fast: bool) -> float:
        """Largest relative error of a sum."""
        sums = kernels.cross_losses(image, text, taken_image, taken_text, 20.0, -8.0, fast=fast)
        return float(((sums - expected).abs() / expected.abs().clamp_min(1e-12)).max())

    exact = worst(False)
    if not results.cuda:
        results.check(what, exact <= RTOL, worst_relative_error=exact)
        return
    fast = worst(True)
    passed = exact <= RTOL and fast <= FAST_RTOL
    results.check(what, passed, worst_relative_error=exact, worst_of_fast=fast)


def _in_float64(image: Tensor, text: Tensor, taken_image: Tensor, taken_text: Tensor) -> Tensor:
    parts = []
    for start in range(0, len(image), 8192):
        part = slice(start, start + 8192)
        pairs = (image[part], taken_text), (text[part], taken_image)
        parts.append(torch.stack([F.softplus(20.0 * a.double() @ b.double().T - 8.0).sum(1) for a, b in pairs]).sum(0))
    return torch.cat(parts)


def _against_loops(results: Results) -> None:
    n, width, taken = 37, 40, torch.arange(0, 37, 2)
    models = structured_models(n, width)
    dense = [
        oracles.sigmoid_pair_losses(m.image.tolist(), m.text.tolist(), float(m.logit_scale), float(m.logit_bias))
        for m in models
    ]
    scores = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(*dense, strict=True)]
    expected = torch.tensor(oracles.conditional_scores(scores, taken.tolist()), dtype=torch.float64)
    learner, reference = (_moved(m, results.device) for m in models)
    signed = signed_models(learner, reference, "learnability")
    conditional = ConditionalScores(signed)
    conditional.add([model[taken.to(results.device)] for _, model in signed])
    others = torch.ones(n, dtype=torch.bool)
    others[taken] = False  # of those that are taken the running sums hold their own pair as a mismatch
    worst = float((conditional().cpu() - expected)[others].abs().max())
    results.check("conditional scores against Algorithm 1 in plain loops", worst <= 1e-3, worst_nats=worst)


def _against_the_cpu(results: Results, what: str, n: int, b: int, width: int) -> None:
    from jest_core.selection.algorithm import select

    models = structured_models(n, width)
    for dtype in (torch.float32, torch.bfloat16):
        given = [Embeddings(m.image.to(dtype), m.text.to(dtype), m.logit_scale, m.logit_bias) for m in models]
        drawn = partial(select, sub_batch_size=b, uids=uids(n), seed=0, step=0)
        cpu, device = drawn(*given), drawn(*(_moved(m, results.device) for m in given))
        same = len(set(cpu.indices.tolist()) & set(device.indices.tolist())) / b
        off = abs(device.sub_batch_score / cpu.sub_batch_score - 1)
        kind = str(dtype).removeprefix("torch.")
        results.check(f"{what}, {kind}", same >= SAME and off <= 1e-3, same_examples=same, score_off_by=off)


def _moved(model: Embeddings, device: str) -> Embeddings:
    return Embeddings(model.image.to(device), model.text.to(device), model.logit_scale, model.logit_bias)
