"""LAION-2B at the size of a rehearsal: its run file, and the files it refers to on S3 and on a local web server."""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import storage
from tests.conftest import POOL
from tests.pipelines.scores.test_reference_scores import make_reference
from tests.websites import Website

Row = dict[str, Any]
RUNS = Path(str(files("jest_deploy") / "runs"))
RUN_FILE = RUNS / "laion2b" / "flexi.yaml"


@dataclass(frozen=True)
class Laion:
    """The run file of LAION-2B at the rehearsal's sizes, with its files below `root`; `overrides` are for --set."""

    root: str

    def overrides(self, name: str, *more: str) -> list[str]:
        paths = [f"root={self.root}", f"run_dir=runs/{name}", "ingest.private_addresses=true"]
        return [f"@{RUNS / 'rehearsal.yaml'}", *paths, *more]

    def run(self, name: str, *more: str) -> Run:
        overlay, *others = self.overrides(name, *more)
        sizes = run_file.parse(Path(overlay[1:]).read_text(), overlay)
        return run_file.load(RUN_FILE.read_text(), [sizes, *others])


@contextmanager
def rehearsal(root: str) -> Iterator[Laion]:
    """Write metadata with LAION-2B's columns, evaluation sets in the layouts of ImageNet and COCO, and a reference;
    serve the metadata's pictures from a local web server."""
    laion = Laion(root)
    with pictures_served() as rows:
        storage.write_bytes(f"{laion.root}/metadata/part-00000.parquet", parquet(rows))
        evaluation_sets(f"{laion.root}/evaluation")
        make_reference(laion.run("any"))
        yield laion


@contextmanager
def pictures_served() -> Iterator[list[Row]]:
    """400 rows of metadata with the columns of LAION-2B-en-joined, and a web server that has most of their pictures."""
    rows = [row for row in pq.read_table(POOL / "00000.parquet").slice(0, 420).to_pylist() if row["webp"]][:400]
    website = Website([row["webp"] for row in rows])
    addresses = (
        [f"ok/{i}" for i in range(390)] + [f"redirect/{i}" for i in range(390, 395)] + ["missing"] * 4 + ["page"]
    )
    yield [
        {
            "URL": f"{website.address}/{address}",
            "TEXT": row["caption"] if i >= 8 else "",
            "WIDTH": 64.0,
            "HEIGHT": 64.0,
            "similarity": 0.3,
            "hash": i,
            "punsafe": 0.9 if i < 3 else 0.01,
            "pwatermark": 0.1,
        }
        for i, (row, address) in enumerate(zip(rows, addresses, strict=True))
    ]
    website.close()


def parquet(rows: list[Row]) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), sink := io.BytesIO())
    return sink.getvalue()


def evaluation_sets(directory: str) -> None:
    """A few pictures laid out as ImageNet and COCO, in folders `imagenet` and `coco`."""
    _imagenet(f"{directory}/imagenet/val", "eval-fluent-flat", 5)
    _imagenet(f"{directory}/imagenet/train", "eval-fluent-high-contrast", 10)
    _coco(f"{directory}/coco")


def _imagenet(directory: str, tier: str, n_each: int) -> None:
    n_written = Counter[str]()
    for row in pq.read_table(POOL.parent / tier / "00000.parquet").to_pylist():
        n_written[row["group"]] += 1
        if n_written[row["group"]] <= n_each:
            name = f"{directory}/{row['group']}/{n_written[row['group']]:08d}.JPEG"
            storage.write_bytes(name, _jpeg(row["webp"]))


def _coco(directory: str) -> None:
    images = []
    for i, row in enumerate(pq.read_table(POOL.parent / "eval-clipart" / "00000.parquet").slice(0, 60).to_pylist()):
        storage.write_bytes(f"{directory}/val2014/{i:012d}.jpg", _jpeg(row["webp"]))
        sentences = [{"raw": row["caption"]}, {"raw": f"a picture of {row['caption']}"}]
        images.append({"filepath": "val2014", "filename": f"{i:012d}.jpg", "split": "test", "sentences": sentences})
    storage.write_json(f"{directory}/dataset_coco.json", {"images": images, "dataset": "coco"})


def _jpeg(picture: bytes) -> bytes:
    Image.open(io.BytesIO(picture)).convert("RGB").save(sink := io.BytesIO(), "JPEG")
    return sink.getvalue()
