"""Scoring throughput: jest, compared with what the cores allow and with clip-retrieval's loop on the same pictures.

python -m tests.benchmarks.bench_reference_scores [--shards FOLDER] [--raw FOLDER]

The cores allow 1 / (forward + decode / cores) pairs a second: only the forward pass, on all cores, and decoding and
tokenising, measured on each core while all do so. The tars are those of bench_data. Each contestant runs in a separate
process tree; its time is that from the first picture embedded to the last file written.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from jest_core import run_file
from jest_core.models import configurations, towers
from pipelines.base import checkpoints, cluster, storage
from pipelines.base.stopwatch import Stopwatch
from pipelines.data import catalogue
from pipelines.data.tars import TarShard, write_index
from pipelines.scores import reference_scores, score_cache
from tests.benchmarks.bench_data import FOLDER, PER_SHARD, _Watch, make_shards
from tests.benchmarks.measure import console, machine, table, threads

POOL = Path(str(files("jest_deploy") / "data" / "small" / "pool"))
MODELS = {"ViT-B-32": (2_000, 64), "jest-drawings": (20_000, 256)}  # model -> pairs, batch
RUN = """
root: {root}
run_dir: run
seed: 0
data: {{shards: "{shards}", catalogue: catalogue, rules: [], n_streams: 1, window_rows: 512, max_bad_share: 0}}
model: {{name: jest-tiny}}
reference: {{model: {{name: {model}}}, checkpoint: reference, scores: scores, batch_size: {batch}}}
selection: {{method: joint}}
training:
  sub_batch_size: 16
  examples_trained: 16
  learning_rate: 1.0e-3
  warmup_steps: 0
  weight_decay: 0.0
  checkpoint_every_steps: 1
"""


def _rows(shards: list[Path], work: Path) -> Iterator[tuple[list[bytes], list[str]]]:
    for i, path in enumerate(shards):
        index = str(work / f"{i}.parquet")
        write_index(str(path), index)
        shard = TarShard(str(path), {}, index)
        for group in range(len(shard.row_group_sizes)):
            yield shard.images(group).to_pylist(), shard.captions(group)


def _decode(model: str, images: list[bytes], captions: list[str]) -> float:
    """Seconds a pair on one core, while all cores do the same."""
    torch.set_num_threads(1)
    inputs = configurations.inputs(model)
    inputs.view.batch(images[:20])
    began = time.perf_counter()
    inputs.view.batch(images)
    inputs.tokenizer(captions)
    return (time.perf_counter() - began) / len(images)


def bare(model: str, shards: list[Path], batch: int, work: Path) -> dict[str, Any]:
    """Seconds a pair: decoding and tokenising on a core while the others do so too, the forward pass on all."""
    pair = towers.create(model, seed=0)
    images, captions = next(_rows(shards, work))
    cores = cluster.n_cores()
    with get_context("spawn").Pool(cores) as pool:
        decode = float(np.mean(pool.starmap(_decode, [(model, images, captions)] * cores)))
    pixels, _ = pair.view.batch(images[: 4 * batch])
    tokens = pair.tokens(captions)
    threads()
    inputs = torch.from_numpy(pixels[: 4 * batch]), tokens[: 4 * batch]
    pair.embed(*inputs, batch_size=batch)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        pair.embed(*inputs, batch_size=batch)
        times.append((time.perf_counter() - began) / len(inputs[0]))
    forward = float(np.median(times))
    return {"pairs": len(images), "decode": decode, "forward": forward, "rate": 1 / (forward + decode / cores)}


def clip_retrieval(model: str, shards: list[Path], batch: int, work: Path) -> dict[str, Any]:
    """clip-retrieval's documented pattern: webdataset, a DataLoader whose workers preprocess, one model, .npy files."""
    import webdataset

    threads()
    pair = towers.create(model, seed=0)
    import open_clip
    from open_clip.transform import image_transform

    transform = image_transform(pair.view.image_size, is_train=False, mean=pair.inputs.mean, std=pair.inputs.std)
    tokenizer = open_clip.get_tokenizer(model)
    data = (
        webdataset.WebDataset([str(path) for path in shards], shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda caption: (tokenizer(caption)[0], caption))
    )
    loader = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=cluster.n_cores())
    images, texts, captions = [], [], []
    began = None
    with torch.no_grad():
        for pixels, (tokens, words) in loader:
            began = began or time.perf_counter()
            image = pair.model.encode_image(pixels.contiguous(memory_format=torch.channels_last))
            text = pair.model.encode_text(tokens)
            images.append((image / image.norm(dim=-1, keepdim=True)).numpy().astype(np.float16))
            texts.append((text / text.norm(dim=-1, keepdim=True)).numpy().astype(np.float16))
            captions += words
    np.save(work / "img_emb_0.npy", np.concatenate(images))
    np.save(work / "text_emb_0.npy", np.concatenate(texts))
    pq.write_table(pa.table({"caption": captions}), work / "metadata_0.parquet")
    assert began is not None
    return {"pairs": len(captions), "rate": len(captions) / (time.perf_counter() - began)}


