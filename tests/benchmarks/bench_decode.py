"""Pictures to pixels: the decoders of data.decoder, a bare decoder of JPEGs, and libraries that were not taken.

python -m tests.benchmarks.bench_decode [--repeats 7]

Crops of the two photographs that come with scikit-learn, quality 90, in CPU milliseconds of one core a picture: the
best of several rounds in which all take turns. Of both decoders it is all of View.batch. Rivals are measured where they
are installed (`pip install kornia-rs imagecodecs`).
"""

import io
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import simplejpeg
import torch
import torchvision.io
import typer
from PIL import Image
from sklearn.datasets import load_sample_images

from jest_core.examples import rgbx
from jest_core.examples.decode import View
from tests.benchmarks.measure import console, machine, table

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG 4:2:0": ("JPEG", {"quality": 90, "subsampling": 2}),
    "JPEG 4:4:4": ("JPEG", {"quality": 90, "subsampling": 0}),
    "PNG": ("PNG", {}),
    "WebP": ("WEBP", {"quality": 90}),
}
SIZES = [(256, 256), (256, 224), (512, 256), (512, 224)]
REDUCED = [(512, 32), (512, 128)]
READS = {
    "nothing more": "",
    "PyTorch, to resize": "import torch",
    "torchvision.io": "import torchvision.io",
    "open_clip": "import open_clip",
}


def pictures(size: int, form: str) -> list[bytes]:
    """Of six squares, as files."""
    kind, options = FORMATS[form]
    out = []
    for photo in load_sample_images().images:
        for left in (0, 100, 200):
            crop = Image.fromarray(photo).crop((left, 0, left + 427, 427))
            sink = io.BytesIO()
            crop.resize((size, size), Image.Resampling.LANCZOS).save(sink, kind, **options)
            out.append(sink.getvalue())
    return out


def cpu_ms(contestants: dict[str, Callable[[list[bytes]], Any]], files: list[bytes], repeats: int) -> dict[str, float]:
    """CPU milliseconds a picture of each: the best of several rounds."""
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(repeats):
        for name, function in contestants.items():
            began = time.process_time()
            for _ in range(3):
                function(files)
            best[name] = min(best[name], 1e3 * (time.process_time() - began) / (3 * len(files)))
    return best


def whole(repeats: int) -> None:
    """Views of both decoders, and the bare decoding of the same JPEGs."""
    rows = []
    for form in FORMATS:
        for size, to in SIZES:
            files = pictures(size, form)
            views = {"pillow": View(to), "simplejpeg": View(to, decoder="simplejpeg")}
            contestants: dict[str, Callable[[list[bytes]], Any]] = {name: view.batch for name, view in views.items()}
            if form.startswith("JPEG"):
                contestants["bare"] = lambda files: [simplejpeg.decode_jpeg(file) for file in files]
            ms = cpu_ms(contestants, files, repeats)
            pixels = [view.batch(files)[0].astype(int) for view in views.values()]
            off = np.abs(pixels[0] - pixels[1])
            bare = [f"{ms['bare']:.2f}", f"{ms['simplejpeg'] / ms['bare']:.2f}"] if "bare" in ms else ["", ""]
            figures = [f"{ms['pillow']:.2f}", f"{ms['simplejpeg']:.2f}", f"{ms['pillow'] / ms['simplejpeg']:.2f}"]
            rows.append([form, f"{size} -> {to}", *figures, *bare, f"{off.max()}", f"{off.mean():.4f}"])
    for size, to in REDUCED:
        files = pictures(size, "JPEG 4:2:0")
        views = {"pillow": View(to, reduced=True), "simplejpeg": View(to, reduced=True, decoder="simplejpeg")}
        ms = cpu_ms({name: view.batch for name, view in views.items()}, files, repeats)
        off = np.abs(np.subtract(*(view.batch(files)[0].astype(int) for view in views.values())))
        figures = [f"{ms['pillow']:.2f}", f"{ms['simplejpeg']:.2f}", f"{ms['pillow'] / ms['simplejpeg']:.2f}", "", ""]
        rows.append(["reduced", f"{size} -> {to}", *figures, f"{off.max()}", f"{off.mean():.4f}"])
    columns = ["", "pixels", "pillow ms", "simplejpeg ms", "times faster", "bare decoder ms", "of it"]
    table("CPU ms a picture, one core (off: levels of 255)", [*columns, "most off", "mean off"], rows)


