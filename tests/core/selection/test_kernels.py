"""The Triton kernel in its interpreter; on a GPU the same tests run it compiled, in bfloat16 too."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from jest_core.selection import kernels
from tests.synthetic import structured_models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def both(
    n: int, n_drawn: int, width: int, dtype: torch.dtype, scale: float, bias: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's sums, and those of float64 products of the same embeddings."""
    rows, drawn = (m for m in structured_models(max(n, n_drawn), width))
    sides = [x.to(DEVICE, dtype) for x in (rows.image[:n], rows.text[:n], drawn.image[:n_drawn], drawn.text[:n_drawn])]
    image, text, drawn_image, drawn_text = (x.double() for x in sides)
    pairs = (image, drawn_text), (text, drawn_image)
    expected = torch.stack([F.softplus(scale * a @ b.T + bias).sum(1) for a, b in pairs]).sum(0)
    return kernels.cross_losses(*sides, scale, bias), expected


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("scale", "bias"), [(20.0, -8.0), (110.0, -12.0), (10.0, 30.0)])
def test_sums_equal_those_of_float64(dtype: torch.dtype, scale: float, bias: float):
    actual, expected = both(37, 21, 40, dtype, scale, bias)
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=1e-7)


def test_sizes_that_no_tile_divides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_SPAN", 64)  # three spans
    actual, expected = both(130, 150, 33, torch.float32, 20.0, -8.0)
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=1e-7)


def test_embeddings_of_different_dtypes_are_computed_in_float32():
    model, _ = structured_models(20, 16)
    sides = [x.to(DEVICE) for x in (model.image.half(), model.text, model.image, model.text.half())]
    actual = kernels.cross_losses(*sides, 20.0, -8.0)
    expected = kernels.cross_losses(*(x.float() for x in sides), 20.0, -8.0)
    torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_selection_on_the_gpu_uses_the_kernel_and_equals_the_cpu():
    from jest_core.selection.algorithm import Embeddings, select
    from tests.synthetic import uids

    models = structured_models(2048, 64)
    moved = [Embeddings(m.image.cuda(), m.text.cuda(), m.logit_scale, m.logit_bias) for m in models]
    options = {"sub_batch_size": 512, "uids": uids(2048), "seed": 0, "step": 0}
    cpu, gpu = select(*models, **options), select(*moved, **options)
    same = len(set(cpu.indices.tolist()) & set(gpu.indices.tolist()))
    assert same >= 0.99 * 512  # sums differ in their last bits, and with them a few draws
    assert gpu.sub_batch_score == pytest.approx(cpu.sub_batch_score, rel=1e-3)


COMPILE = """
import json, sys
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from jest_core.selection import kernels

shared = []
for capability, given, product in json.loads(sys.argv[1]):
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[given]
    tiles = kernels.tiles_of(getattr(torch, product))
    constants = {"PRODUCT": getattr(tl, product), "COLUMNS": kernels._COLUMNS, "SPAN": kernels._SPAN, "LOG2E": 1.4427}
    constants |= tiles.kwargs
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    signature = dict.fromkeys(("image", "text", "drawn_image", "drawn_text"), "*" + short)
    signature |= {"out": "*fp32", "scale": "fp32", "bias": "fp32", "n_rows": "i32", "n_drawn": "i32", "width": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    # as at the paper's sizes: addresses and sizes are multiples of 16, and loads run ahead of products in shared memory
    multiples = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(kernels._cross_losses, signature, constants, multiples)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.asm["cubin"]
    shared.append(made.metadata.shared)
print(json.dumps(shared))
"""
SHARED = {80: 163_000, 90: 227_000}  # bytes of shared memory of an A100 and an H100
PRODUCTS = [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("float32", "bfloat16")]


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_present(tmp_path):
    """Down to machine code, within the shared memory of each GPU. One process compiles all variants, as importing takes
    as long as compiling."""
    variants = [(capability, *pair) for capability in SHARED for pair in PRODUCTS]
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(variants)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    shared = json.loads(ran.stdout)
    assert len(shared) == len(variants)
    for (capability, given, product), n_bytes in zip(variants, shared, strict=True):
        assert n_bytes <= SHARED[capability], (capability, given, product)