def jest(model: str, shards: list[Path], batch: int, work: Path) -> dict[str, Any]:
    """The stage `jest reference-scores`, and the time to read its cache."""
    listed = "::".join(map(str, shards))
    run = run_file.load(RUN.format(root=work, shards=listed, model=model, batch=batch))
    pair = towers.create(model, seed=0)
    checkpoints.write(run.path("reference"), 1, {"state_dict": pair.model.state_dict()})
    catalogue.run_stage(run)
    watches: list[Stopwatch] = []

    class Recorded(Stopwatch):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            watches.append(self)

    reference_scores.Stopwatch = Recorded  # type: ignore[misc]
    manifest = reference_scores.run_stage(run)
    ended, pairs = time.time(), manifest["counts"]["ok"]
    assert watches[0].began is not None
    parts = [storage.size(score_cache.part_path(run.path("scores"), i)) for i in range(len(shards))]
    listing, columns = catalogue.open_catalogue(run.path("catalogue")), ["status", "image_embedding", "text_embedding"]
    places = [(listing.place(i), group) for i in range(len(shards)) for group in range(len(listing.row_group_sizes(i)))]
    groups = [(place, group, place.rows(group)[0]) for place, group in places]
    began = time.perf_counter()
    for place, group, uids in groups:
        score_cache.read(run.path("scores"), place, group, uids, columns)
    read_seconds = (time.perf_counter() - began) / pairs
    return {
        "pairs": pairs,
        "rate": pairs / (ended - watches[0].began),
        "read": read_seconds,
        "limit": watches[0].summary(),
        "bytes": sum(parts) / pairs,
        "width": manifest["config"]["width"],
    }


def growth(work: Path, n_shards: int) -> tuple[int, int]:
    """Peak memory of the stage on so many shards of 20 rows: of the driver, and of all processes."""
    folder = work / f"growth-{n_shards}"
    (folder / "shards").mkdir(parents=True)
    rows = pq.read_table(POOL / "00000.parquet").slice(0, 20)
    for i in range(n_shards):
        uids = [f"{i:016x}{j:016x}" for j in range(20)]
        rows = rows.set_column(rows.schema.get_field_index("uid"), "uid", pa.array(uids))
        pq.write_table(rows, folder / "shards" / f"{i:06d}.parquet")
    code = f"from tests.benchmarks.bench_reference_scores import score_all; score_all({str(folder)!r})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{ran.stdout}\n{ran.stderr}")
    driver, everything = json.loads((folder / "peak.json").read_text())
    return driver, everything


def score_all(folder: str) -> None:
    run = run_file.load(RUN.format(root=folder, shards="shards/*.parquet", model="jest-tiny", batch=256))
    checkpoints.write(run.path("reference"), 1, {"state_dict": towers.create("jest-tiny", seed=0).model.state_dict()})
    catalogue.run_stage(run)
    watch = _Watch()
    watch.start()
    reference_scores.run_stage(run)
    watch.measure()
    driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(folder, "peak.json").write_text(json.dumps([driver, watch.peak]))


CONTESTANTS = {f.__name__: f for f in (bare, clip_retrieval, jest)}


def contest(name: str, model: str, shards: list[str], batch: int, work: str, out: str) -> None:
    """One contestant, in this process."""
    watch = _Watch()
    watch.start()
    result = CONTESTANTS[name](model, [Path(path) for path in shards], batch, Path(work))
    watch.measure()
    Path(out).write_text(json.dumps(result | {"peak": watch.peak}))


def measured(name: str, model: str, shards: list[Path], batch: int, work: Path) -> dict[str, Any]:
    folder = work / f"{model}-{name}"
    folder.mkdir(parents=True)
    out = folder / "result.json"
    module = "tests.benchmarks.bench_reference_scores"
    code = f"import json, sys; from {module} import contest; contest(*json.loads(sys.argv[1]))"
    arguments = json.dumps([name, model, [str(path) for path in shards], batch, str(folder), str(out)])
    ran = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stdout}\n{ran.stderr}")
    return dict(json.loads(out.read_text()))


def main(shards: Path = FOLDER / "shards", raw: Path = FOLDER / "raw", only: str = "", pairs: int = 0) -> None:
    threads()
    console.print(machine("cpu"))
    work = shards.parent / f"work-{os.getpid()}"
    for model, (n, batch) in MODELS.items():
        if only and model != only:
            continue
        n = pairs or n
        make_shards(shards, raw, n)
        paths = [shards / f"{i:05d}.tar" for i in range(n // PER_SHARD)]
        results = {name: measured(name, model, paths, batch, work) for name in CONTESTANTS}
        floor, ours = results["bare"], results["jest"]
        rows = [
            [name, f"{f['rate']:.1f}", f"{f['rate'] / floor['rate']:.2f}", f"{f['peak'] / 1e6:,.0f} MB"]
            for name, f in results.items()
        ]
        size = configurations.inputs(model).view.image_size
        table(
            f"{model} at {size} pixels, {n:,} JPEGs of 512 pixels, batches of {batch}",
            ["", "pairs a second", "of what the cores allow", "peak memory"],
            rows,
        )
        expected = 2 * ours["width"] * 2 + 64
        decode, forward = 1e3 * floor["decode"], 1e3 * floor["forward"]
        console.print(
            f"decoding and tokenising {decode:.2f} ms a pair and core, forward {forward:.2f} ms on all; jest to "
            f"clip-retrieval's loop {ours['rate'] / results['clip_retrieval']['rate']:.2f}\n{ours['limit']}\n"
            f"reading the cache costs {1e6 * ours['read']:.1f} µs a pair, "
            f"{100 * ours['read'] / (floor['forward'] * (1 + 3 / 5)):.2f} % of a JEST step at f = 0.8 (scoring, and "
            "three forwards for each pair that is trained on)\n"
            f"cache: {ours['bytes']:.1f} bytes a pair, {ours['bytes'] / expected:.3f} of 2 x {ours['width']} x 2 + 64"
        )
    if not only:
        for n_shards in (200, 2_000):
            driver, everything = growth(work, n_shards)
            console.print(
                f"{n_shards:,} shards: driver {driver / 1e6:,.0f} MB, all processes {everything / 1e6:,.0f} MB"
            )
    rmtree(work)


if __name__ == "__main__":
    typer.run(main)
