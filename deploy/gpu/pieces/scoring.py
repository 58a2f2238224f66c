"""Reference scoring: images a second from pixels in host memory to embeddings there, against the bare forward."""

import torch

from deploy.gpu import timing
from deploy.gpu.results import Results
from jest_core.examples.preprocess import normalise
from jest_core.models import towers


def run(results: Results) -> None:
    model, n, batch = ("jest-tiny", 64, 32) if results.small else ("jest-b-16-256", 4096, 512)
    precision = "bf16" if results.cuda else "fp32"
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
    scored = n / timing.seconds(embed, results.device, repeats=3)
    results.row(f"reference scoring of {n:,}", images_a_second=scored, of_the_bare_forward=scored / forward)
