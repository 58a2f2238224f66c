"""Reference scoring: images a second from pixels in host memory to embeddings there, against the bare forward, and that
compiled, without and with CUDA graphs."""

from typing import Any

import torch
from torch import Tensor

from deploy.gpu import timing
from deploy.gpu.results import Results
from jest_core.choices import ForwardPrecision
from jest_core.examples.preprocess import normalise
from jest_core.models import towers
from jest_core.models.towers import Towers

MODES = {"compiled": "default", "compiled, with CUDA graphs": "reduce-overhead"}


def run(results: Results) -> None:
    model, n, batch = ("jest-tiny", 64, 32) if results.small else ("jest-b-16-256", 4096, 512)
    precision: ForwardPrecision = "bf16" if results.cuda else "fp32"
    pair = towers.create(model, seed=0)
    pair.model.to(results.device).eval()
    size, length = pair.view.image_size, pair.inputs.tokenizer.context_length
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 40_000, (n, length), generator=generator)

    def embed() -> None:
        found = pair.embed(pixels, tokens, batch_size=batch, precision=precision)
        found.image.half().cpu(), found.text.half().cpu()

    shown = normalise(pixels[:batch].to(results.device), pair.inputs.mean, pair.inputs.std)
    read = tokens[:batch].to(results.device)

    @torch.no_grad()
    def bare() -> None:
        with torch.autocast(results.device, torch.bfloat16, enabled=results.cuda):
            for _ in range(n // batch):
                pair.model.encode_image(shown)
                pair.model.encode_text(read)

    forward = n / timing.seconds(bare, results.device, repeats=3)
    results.row(f"bare forward, {model}, {precision}, {batch} at a time", images_a_second=forward)
    if results.cuda:
        _compiled(results, pair, shown, read, forward)
    scored = n / timing.seconds(embed, results.device, repeats=3)
    results.row(f"reference scoring of {n:,}", images_a_second=scored, of_the_bare_forward=scored / forward)


@torch.no_grad()
def _compiled(results: Results, pair: Towers, shown: Tensor, read: Tensor, forward: float) -> None:
    """Images a second of the forward pass, compiled; scoring calls it for many batches of one size."""
    for name, mode in MODES.items():
        what = f"bare forward, {name}"
        if not results.has_seconds(what, 15):
            return
        with results.attempt(what):
            image, text = (torch.compile(f, mode=mode) for f in (pair.model.encode_image, pair.model.encode_text))

            def once(image: Any = image, text: Any = text) -> None:
                with torch.autocast(results.device, torch.bfloat16):
                    image(shown)
                    text(read)

            rate = len(shown) / timing.seconds(once, results.device, repeats=5, warm_up=3)
            results.row(what, images_a_second=rate, of_the_bare_forward=rate / forward)
