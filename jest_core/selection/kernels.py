"""The sums of learnability.cross_losses as one CUDA kernel, in Triton: no logits are written to global memory.

TRITON_INTERPRET=1, set before the first import, runs the same kernel on the CPU, for float32 and float16 inputs (the
interpreter's products of bfloat16 are wrong).
"""

import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_COLUMNS = 64  # of a tile of logits; 64 terms of at most log(2) are the logarithm of a finite float32
_SPAN = 1024  # drawn examples that one program goes through; more of them are split among more programs
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def cross_losses(
    image: Float[Tensor, "B D"],
    text: Float[Tensor, "B D"],
    drawn_image: Float[Tensor, "n D"],
    drawn_text: Float[Tensor, "n D"],
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    fast: bool = False,
    tiles: triton.Config | None = None,
) -> Float[Tensor, " B"]:
    """Sigmoid losses of each example with every drawn one as mismatches, in both directions, summed; float64.

    Products are in the type of the inputs, summed in float32 (float32 itself as three products of TF32); `fast`
    makes them bfloat16. tiles: other ones than `tiles_of` the type, to compare their times.
    """
    kinds = {x.dtype for x in (image, text, drawn_image, drawn_text)}
    product = torch.bfloat16 if fast else kinds.pop() if len(kinds) == 1 else torch.float32
    spans = triton.cdiv(len(drawn_image), _SPAN)
    out = torch.empty(spans, len(image), dtype=torch.float32, device=image.device)
    options = (tiles or tiles_of(product)).all_kwargs()
    _cross_losses[(triton.cdiv(len(image), options["ROWS"]), spans)](
        *(x.contiguous() for x in (image, text, drawn_image, drawn_text)),
        out,
        float(logit_scale),
        float(logit_bias),
        len(image),
        len(drawn_image),
        image.shape[1],
        PRODUCT=_TYPES[product],
        COLUMNS=_COLUMNS,
        SPAN=_SPAN,
        LOG2E=math.log2(math.e),
        **options,
    )
    return out.sum(0, dtype=torch.float64)


def tiles_of(product: torch.dtype) -> triton.Config:
    """Tiles that every GPU from sm_80 on has room for. WIDTH: of D at a time, as shared memory allows.

    They are not tuned as a run starts: other tiles change the last bits of a sum, and all learners, whatever their
    number and their GPUs, have to select the same examples.
    """
    return triton.Config({"ROWS": 128, "WIDTH": 32 if product == torch.float32 else 64}, num_warps=8, num_stages=3)


@triton.jit
@no_type_check  # shape checks would wrap it, and Triton compiles the function's own source
def _cross_losses(
    image, text, drawn_image, drawn_text, out, scale, bias, n_rows, n_drawn, width,
    PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr,
    LOG2E: tl.constexpr,
):  # fmt: skip
    """One program: ROWS examples against SPAN drawn ones, in both directions."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * SPAN
    sums = tl.zeros((ROWS,), tl.float32)
    for start in range(first, tl.minimum(first + SPAN, n_drawn), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        sums += _softplus_sums(image, drawn_text, rows, columns, scale, bias, n_rows, n_drawn, width,
                               PRODUCT, ROWS, COLUMNS, WIDTH, LOG2E)  # fmt: skip
        sums += _softplus_sums(text, drawn_image, rows, columns, scale, bias, n_rows, n_drawn, width,
                               PRODUCT, ROWS, COLUMNS, WIDTH, LOG2E)  # fmt: skip
    tl.store(out + tl.program_id(1) * n_rows + rows, sums, mask=rows < n_rows)


@triton.jit
@no_type_check
def _softplus_sums(
    left, right, rows, columns, scale, bias, n_rows, n_columns, width,
    PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """losses.softplus_sums of a tile of logits in registers."""
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, WIDTH):
        inner = start + tl.arange(0, WIDTH)
        a = tl.load(left + rows[:, None].to(tl.int64) * width + inner[None, :],
                    mask=(rows < n_rows)[:, None] & (inner < width)[None, :], other=0.0)  # fmt: skip
        b = tl.load(right + columns[None, :].to(tl.int64) * width + inner[:, None],
                    mask=(columns < n_columns)[None, :] & (inner < width)[:, None], other=0.0)  # fmt: skip
        logits = tl.dot(a.to(PRODUCT), b.to(PRODUCT), logits, input_precision="tf32x3")
    logits = tl.where((columns < n_columns)[None, :], scale * logits + bias, -float("inf"))
    x = tl.exp2(-tl.abs(logits) * LOG2E)
    return tl.sum(tl.maximum(logits, 0.0), 1) + _log1p(tl.reduce(x, 1, _joined))


@triton.jit
@no_type_check
def _joined(x, y):
    return x + y + x * y  # (1 + x)(1 + y) - 1


@triton.jit
@no_type_check
def _log1p(x):
    """log(1 + x) of x >= 0, also where 1 + x rounds to 1 (Kahan): the slope corrects the rounding of 1 + x."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))
