"""What reading an example costs, by part: the figures of pipelines/planning/unit_costs.py.

python -m tests.benchmarks.bench_read_costs [--n 64] [--repeats 7]

JPEGs (quality 90) of pieces of scikit-learn's two photographs, in tars, on a local disk. CPU milliseconds of one
process, which are those of all its threads; the least of the repeats, whose parts take turns.
"""

import io
import json
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import typer
from PIL import Image
from ray.cluster_utils import Cluster
from sklearn.datasets import load_sample_images

from jest_core import run_file
from jest_core.examples.decode import View
from jest_core.examples.tokenizer import ClipTokenizer
from jest_core.models import configurations
from pipelines.base import cluster
from pipelines.data import catalogue
from pipelines.planning.unit_costs import DECODING
from pipelines.scores import reference_scores
from pipelines.stream import super_batches, windows
from pipelines.stream.source import open_source
from tests.benchmarks.measure import console, machine, table
from tests.conftest import POOL

WIDTH = 768  # of the cached embeddings
ROWS = 1024  # of a window
NODE = {"num_cpus": 1, "object_store_memory": 3_000_000_000}
RUN = """
root: {root}
run_dir: run
seed: 0
data: {{shards: "shards/*.tar", catalogue: catalogue, rules: [], n_streams: 1, window_rows: 1024}}
model: {{name: jest-b-16-256}}
reference:
  model: {{name: jest-b-16-256}}
  features: {{format: clip-retrieval, folder: features}}
  scores: scores
selection: {{method: joint, criterion: learnability, loss: softmax, filter_ratio: 0.5, n_chunks: 1}}
training: {{sub_batch_size: 512, examples_trained: 512, learning_rate: 1.0e-3, warmup_steps: 0, weight_decay: 0.0,
  loss: softmax, checkpoint_every_steps: 1}}
"""


def pictures(n: int, size: int) -> list[bytes]:
    """n JPEGs, square, of so many pixels a side: random pieces of photographs, at most a third smaller than these."""
    random, photographs = np.random.default_rng(0), load_sample_images().images
    return [_picture(Image.fromarray(photographs[i % len(photographs)]), random, size) for i in range(n)]


def _picture(photograph: Image.Image, random: np.random.Generator, size: int) -> bytes:
    side = int(min(photograph.size) * random.uniform(0.67, 1.0))
    left, top = (int(random.integers(0, whole - side + 1)) for whole in photograph.size)
    piece = photograph.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    piece.save(sink := io.BytesIO(), "JPEG", quality=90)
    return sink.getvalue()


def least(parts: Mapping[str, Callable[[], object]], n: int, repeats: int) -> dict[str, float]:
    """CPU milliseconds of each for one of n examples: the least of the repeats, in turns, after one that warms up."""
    found = dict.fromkeys(parts, float("inf"))
    for turn in range(repeats + 1):
        for name, part in parts.items():
            began = time.process_time()
            part()
            found[name] = min(found[name], (time.process_time() - began) * 1e3 / n) if turn else found[name]
    return found


def decoding(n: int, repeats: int) -> None:
    """Each decoder's pictures of the table."""
    images = {size: pictures(n, size) for size in sorted({point.picture for point in DECODING})}
    parts = {}
    for point in DECODING:
        view = View(point.view, decoder=point.decoder)
        view = view.smaller(point.view) if point.late else view
        parts[point] = lambda view=view, size=point.picture: view.batch(images[size])
    found = least({str(i): part for i, part in enumerate(parts.values())}, n, repeats)
    rows = [
        [point.decoder, f"{point.picture}", f"{point.view}", "late" * point.late, f"{ms:.3f}", f"{point.ms:g}"]
        for point, ms in zip(parts, found.values(), strict=True)
    ]
    size = ", ".join(f"{np.mean([len(i) for i in some]):,.0f} bytes at {side}" for side, some in images.items())
    table(f"Decoding, CPU ms a picture ({size})", ["decoder", "JPEG", "view", "", "measured", "in the table"], rows)


