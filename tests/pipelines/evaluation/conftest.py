"""Evaluation pictures in every layout that other tools write, and a run to evaluate on them."""

import io
import json
from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from jest_core import run_file
from jest_core.models import towers
from pipelines.base import checkpoints

SMALL = Path(__file__).resolve().parents[3] / "deploy" / "data" / "small"
SETS = [
    f"{{name: shards, shards: '{SMALL}/eval-fluent-flat/*.parquet', tasks: [group, retrieval]}}",
    "{name: folder, format: folder, shards: folder, tasks: [zero_shot]}",
    "{name: wds, format: webdataset, shards: wds, tasks: [zero_shot, few_shot],"
    " few_shot: {pool: {format: folder, shards: numbered}, n_shots: 4, n_seeds: 2}}",
    "{name: captions, format: karpathy, shards: captions.json, split: test, tasks: [retrieval]}",
    "{name: wds-captions, format: webdataset, shards: wds-captions, tasks: [retrieval]}",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The same evaluation pictures in every layout that other tools write."""
    root = tmp_path_factory.mktemp("evaluation")
    rows = pq.read_table(SMALL / "eval-fluent-flat" / "00000.parquet").to_pylist()
    names = sorted({row["group"] for row in rows})
    for i, row in enumerate(rows):
        for folder in (root / "folder" / row["group"], root / "numbered" / str(names.index(row["group"]))):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:05d}.webp").write_bytes(row["webp"])

    for layout in ("wds", "wds-captions"):
        (root / layout / "test").mkdir(parents=True)
        with webdataset.ShardWriter(str(root / layout / "test" / "%d.tar"), maxcount=300, verbose=0) as writer:
            for i, row in enumerate(rows):
                label = {"cls": names.index(row["group"])} if layout == "wds" else {"txt": "\n".join(_captions(row))}
                writer.write({"__key__": f"s{i:07d}", "webp": row["webp"], **label})
            n_shards = writer.shard
        (root / layout / "test" / "nshards.txt").write_text(f"{n_shards}\n")
    (root / "wds" / "classnames.txt").write_text("\n".join(n.replace("_", " ") for n in names) + "\n")
    templates = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    (root / "wds" / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")

    (root / "images").mkdir()
    entries = []
    for i, row in enumerate(rows):
        Image.open(io.BytesIO(row["webp"])).convert("RGB").save(root / "images" / f"{i:012d}.png")
        sentences = [{"raw": caption, "tokens": caption.split()} for caption in _captions(row)]
        entries.append({"filepath": "images", "filename": f"{i:012d}.png", "split": "test", "sentences": sentences})
    entries[0]["split"] = "train"
    (root / "captions.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    model = towers.create("jest-tiny", seed=3).model
    checkpoints.write(str(root / "run"), 2, {"epoch": 2, "state_dict": model.state_dict(), "jest": {"step": 2}})
    return root


def _captions(row):
    return [row["caption"], *(row["texts_alt"] or [])][:3]


def run_of(root, sets=SETS, run_dir="run"):
    text = f"""
root: {root}
run_dir: {run_dir}
seed: 0
data: {{shards: none, catalogue: none, rules: [], n_streams: 1, window_rows: 8}}
model: {{name: jest-tiny}}
selection: {{method: uniform}}
training:
  {{sub_batch_size: 8, examples_trained: 16, learning_rate: 1.0e-3, warmup_steps: 0, weight_decay: 0.0,
  checkpoint_every_steps: 1}}
evaluation:
  classes: {SMALL}/classes.json
  batch_size: 128
  sets: [{", ".join(sets)}]
"""
    return run_file.load(text)
