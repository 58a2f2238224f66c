"""JPEGs a second: nvJPEG on the card, by torchvision, against what readers do on CPUs."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.io as io

from deploy.gpu import timing
from deploy.gpu.results import Results
from jest_core.choices import Decoder
from jest_core.examples.decode import View


def run(results: Results) -> None:
    n = 16 if results.small else 256
    coarse = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pictures = F.interpolate(coarse, 512, mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    files = [io.encode_jpeg(picture, quality=90) for picture in pictures]
    images = [file.numpy().tobytes() for file in files]
    results.row(f"{n} JPEGs of 512 pixels", bytes_each=sum(map(len, images)) // n)

    def rate(what: str, decode: Callable[[], object]) -> None:
        with results.attempt(what):
            results.row(what, images_a_second=n / timing.seconds(decode, results.device, repeats=3))

    decoders: tuple[Decoder, ...] = ("pillow", "simplejpeg")
    for decoder in decoders:
        view = View(256, decoder=decoder)
        rate(f"{decoder}, decoded and resized to 256 as readers do, one core", partial(view.batch, images))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rate(f"the same, {os.cpu_count()} threads", partial(view.batch, images, pool))
    rate("torchvision on one core, decoded alone", lambda: [io.decode_jpeg(file) for file in files])
    if not results.cuda:
        results.skip("torchvision on the card (nvJPEG)", "needs CUDA")
        return
    rate("torchvision on the card (nvJPEG), decoded alone", lambda: io.decode_jpeg(files, device=results.device))
    with results.attempt("nvJPEG's pixels against the CPU's"):
        card = io.decode_jpeg(files[:64], device=results.device)
        off = [(a.cpu().int() - io.decode_jpeg(f).int()).abs() for a, f in zip(card, files, strict=False)]
        mean, most = float(np.mean([x.float().mean() for x in off])), max(int(x.max()) for x in off)
        results.check("nvJPEG's pixels against the CPU's", mean <= 2.0, mean_levels_off=mean, most_levels_off=most)
