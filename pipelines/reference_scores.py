"""Catalogue + reference model -> score cache: every kept pair embedded once, one part per shard.

Ray Data reads and decodes in tasks, embeds in an actor pool, and stores fragments; when a shard's fragments are
complete they become its part, row for row beside the shard. What is cached are embeddings, because the loss of a pair
depends on which others are in the batch.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from jest_core import config as run_files
from jest_core import tables, towers
from jest_core.config import Run
from jest_core.learnability import matched_losses
from jest_core.towers import Towers
from pipelines import blocks, catalogue, checkpoints, cluster, progress, storage
from pipelines.shards import Shard, part_name

PRECISION = "float32 forward, float16 embeddings"
_BLOCK_ROWS = 1024  # rows decoded at once: bounds a block's bytes, whatever the row groups are


def run_stage(run: Run) -> dict[str, Any]:
    """Write the score cache of the run's catalogue by its reference; returns the manifest.

    A second run does the shards that are missing; a directory made by another reference or catalogue is refused.
    """
    if run.reference is None:
        raise ValueError("the run file has no `reference` part: nothing to score with")
    listing = storage.finished(run.path(run.data.catalogue), "catalogue", "run `jest catalogue` first")
    reference = load_reference(run)
    scale, bias = reference.scale_and_bias()
    config = {
        "catalogue": listing["fingerprint"],
        "model": reference.name,
        "weights": towers.weights_hash(reference.model),
        "preprocessing": reference.input_fingerprint,
        "precision": PRECISION,
        "logit_scale": scale,
        "logit_bias": bias,
    }
    directory = run.path(run.reference.scores)
    if (manifest := storage.begin(directory, "reference-scores", config)) is not None:
        progress.say("reference-scores", f"already at {directory}: {_summary(manifest)}")
        return manifest
    done = set(storage.names(f"{directory}/parts", ".parquet"))
    todo = [i for i in range(len(listing["shards"])) if part_name(i) not in done]
    progress.say(
        "reference-scores",
        f"{reference.name} embeds the kept pairs of {len(listing['shards'])} shards ({len(done)} done)",
    )
    if todo:
        cluster.connect()
        cluster.data_context()
        _embed_shards(run, listing, todo, directory)
    described = [_describe(directory, i, shard) for i, shard in enumerate(listing["shards"])]
    manifest = storage.finish(directory, "reference-scores", config, shards=described)
    progress.say("reference-scores", _summary(manifest))
    return manifest


def load_reference(run: Run) -> Towers:
    """The run's reference model with the weights of its checkpoint, in evaluation mode."""
    assert run.reference is not None
    spec = run.reference.model
    reference = towers.create(spec.name, seed=0, mean=spec.image_mean, std=spec.image_std)
    towers.load_weights(reference, checkpoints.read(run.path(run.reference.checkpoint)))
    reference.model.eval()
    return reference


def _embed_shards(run: Run, listing: dict[str, Any], todo: list[int], directory: str) -> None:
    assert run.reference is not None
    units, rows_left = [], {}
    for i in todo:
        sizes = [group["rows"] for group in listing["shards"][i]["row_groups"]]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        rows_left[i] = sum(sizes)
        units += [
            {"shard": i, "path": listing["shards"][i]["path"], "row_group": g, "first_row": start}
            for g, start in enumerate(starts)
        ]
    text = run_files.dump(run)
    stage = (
        ray.data.from_items(units, override_num_blocks=len(units))
        .map_batches(_read_and_decode, batch_size=1, batch_format="numpy", fn_kwargs={"run_text": text})  # type: ignore[arg-type]
        .map_batches(
            _Embedder,
            fn_constructor_args=(text, directory),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=run.reference.n_actors),
            num_cpus=1,
            num_gpus=run.reference.gpus_per_actor,
        )
    )
    merges = []
    fragments: dict[int, list[str]] = defaultdict(list)
    with progress.bar("reference-scores", sum(rows_left.values()), "pairs") as advance:
        for report in stage.iter_rows():
            shard, rows = report["shard"], report["rows"]
            fragments[shard].append(report["fragment"])
            rows_left[shard] -= rows
            advance(rows)
            if not rows_left[shard]:
                sizes = [group["rows"] for group in listing["shards"][shard]["row_groups"]]
                merges.append(_merge.remote(directory, shard, fragments.pop(shard), sizes, run.data.max_bad_share))
        ray.get(merges)


