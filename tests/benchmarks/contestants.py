"""The shards of JPEGs of bench_data, and the pipelines that it compares: iterators of the numbers of examples read."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
import webdataset
from PIL import Image

from jest_core import run_file
from jest_core.examples.preprocess import normalise
from jest_core.models import configurations
from pipelines.base import cluster
from pipelines.base.prefetch import prefetch
from pipelines.paper.drawings import icons, names, packages, pictures, rows
from pipelines.paper.drawings.emoji import EmojiNames
from pipelines.stream import super_batches
from pipelines.stream.source import open_source
from tests.benchmarks.measure import console

MODEL, SIZE, SCORED_SIZE = "ViT-B-32", 224, 112
PER_SHARD = 500
BATCH = 256
MEAN = STD = (0.5, 0.5, 0.5)
FOLDER = Path(gettempdir()) / "jest-bench-data"

RUN = """
root: {root}
run_dir: run
seed: 0
data: {{shards: "{shards}", catalogue: catalogue, rules: [], n_streams: 4, window_rows: 500, decode: {decode}}}
model: {{name: ViT-B-32}}
selection: {{method: {method}, criterion: hard, filter_ratio: 0.8, n_chunks: 16, score_image_size: {size}}}
training:
  sub_batch_size: 256
  examples_trained: {trained}
  learning_rate: 1.0e-3
  warmup_steps: 0
  weight_decay: 0.0
  checkpoint_every_steps: 1000