def window(captions: Sequence[str], repeats: int, work: Path) -> None:
    """A window of 256 px JPEGs as a task reads it, by part, and what it takes in the object store."""
    text = RUN.format(root=work)
    images = pictures(ROWS, 256)
    uids = [f"{i:032x}" for i in range(ROWS)]
    _write_tar(work / "shards", images, captions, uids)
    _write_features(work / "features", uids)
    run = run_file.load(text)
    catalogue.run_stage(run)
    reference_scores.run_stage(run)
    cluster.disconnect()
    source, inputs = open_source(run), configurations.inputs_of(run.model)
    window = next(iter(source.order.windows(0, 0)))
    item = windows.item_of(source.catalogue, window)
    whole = windows.of_window(item, run_file.dump(run), inputs)
    again = whole.drop_columns(["status", "pixels", "tokens"])
    without = run_file.load(text, ["selection.criterion=hard"])
    parts = {
        "all of it": lambda: windows.of_window(item, run_file.dump(run), inputs),
        "without cached scores": lambda: windows.of_window(item, run_file.dump(without), inputs),
        "pixels": lambda: inputs.view.batch(again["image"].to_pylist()),
        "tokens": lambda: inputs.tokenizer(again["caption"].to_pylist()),
    }
    found = least(parts, ROWS, repeats)
    found["the rest: reading, uids, Arrow"] = found["without cached scores"] - found["pixels"] - found["tokens"]
    found["cached scores"] = found["all of it"] - found["without cached scores"]
    found |= _moved(whole, repeats)
    rows = [[name, f"{ms:.3f}"] for name, ms in found.items()]
    table("A window of 256 px, CPU ms an example", ["", "measured"], rows)
    encoded = np.mean([len(image) for image in images])
    console.print(
        f"in the object store {whole.nbytes / ROWS:,.0f} bytes an example, of which pixels {3 * 256**2:,}, "
        f"encoded {encoded:,.0f}, tokens {4 * inputs.tokenizer.context_length:,}, scores {4 * WIDTH:,}"
    )


def _moved(whole: pa.Table, repeats: int) -> dict[str, float]:
    """What a window costs on its way to a learner: into the object store, to another node, out of it as tensors."""
    nodes = Cluster(initialize_head=True, head_node_args=NODE)
    nodes.add_node(**NODE, resources={"other": 1})
    ray.init(nodes.address, log_to_driver=False)

    def tensors() -> object:
        return super_batches.examples(pa.concat_tables([near.slice(0, 512), near.slice(512)]), 256, True)

    cluster.keep_freed_memory()  # as learners do; with a GPU PyTorch keeps the page-locked memory
    near = ray.get(ray.put(whole))
    parts = {"into the object store": lambda: ray.put(whole), "out of it, as tensors": tensors}
    found = least(parts, ROWS, repeats)
    again = ray.remote(num_cpus=1, resources={"other": 0.001})(lambda window: pa.concat_tables([window]))
    far = again.remote(ray.put(whole))  # a copy on the other node
    raylets = [each for each in psutil.process_iter(["name"]) if each.info["name"] == "raylet"]
    raylets = [each for each in raylets if psutil.Process().pid in {parent.pid for parent in each.parents()}]
    names, best = ("to another node, receiver", "to another node, sender"), float("inf")
    for turn in range(repeats + 1):
        one = again.remote(far)
        ray.wait([one], fetch_local=False)
        began, before = time.perf_counter(), [sum(each.cpu_times()[:2]) for each in raylets]
        ray.get(one)
        wall = time.perf_counter() - began
        spent = [sum(each.cpu_times()[:2]) - then for each, then in zip(raylets, before, strict=True)]
        if turn:  # the first touches the stores' memory for the first time
            best = min(best, wall)
            for name, seconds in zip(names, spent, strict=True):
                found[name] = min(found.get(name, float("inf")), seconds * 1e3 / ROWS)
        del one
        time.sleep(1)
    console.print(f"between two raylets of this machine {whole.nbytes / 1e9 / best:.2f} GB a second")
    del far
    ray.shutdown()
    nodes.shutdown()
    return found


def _write_tar(folder: Path, images: Sequence[bytes], captions: Sequence[str], uids: Sequence[str]) -> None:
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for image, caption, uid in zip(images, captions, uids, strict=True):
            for end, data in (("jpg", image), ("txt", caption.encode()), ("json", json.dumps({"uid": uid}).encode())):
                member = tarfile.TarInfo(f"{uid}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _write_features(folder: Path, uids: Sequence[str]) -> None:
    """Random embeddings, as clip-retrieval writes them."""
    random = np.random.default_rng(0)
    for kind in ("img", "text"):
        values = random.standard_normal((len(uids), WIDTH)).astype(np.float32)
        (folder / f"{kind}_emb").mkdir(parents=True)
        np.save(folder / f"{kind}_emb/{kind}_emb_0.npy", values / np.linalg.norm(values, axis=1, keepdims=True))
    (folder / "metadata").mkdir()
    pq.write_table(pa.table({"uid": uids}), folder / "metadata/metadata_0.parquet")


def tokenising(captions: Sequence[str], repeats: int) -> None:
    """CLIP's tokens, once words have been seen."""
    parts = {f"{length} tokens": lambda length=length: ClipTokenizer(length)(captions) for length in (16, 77)}
    found = least(parts, len(captions), repeats)
    table("Tokenising, CPU ms a caption", ["", "measured"], [[name, f"{ms:.4f}"] for name, ms in found.items()])


def main(n: int = 64, repeats: int = 7) -> None:
    console.print(machine("cpu"))
    captions = pq.read_table(POOL / "00000.parquet", columns=["caption"])["caption"].to_pylist()[:ROWS]
    decoding(n, repeats)
    tokenising(captions, repeats)
    with TemporaryDirectory() as work:
        window(captions, repeats, Path(work))


if __name__ == "__main__":
    typer.run(main)