def rivals(repeats: int) -> None:
    """Other libraries: decoding alone, and resizing alone with how far the pixels are from Pillow's."""
    files = pictures(256, "JPEG 4:2:0")
    decoders: dict[str, Callable[[bytes], Any]] = {
        "Pillow": lambda file: np.asarray(Image.open(io.BytesIO(file))),
        "simplejpeg": simplejpeg.decode_jpeg,
        "torchvision.io": lambda file: torchvision.io.decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8)),
    }
    if find_spec("cv2"):
        cv2: Any = import_module("cv2")
        cv2.setNumThreads(1)
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        decoders["OpenCV"] = lambda file: cv2.imdecode(np.frombuffer(file, np.uint8), flags)
    if find_spec("kornia_rs"):
        kornia: Any = import_module("kornia_rs")
        decoders["kornia-rs"] = lambda file: kornia.io.decode_image_jpegturbo(file, "rgb")
    if find_spec("imagecodecs"):
        decoders["imagecodecs"] = import_module("imagecodecs").jpeg8_decode
    ms = cpu_ms({name: lambda files, f=f: [f(file) for file in files] for name, f in decoders.items()}, files, repeats)
    table("Decoding a JPEG of 256 pixels, 4:2:0", ["", "CPU ms"], [[name, f"{each:.2f}"] for name, each in ms.items()])

    arrays = [simplejpeg.decode_jpeg(file) for file in pictures(512, "JPEG 4:2:0")]
    rows = []
    of_pillow = [_by_pillow(array) for array in arrays]
    resizers = {"Pillow": _by_pillow, "PyTorch": _by_torch}
    if find_spec("kornia_rs"):
        resizers["kornia-rs"] = lambda array: kornia.imgproc.resize(array, (256, 256), interpolation="bicubic")
    if find_spec("cykooz_resizer"):
        of_four = {id(array): np.dstack([array, array[..., :1]]) for array in arrays}  # bytes a pixel, as jest decodes
        ours = partial(rgbx.resized, width=256, height=256, interpolation="bicubic")
        resizers["cykooz-resizer, its own order"] = _by_cykooz
        resizers["the same as jest, rows first"] = lambda array: ours(of_four[id(array)])[..., :3]
    for name, resize in resizers.items():
        (took,) = cpu_ms({name: lambda arrays, f=resize: [f(array) for array in arrays]}, arrays, repeats).values()
        off = np.abs(np.stack([resize(array) for array in arrays]).astype(int) - np.stack(of_pillow))
        rows.append([name, f"{took:.2f}", f"{off.max()}", f"{off.mean():.4f}", f"{(off > 1).mean():.4%}"])
    table("Resizing 512 -> 256, bicubic", ["", "CPU ms", "most off", "mean off", "off by more than 1"], rows)


def _by_pillow(array: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(array).resize((256, 256), Image.Resampling.BICUBIC))


def _by_torch(array: np.ndarray) -> np.ndarray:
    planes = torch.from_numpy(array).permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(planes, (256, 256), mode="bicubic", antialias=True)
    return out[0].permute(1, 2, 0).numpy()


def _by_cykooz(array: np.ndarray) -> np.ndarray:
    cykooz: Any = import_module("cykooz_resizer")
    alg = cykooz.ResizeAlg.convolution(cykooz.FilterType.catmull_rom)
    out = Image.new("RGB", (256, 256))
    cykooz.Resizer().resize_pil(Image.fromarray(array), out, cykooz.ResizeOptions(resize_alg=alg))
    return np.asarray(out)


def start() -> None:
    """What a process that reads takes to start, and its private memory."""
    rows = []
    for name, imports in READS.items():
        code = f"import time; import jest_core.examples.decode\n{imports}\nprint(time.process_time()); "
        code += "print(*(line.split()[1] for line in open('/proc/self/smaps_rollup') if 'Private_D' in line))"
        runs = []
        for _ in range(3):
            ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            runs.append(ran.stdout.split())
        rows.append([name, f"{min(float(run[0]) for run in runs):.2f}", f"{int(runs[0][1]) / 1e3:.0f}"])
    table("A process that reads", ["imports", "CPU s", "private MB"], rows)


def main(repeats: int = 7) -> None:
    torch.set_num_threads(1)
    console.print(machine("cpu"))
    whole(repeats)
    rivals(repeats)
    if sys.platform == "linux":
        start()


if __name__ == "__main__":
    typer.run(main)
