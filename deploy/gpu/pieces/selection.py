"""Selection at the paper's size: milliseconds, memory, and its share of a step, against its matrix products alone."""

from typing import Any

import torch

from deploy.gpu import timing
from deploy.gpu.results import Results
from jest_core import flops
from jest_core.choices import Precision
from jest_core.selection import Embeddings, select
from jest_core.selection.arguments import uid_words
from tests.benchmarks.bench_flexi import run_of
from tests.synthetic import structured_models, uids

GOAL = 0.05  # of a step's time
# rows, width, warps, stages
TILES = [(128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 4), (64, 64, 4, 3), (256, 64, 8, 3), (128, 128, 8, 3)]


def run(results: Results) -> None:
    n, b, width = (2048, 512, 64) if results.small else (163_840, 32_768, 768)
    dtype = torch.bfloat16 if results.cuda else torch.float32
    models = structured_models(n, width, device=results.device)
    pair = [Embeddings(m.image.to(dtype), m.text.to(dtype), m.logit_scale, m.logit_bias) for m in models]
    del models
    rate = timing.product_rate(results.device, dtype, 512 if results.small else 8192)
    copied = timing.copy_rate(results.device, 1 << 24 if results.small else 1 << 32)
    results.row("what the device sustains", matrix_products_tflops=rate / 1e12, copy_gb_a_second=copied / 1e9)
    sizes = f"B = {n:,}, b = {b:,}, D = {width}, N = 16, {str(dtype).removeprefix('torch.')}"
    floor = timing.seconds(lambda: _products(pair, b // 16), results.device, repeats=3)
    results.row(f"its matrix products alone, {sizes}", milliseconds=1e3 * floor)
    step = _least_step_seconds(rate, b)
    words = uid_words(uids(n)).to(results.device)
    precisions: tuple[Precision, ...] = ("exact", "fast")
    for precision in precisions:
        with results.attempt(f"selection, {precision}, {sizes}"):

            def draw(precision: Precision = precision) -> Any:
                return select(*pair, sub_batch_size=b, uids=words, seed=0, step=0, precision=precision)

            taken = timing.seconds(draw, results.device, repeats=3)
            results.row(
                f"selection, {precision}, {sizes}",
                milliseconds=1e3 * taken,
                times_its_products=taken / floor,
                peak_mb=timing.peak_mb(draw, results.device),
                share_of_a_step_at_the_rate_of_products=taken / (step + taken),
                goal=f"under {GOAL:.0%}",
                met=taken / (step + taken) < GOAL,
            )
    if results.cuda:
        _tiles(results, pair[0], b // 16)


def _tiles(results: Results, model: Embeddings, chunk: int) -> None:
    """The kernel's time with other tiles than its own, for one chunk; `tiles_of` gets the fastest ones."""
    import triton

    from jest_core.selection import kernels

    own = kernels.tiles_of(model.image.dtype)
    drawn = model[torch.arange(chunk, device=model.image.device)]
    for rows, width, warps, stages in TILES:
        tiles = triton.Config({"ROWS": rows, "WIDTH": width}, num_warps=warps, num_stages=stages)
        what = f"kernel with tiles of {rows} rows, {width} of D at a time, {warps} warps, {stages} stages"
        with results.attempt(what):

            def sums(tiles: triton.Config = tiles) -> torch.Tensor:
                return kernels.cross_losses(model.image, model.text, drawn.image, drawn.text, 20.0, -8.0, tiles=tiles)

            taken = timing.seconds(sums, results.device, repeats=3)
            results.row(what, milliseconds=1e3 * taken, are_its_own=tiles.all_kwargs() == own.all_kwargs())


def _products(pair: list[Embeddings], chunk: int) -> None:
    """Of the chunks that condition others: both ways round, by each model."""
    out = torch.empty(len(pair[0]), chunk, dtype=pair[0].image.dtype, device=pair[0].image.device)
    for start in range(0, 15 * chunk, chunk):
        part = slice(start, start + chunk)
        for model in pair:
            torch.mm(model.image, model.text[part].T, out=out)
            torch.mm(model.text, model.image[part].T, out=out)


def _least_step_seconds(rate: float, b: int) -> float:
    """Of the rest of a ViT-B/16 JEST step of this size, if all its FLOPs ran at the rate of matrix products: a real one
    takes longer, and selection is a smaller share of it. `steps` measures real ones at smaller sizes."""
    cost = flops.step_flops(run_of("JEST", "jest-b-16-256", b, b, "bf16"))
    return (cost.total - cost.select) / rate
