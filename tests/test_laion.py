"""Every command of laion-2b.md, copied from the page and run in its order: against S3, a local web server, and a Ray
cluster with token authentication on this machine. Only the downloads (`hf`) are made here instead."""

import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow.compute as pc
import pytest
import torch
import yaml
from PIL import Image

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import blocks, checkpoints, storage
from pipelines.data.layouts import open_shard
from pipelines.planning import costs, flow, machines
from pipelines.planning.assumptions import Assumptions
from pipelines.planning.basis import Basis
from tests.conftest import free_port
from tests.deploy import kuberay
from tests.laion import RUNS, evaluation_sets, parquet, pictures_served

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "deploy" / "docs" / "laion-2b.md"

# What the test changes in the page's commands
MY_BUCKET, DASHBOARD = "s3://my-bucket/laion2b", "http://127.0.0.1:8265"
# The sizes that it appends to those that name a run file
TRAINED = {
    "data": {"n_streams": 2, "window_rows": 50},
    "model": {"name": "jest-tiny"},
    "training": {
        "sub_batch_size": 32,
        "examples_trained": 320,
        "n_learners": 1,
        "gpus_per_learner": 0,
        "compile": False,
        "warmup_steps": 2,
        "checkpoint_every_steps": 10,
    },
}
WHOLE = TRAINED | {
    "ingest": {
        "rows_per_shard": 200,
        "image_size": 32,
        "n_tasks": 2,
        "threads": 16,
        "private_addresses": True,
    },
    "evaluation": {"gpus": 0},
}
SCORED = WHOLE | {"reference": {"batch_size": 64, "n_actors": 1, "gpus_per_actor": 0, "precision": "fp32"}}
TINY = SCORED | {"reference": SCORED["reference"] | {"model": {"name": "jest-tiny"}}}
FLEXI = TINY | {
    "selection": {"score_patch_size": 16, "agreement_every_steps": 5},
    "training": TRAINED["training"] | {"low_resolution": {"patch_size": 16}},
}
SIZES = {  # a word of the command -> the sizes; the first that fits
    "one-percent.yaml": SCORED,
    "flexi.yaml": FLEXI,
    "siglip.yaml": WHOLE,
    "stock-reference.yaml": SCORED,
    "joint.yaml": TINY,
    "reference.yaml": TRAINED,
}
# A model as its authors publish it: by a stock open_clip, with SigLIP's preprocessing and length of captions
STOCK = """
import importlib, json, sys, open_clip, torch
model_cfg = json.loads(sys.argv[2])
open("stock-tiny.json", "w").write(json.dumps(model_cfg))
open_clip.add_model_config("stock-tiny.json")
torch.manual_seed(3)
seen = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "image_resize_mode": "squash"}
model, _, _ = open_clip.create_model_and_transforms("stock-tiny", load_weights=False, **seen)

class Tokenizer:  # CLIP's, which comes with open_clip and has no files
    def save_pretrained(self, folder):
        pass

importlib.import_module("open_clip.push_to_hf_hub").save_for_hf(model, Tokenizer(), model_cfg, sys.argv[1])
"""
MODEL = {
    "embed_dim": 24,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 40, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Cluster:
    dashboard: str
    environment: dict[str, str]  # with its token


@pytest.fixture(scope="module")
def cluster(s3: str) -> Iterator[Cluster]:
    """`ray start --head` with a token; after the S3 server, whose address it inherits."""
    port, folder = free_port(), tempfile.mkdtemp(prefix="ray-page-", dir="/tmp")
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs run the `python` of the nodes
    environment.pop("RAY_ADDRESS", None)
    command = ["ray", "start", "--head", "--block", "--num-cpus=6", "--object-store-memory=300000000"]
    command += [f"--port={free_port()}", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"]
    command += [f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}"]
    with open(f"{folder}.log", "w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    yield Cluster(f"http://127.0.0.1:{port}", environment)
    for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
        process.kill()
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.log").unlink()


def commands() -> list[str]:
    """The blocks of commands of the page, in their order."""
    return re.findall(r"(?ms)^```sh\n(.*?)^```", PAGE.read_text())


def script(root: str, dashboard: str, folder: Path) -> str:
    """All commands of the page, with the sizes of this test; downloads have been made."""
    (folder / "sizes").mkdir()
    cases = []
    for name, sizes in SIZES.items():
        (folder / "sizes" / name).write_text(yaml.safe_dump(sizes))
        cases.append(f'*{name}*) set -- "$@" --set @sizes/{name};;')
    small = f'jest() {{ case "$*" in {" ".join(cases)} esac; echo "+ jest $*"; python -m pipelines "$@"; }}'
    blocks = [block.replace(MY_BUCKET, root).replace(DASHBOARD, dashboard) for block in commands()]
    return "\n".join(["set -eu -o pipefail", 'hf() { test -d "${@: -1}"; }', small, *blocks])


def downloads(folder: Path, rows: list[dict]) -> None:
    """What `hf download` would have written, and the evaluation sets."""
    names = {"URL": "url", "TEXT": "caption", "WIDTH": "width", "HEIGHT": "height"}  # Re-LAION's
    renamed = [{names.get(name, name): value for name, value in row.items()} for row in rows]
    storage.write_bytes(
        f"{folder}/metadata/part-00000-c000.snappy.parquet",
        parquet([row | {"key": f"{i:09d}", "status": "success"} for i, row in enumerate(renamed)]),
    )
    evaluation_sets(str(folder))
    options = [str(folder / "siglip"), json.dumps(MODEL)]
    subprocess.run([sys.executable, "-c", STOCK, *options], cwd=folder, check=True)


def test_the_page_has_commands_for_each_stage_and_the_test_changes_what_is_in_them():
    whole = "".join(commands())
    for words in ("submit ingest catalogue", "train evaluate report", "jest plan", "jest thresholds", "hf download"):
        assert words in whole
    assert MY_BUCKET in whole
    assert DASHBOARD in whole
    for path in re.findall(r"deploy/\S+\.yaml", whole):
        assert (ROOT / path).exists(), path


def load(name: str, *overrides: str) -> Run:
    return run_file.load((RUNS / "laion2b" / f"{name}.yaml").read_text(), ["root=memory://nowhere/laion2b", *overrides])


def cells(text: str, head: str) -> dict[str, list[str]]:
    """The page's table whose head starts so: the other cells of each row, by the first word of the first one."""
    table = text.partition(f"\n| {head} |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {re.findall(r"[\w-]+", row[0].replace("the reference's", "reference"))[0]: row[1:] for row in rows}


def hours(cost: costs.Cost) -> str:
    """As in the page's table of hours: those of the stage, and those that the GPUs would take."""
    computing = re.search(r"computing ([\d.]+) h", cost.note)
    return f"{cost.hours:.1f}" + (f" ({float(computing[1]):.1f})" if computing else "")


def test_the_hours_of_the_page_are_those_of_its_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "STAGES", {name: NotDone() for name in costs.STAGES})  # no storage is asked
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump_all(kuberay.render(kuberay.MANIFESTS / "gpus-64")))
    manifest = machines.read(str(tmp_path / "cluster.yaml"))
    page = PAGE.read_text()
    assert f"{manifest.reading_cpus:,.0f} CPUs at their largest" in page
    assumed, reference = Assumptions(urls=2_097_693_557, flops_per_second=4e14), load("reference")
    found = cells(page, "hours")
    for column, name in enumerate(("joint", "flexi", "siglip")):
        given = Basis(load(name), None, assumed, manifest=manifest, reference_run=reference)
        by_stage = {line.stage: hours(line) for line in costs.costs(given).lines if line.hours}
        assert found["train"][column] == by_stage["train"]
        assert found["CPUs"][column] == f"{flow.of_training(given, set()).cpus_needed / 64:.1f}"
        if name == "joint":
            for row, stage in (("ingest",) * 2, ("reference", "train reference"), ("reference-scores",) * 2):
                assert found[row][column] == by_stage[stage], row
    # the stock model's arithmetic without its folder
    one = load("one-percent", "reference.model.name=ViT-B-16-SigLIP-256", "reference.checkpoint=any")
    assumed = assumed.model_copy(update={"urls": 2_097_693_557 // 128, "cpus": 96})
    by_stage = {
        line.stage: hours(line).partition(" ")[0] for line in costs.costs(Basis(one, None, assumed)).lines if line.hours
    }
    assert {name: row[0] for name, row in cells(page, "stage").items() if name != "catalogue"} == by_stage


class NotDone:
    def is_done(self, run: Run) -> bool:
        return False


@pytest.mark.endurance
@pytest.mark.timeout(1800)
def test_the_commands_of_the_page_lead_from_an_empty_bucket_to_the_report(cluster: Cluster, s3: str, tmp_path: Path):
    root = f"{s3}/page"
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    with pictures_served() as rows:
        downloads(tmp_path, rows)
        environment = cluster.environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        whole = script(root, cluster.dashboard, tmp_path)
        with (tmp_path / "output.txt").open("w") as log:
            ran = subprocess.run(
                ["bash", "-c", whole], cwd=tmp_path, env=environment, stdout=log, stderr=log, timeout=1700
            )
    output = (tmp_path / "output.txt").read_text()
    assert ran.returncode == 0, output[-8000:]
    _check_plans(output)
    for name in ("one-percent", "one-percent-uniform", "joint", "flexi", "siglip"):
        results = storage.read_lines(f"{root}/runs/{name}/eval_results.jsonl")
        assert {line["key"] for line in results} == {"imagenet/zero_shot", "imagenet/few_shot", "coco/retrieval"}
    assert {"one-percent.html", "report.html", "thresholds.html"} <= {path.name for path in tmp_path.iterdir()}
    assert checkpoints.steps(f"{root}/reference")[-1] == 10
    curated = storage.read_json(f"{root}/catalogue-curated/manifest.json")["counts"]
    assert curated["kept"] == pytest.approx(0.3 * (curated["kept"] + curated["score"]), abs=1)
    assert cluster.environment["RAY_AUTH_TOKEN"] not in output
    _check_scores_are_those_of_a_stock_open_clip(root, tmp_path)


def _check_plans(output: str) -> None:
    """Before ingest, before the reference is trained, and after all stages: no plan says that the run would fail."""
    output = re.sub(r"[│\s]+", " ", output)  # cells of tables are wrapped
    assert output.count("What each stage takes") == 3
    assert "the run would fail" not in output
    assert "`jest ingest` fetches them" in output
    assert output.rpartition("What each stage takes")[2].count("done") >= 4


def _check_scores_are_those_of_a_stock_open_clip(root: str, folder: Path) -> None:
    """Pixels, tokens and weights of the reference: its cached embeddings are those that open_clip computes from the
    same pictures with the folder's own preprocessing."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder / 'siglip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'siglip'}")
    shard = open_shard(f"{root}/one-percent/shards/00000.tar")
    part = storage.open_parquet(f"{root}/one-percent/scores/parts/00000.parquet").read()
    part = part.filter(pc.equal(part["status"], "ok")).slice(0, 40)
    rows, images, captions = part["row"].to_pylist(), shard.images(0), shard.captions(0)
    pictures = [Image.open(io.BytesIO(images[row].as_py())) for row in rows]
    assert len(pictures) == 40
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
        text = model.encode_text(tokenizer([captions[row] for row in rows]), normalize=True)
    cached = [blocks.unpack(part[f"{side}_embedding"]).astype(np.float32) for side in ("image", "text")]
    np.testing.assert_allclose(cached[0], image.numpy(), atol=2e-3)
    np.testing.assert_allclose(cached[1], text.numpy(), atol=2e-3)
