"""The same pairs in the layouts that users have, each written by the tool that usually writes it."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from tests.conftest import POOL

N_PAIRS = 40


@dataclass(frozen=True)
class Pair:
    uid: str
    caption: str
    image: bytes
    suffix: str
    metadata: dict[str, Any]


def make_pairs() -> list[Pair]:
    """Drawings of the committed pool as JPEG, PNG and WebP in turn, with made-up scores."""
    table = pq.read_table(POOL / "00000.parquet").slice(0, 60).to_pylist()
    rows = [row for row in table if row["status"] == "success" and row["caption"].strip()][:N_PAIRS]
    out = []
    for i, row in enumerate(rows):
        kind, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
        sink = io.BytesIO()
        picture = Image.open(io.BytesIO(row["webp"])).convert("RGB")
        picture.save(sink, kind)
        scores = {"NSFW": ("UNLIKELY", "UNSURE")[i % 2], "similarity": 0.2 + i / 100, "punsafe": i / 100}
        size = {"original_width": picture.width, "original_height": picture.height}
        out.append(Pair(row["uid"], row["caption"], sink.getvalue(), suffix, scores | size))
    return out


def img2dataset(folder: Path, pairs: list[Pair], output_format: str) -> Path:
    """Shards that img2dataset downloads from a local web server; one URL answers 404, one with no picture."""
    served = folder / "served"
    served.mkdir(parents=True)
    for i, pair in enumerate(pairs):
        (served / f"{i}.{pair.suffix}").write_bytes(pair.image)
    (served / "broken.jpg").write_bytes(b"no picture")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_SilentHandler, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    names = [f"{i}.{pair.suffix}" for i, pair in enumerate(pairs)] + ["missing.jpg", "broken.jpg"]
    lost = [
        Pair("e" * 32, "lost", b"", "jpg", pairs[0].metadata),
        Pair("f" * 32, "broken", b"", "jpg", pairs[0].metadata),
    ]
    columns = ["NSFW", "similarity", "punsafe"]
    urls = {
        "URL": [f"{address}/{name}" for name in names],
        "TEXT": [pair.caption for pair in [*pairs, *lost]],
        "uid": [pair.uid for pair in [*pairs, *lost]],
        **{name: [pair.metadata[name] for pair in [*pairs, *lost]] for name in columns},
    }
    pq.write_table(pa.table(urls), folder / "urls.parquet")
    out = folder / "out"
    code = "from img2dataset import download; import sys, json; download(**json.loads(sys.argv[1]))"
    settings = {
        "url_list": str(folder / "urls.parquet"),
        "input_format": "parquet",
        "url_col": "URL",
        "caption_col": "TEXT",
        "save_additional_columns": ["uid", *columns],
        "output_format": output_format,
        "output_folder": str(out),
        "processes_count": 1,
        "thread_count": 8,
        "number_sample_per_shard": 25,
        "resize_mode": "no",
        "skip_reencode": True,
    }
    try:
        environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(settings)], check=True, env=environment, capture_output=True
        )
    finally:
        server.shutdown()
        server.server_close()
    return out


class _SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


def webdataset_tar(folder: Path, pairs: list[Pair]) -> Path:
    """Tars written by webdataset, each picture with the suffix of its format."""
    folder.mkdir(parents=True)
    for number, part in enumerate((pairs[:25], pairs[25:])):
        with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as writer:
            for i, pair in enumerate(part):
                key = f"{number:05d}{i:04d}"
                fields = pair.metadata | {"uid": pair.uid}
                writer.write({"__key__": key, pair.suffix: pair.image, "txt": pair.caption, "json": fields})
    return folder


def hugging_face(folder: Path, pairs: list[Pair]) -> Path:
    """Parquet with the image as a struct of bytes and path."""
    folder.mkdir(parents=True)
    images = [{"bytes": pair.image, "path": f"{i}.{pair.suffix}"} for i, pair in enumerate(pairs)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array(images, kind),
        "text": [pair.caption for pair in pairs],
        "uid": [pair.uid for pair in pairs],
        **{name: [pair.metadata[name] for pair in pairs] for name in pairs[0].metadata},
    }
    pq.write_table(pa.table(columns), folder / "train-00000-of-00001.parquet", row_group_size=16)
    return folder


def webli(folder: Path, pairs: list[Pair]) -> Path:
    """Parquet with several alt-texts a picture, the first of some empty, a language, and an alignment score."""
    folder.mkdir(parents=True)
    texts = [["", pair.caption, "another"] if i % 2 else [pair.caption, "other"] for i, pair in enumerate(pairs)]
    columns = {
        "image": [pair.image for pair in pairs],
        "alt_texts": texts,
        "language": ["en" if i % 4 else "de" for i in range(len(pairs))],
        "alignment": pa.array([pair.metadata["similarity"] for pair in pairs], pa.float32()),
        "uid": [pair.uid for pair in pairs],
        **{name: [pair.metadata[name] for pair in pairs] for name in ("punsafe", "NSFW", "original_width")},
    }
    pq.write_table(pa.table(columns), folder / "webli.parquet", row_group_size=16)
    return folder


def datacomp(folder: Path, pairs: list[Pair], shards: Path) -> Path:
    """DataComp's folder: metadata of the whole pool, and shards of img2dataset, their names of eight digits."""
    (folder / "metadata").mkdir(parents=True)
    columns = {
        "uid": [pair.uid for pair in pairs],
        "text": [pair.caption for pair in pairs],
        "original_width": [pair.metadata["original_width"] for pair in pairs],
        "original_height": [pair.metadata["original_height"] for pair in pairs],
        "clip_l14_similarity_score": pa.array([pair.metadata["similarity"] for pair in pairs], pa.float32()),
    }
    pq.write_table(pa.table(columns), folder / "metadata" / "a.parquet")
    (folder / "shards").mkdir()
    for path in shards.iterdir():
        shutil.copy(path, folder / "shards" / f"000{path.name}")
    return folder