def _read_and_decode(unit: dict[str, np.ndarray], run_text: str) -> Iterator[pa.Table]:
    """A row group -> blocks of decoded rows; rows that the catalogue drops or that do not decode stay, marked."""
    run = run_files.load(run_text)
    assert run.reference is not None
    size = _view_of(run)
    shard, row_group, first_row = int(unit["shard"][0]), int(unit["row_group"][0]), int(unit["first_row"][0])
    source = Shard(str(unit["path"][0]))
    kept, uids = catalogue.kept_rows(run.path(run.data.catalogue), shard, row_group)
    if uids != source.uids(row_group):
        raise ValueError(
            f"{source.path}, row group {row_group}, changed since it was catalogued: run `jest catalogue` into a "
            "new directory"
        )
    is_kept = np.isin(np.arange(len(uids)), kept)
    captions, images = source.captions(row_group), source.images(row_group)
    for start in range(0, len(uids), _BLOCK_ROWS):
        part = slice(start, min(start + _BLOCK_ROWS, len(uids)))
        encoded = images.slice(part.start, part.stop - part.start).to_pylist()
        pixels, decoded = size.view.batch(
            [data if keep else None for data, keep in zip(encoded, is_kept[part], strict=True)]
        )
        status = np.where(~is_kept[part], "dropped", np.where(decoded, "ok", "undecodable"))
        yield pa.table(
            {
                "shard": pa.array(np.full(len(decoded), shard)),
                "row": pa.array(np.arange(first_row + part.start, first_row + part.stop), pa.int32()),
                "uid": uids[part],
                "status": status,
                "pixels": blocks.pack(pixels),
                "tokens": blocks.pack(size.tokens(captions[part]).numpy()),
            }
        )


_inputs: dict[str, Towers] = {}


def _view_of(run: Run) -> Towers:
    """The reference's view and tokenizer, made once in each worker process."""
    assert run.reference is not None
    name = run.reference.model.name
    if name not in _inputs:
        _inputs[name] = towers.create(name, seed=0)
    return _inputs[name]


class _Embedder:
    """An actor that holds the reference on its device: a block of decoded rows -> a stored fragment, and its report."""

    def __init__(self, run_text: str, directory: str) -> None:
        run = run_files.load(run_text)
        assert run.reference is not None
        self.reference, self.batch_size, self.directory = load_reference(run), run.reference.batch_size, directory
        if run.reference.gpus_per_actor:
            self.reference.model.cuda()

    def __call__(self, block: pa.Table) -> pa.Table:
        size = self.reference.view.image_size
        ok = np.flatnonzero(np.array(block["status"].to_pylist()) == "ok")
        found = self.reference.embed(
            torch.from_numpy(blocks.unpack(block["pixels"])[ok].reshape(-1, 3, size, size)),
            torch.from_numpy(blocks.unpack(block["tokens"])[ok]),
            batch_size=self.batch_size,
        )
        values = {
            "image_embedding": found.image.half(),
            "text_embedding": found.text.half(),
            "matched_pair_loss": matched_losses(found).float(),
            "cosine": (found.image * found.text).sum(1),
        }
        columns: dict[str, Any] = {name: block[name] for name in ("uid", "row", "status")}
        for name, value in values.items():
            rows = np.zeros((len(block), *value.shape[1:]), dtype=value.cpu().numpy().dtype)
            rows[ok] = value.cpu().numpy()
            columns[name] = blocks.pack(rows) if rows.ndim > 1 else rows
        table = pa.table(columns).cast(tables.score_cache(found.image.shape[1], found.text.shape[1]))
        shard, row = block["shard"][0].as_py(), block["row"][0].as_py()
        fragment = f"{self.directory}/fragments/{shard:05d}-{row:09d}.parquet"
        storage.write_table(fragment, table)
        return pa.table({"shard": [shard], "rows": [len(table)], "fragment": [fragment]})


@ray.remote(num_cpus=1)
def _merge(directory: str, shard: int, fragments: list[str], row_groups: list[int], max_bad_share: float) -> None:
    """A shard's fragments -> its part; the fragments go when the part is there."""
    fragments = sorted(fragments)
    table = pa.concat_tables([storage.open_parquet(path).read() for path in fragments])
    status = np.array(table["status"].to_pylist())
    n_bad, n_kept = int((status == "undecodable").sum()), int((status != "dropped").sum())
    if n_bad > max_bad_share * n_kept:
        raise ValueError(
            f"shard {shard}: {n_bad} of {n_kept} kept rows do not decode, more than data.max_bad_share "
            f"{max_bad_share}; "
            "drop them with a rule of the catalogue, or raise the share"
        )
    storage.write_table(f"{directory}/parts/{part_name(shard)}", table, row_groups)
    for path in fragments:
        storage.remove(path)


def _describe(directory: str, index: int, shard: dict[str, Any]) -> dict[str, Any]:
    """A shard's entry in the manifest: what it was, and which of its kept rows are bad."""
    part = storage.open_parquet(f"{directory}/parts/{part_name(index)}").read(columns=["status", "row"])
    status = np.array(part["status"].to_pylist())
    return {
        "fingerprint": shard["fingerprint"],
        "rows": len(status),
        "ok": int((status == "ok").sum()),
        "bad_rows": part["row"].to_numpy()[status == "undecodable"].tolist(),
    }


def bad_rows(manifest: dict[str, Any]) -> dict[str, list[int]]:
    """Kept rows that do not decode: shard number -> rows of it."""
    return {str(i): shard["bad_rows"] for i, shard in enumerate(manifest["shards"]) if shard["bad_rows"]}


def _summary(manifest: dict[str, Any]) -> str:
    ok = sum(shard["ok"] for shard in manifest["shards"])
    bad = sum(len(shard["bad_rows"]) for shard in manifest["shards"])
    config = manifest["config"]
    temperature = f"logit_scale {config['logit_scale']:.2f}, logit_bias {config['logit_bias']:.2f}"
    return f"{ok:,} pairs scored, {bad:,} undecodable; {temperature}"