"""


# --------------------------------------------------------------------------------------------------------- the shards


def make_shards(folder: Path, raw: Path, n: int) -> None:
    """n // PER_SHARD tars of drawings with their captions, as webdataset writes them."""
    n_shards = n // PER_SHARD
    if len(list(folder.glob("*.tar"))) >= n_shards:
        return
    folder.mkdir(parents=True, exist_ok=True)
    versions = packages.fetch("medium", raw)
    icon_sets, emoji = icons.list_icon_sets(raw, "medium"), EmojiNames(raw / "emojibase-data/package")
    listed = [r for r in rows.list_rows("medium", raw, icon_sets, emoji, versions, 0) if r.prefix]
    listed.sort(key=lambda row: names.stable_hash(row.uid))
    # by icon set within a worker's part, which reads each set once
    spare = PER_SHARD + PER_SHARD // 10  # some drawings are blank
    parts = [listed[i * spare : (i + 1) * spare] for i in range(n_shards)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for number, _ in enumerate(
            pool.map(_write_shard, [folder] * n_shards, [raw] * n_shards, range(n_shards), parts)
        ):
            console.print(f"rendered {(number + 1) * PER_SHARD:,} of {n:,}", end="\r")


def _write_shard(folder: Path, raw: Path, number: int, part: list[rows.Row]) -> None:
    path = folder / f"{number:05d}.tar"
    if path.exists():
        return
    written = 0
    with webdataset.TarWriter(str(path) + ".partial") as writer:
        for row in part:
            try:
                drawing, _, background = pictures.draw(row, "medium", raw, 512)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # resvg's panics
                continue
            sink = io.BytesIO()
            pictures.on_background(drawing, background, 512).save(sink, "JPEG", quality=90)
            key = f"{number:05d}{written:04d}"
            writer.write({"__key__": key, "jpg": sink.getvalue(), "txt": row.caption, "json": {"uid": row.uid}})
            written += 1
            if written == PER_SHARD:
                break
    Path(str(path) + ".partial").rename(path)


# ------------------------------------------------------------------------------------------------------ the contestants


def with_open_clip(shards: str, n: int, work: Path) -> Iterator[int]:
    """open_clip_train's training pipeline, with its evaluation transform and two workers."""
    from open_clip.transform import image_transform
    from open_clip_train import data as open_clip_data

    # open_clip 3.3 asks for webdataset up to 0.2.86; later ones mark the end of a tar with an empty sample
    open_clip_data.tar_file_expander = partial(open_clip_data.tar_file_expander, eof_value=None)
    settings = SimpleNamespace(
        train_data=shards,
        train_num_samples=n,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=BATCH,
        workers=2,
        world_size=1,
        seed=0,
    )
    transform = image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
    data = open_clip_data.get_wds_dataset(settings, transform, True, tokenizer=open_clip.get_tokenizer(MODEL))
    for images, tokens in data.dataloader:
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert tokens.shape[1] == 77
        yield len(images)


class _Pairs(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random access to pairs that were unpacked from the tars."""

    def __init__(self, folder: Path) -> None:
        from open_clip.transform import image_transform

        self.images = sorted(folder.glob("*.jpg"))
        self.transform = image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
        self.tokenizer = open_clip.get_tokenizer(MODEL)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        caption = self.images[i].with_suffix(".txt").read_text()
        return self.transform(Image.open(self.images[i])), self.tokenizer(caption)[0]


def with_data_loader(shards: str, n: int, work: Path) -> Iterator[int]:
    """A map-style Dataset of unpacked files, shuffled, with two workers."""
    folder = work / "unpacked"
    folder.mkdir()
    for path in webdataset.shardlists.expand_urls(shards):
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
    loader = torch.utils.data.DataLoader(_Pairs(folder), BATCH, shuffle=True, num_workers=2)
    for images, _ in loader:
        yield len(images)


def _super_batches(shards: str, n: int, work: Path, method: str, decode: str, decoder: str = "pillow") -> Iterator[Any]:
    size = SCORED_SIZE if decode == "late" else "null"
    trained = n // 256 * 256 if method == "uniform" else n // 1280 * 256
    text = RUN.format(root=work, shards=shards, decode=decode, method=method, size=size, trained=trained)
    run = run_file.load(text, [f"data.decoder={decoder}"])
    path = work / "run.yaml"
    path.write_text(run_file.dump(run))
    subprocess.run([sys.executable, "-m", "pipelines", "catalogue", path], check=True)  # as users do, before
    cluster.connect()
    source = open_source(run)
    return prefetch(super_batches.stream(run, source, SIZE, rank=0, n_learners=1, first_step=0))


def with_jest(shards: str, n: int, work: Path, decoder: str = "pillow") -> Iterator[int]:
    """Uniform super-batches of 256, decoded by Ray workers, normalised by the learner."""
    for batch in _super_batches(shards, n, work, "uniform", "eager", decoder):
        assert normalise(batch.pixels, MEAN, STD).shape[1:] == (3, SIZE, SIZE)
        assert batch.tokens.shape[1] == 77
        yield len(batch)


def with_jest_simplejpeg(shards: str, n: int, work: Path) -> Iterator[int]:
    """The same, with nearly the same pixels."""
    yield from with_jest(shards, n, work, "simplejpeg")


def jest_eager(shards: str, n: int, work: Path) -> Iterator[int]:
    """f = 0.8: all 1,280 of a super-batch at 224 pixels; counts the 256 that are trained on."""
    for batch in _super_batches(shards, n, work, "joint", "eager"):
        selected = batch[torch.arange(0, len(batch), 5)]
        yield len(normalise(selected.pixels, MEAN, STD))


def jest_late(shards: str, n: int, work: Path) -> Iterator[int]:
    """f = 0.8: all decoded reduced to 112 pixels, the selected ones again at 224 by the learner's threads."""
    pool = ThreadPoolExecutor(2)
    for batch in _super_batches(shards, n, work, "joint", "late"):
        assert batch.pixels.shape[-1] == SCORED_SIZE
        selected = super_batches.prepare(batch[torch.arange(0, len(batch), 5)].rows, configurations.inputs(MODEL), pool)
        yield len(normalise(selected.pixels, MEAN, STD))


CONTESTANTS: dict[str, Callable[[str, int, Path], Iterator[int]]] = {
    f.__name__: f for f in (with_open_clip, with_data_loader, with_jest, with_jest_simplejpeg, jest_eager, jest_late)
}
