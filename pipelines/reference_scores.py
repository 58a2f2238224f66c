"""Catalogue + reference model -> score cache: every kept pair embedded once, one part per shard.

Ray Data reads and decodes in tasks, embeds in an actor pool, and stores fragments; when a shard's fragments are
complete they become its part, row for row beside the shard. What is cached are embeddings, because the loss of a pair
depends on which others are in the batch.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray

from jest_core import config as run_files
from jest_core import tables, towers
from jest_core.config import Run
from jest_core.learnability import matched_losses
from jest_core.towers import Towers
from pipelines import blocks, checkpoints, cluster, progress, storage
from pipelines.catalogue import Catalogue, Place, open_catalogue
from pipelines.shards import part_name

PRECISION = "float32 forward, float16 embeddings"
_DESCRIPTION = b"jest.scores"  # in a part's metadata: its counts, its row groups' slots, its bad rows
_BLOCK_ROWS = 1024  # rows decoded at once: bounds a block's bytes, whatever the row groups are


def run_stage(run: Run) -> dict[str, Any]:
    """Write the score cache of the run's catalogue by its reference; returns the manifest.

    A second run does the shards that are missing; a directory made by another reference or catalogue is refused.
    """
    if run.reference is None:
        raise ValueError("the run file has no `reference` part: nothing to score with")
    catalogue = open_catalogue(run.path(run.data.catalogue))
    reference = load_reference(run)
    scale, bias = reference.scale_and_bias()
    config = {
        "catalogue": catalogue.manifest["fingerprint"],
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
    todo = [i for i in range(len(catalogue.shards)) if part_name(i) not in done]
    progress.say(
        "reference-scores",
        f"{reference.name} embeds the kept pairs of {len(catalogue.shards):,} shards ({len(done):,} done)",
    )
    cluster.connect()
    cluster.data_context()
    if todo:
        _embed_shards(run, catalogue, todo, directory)
    manifest = _finish(directory, catalogue, config)
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


def _embed_shards(run: Run, catalogue: Catalogue, todo: list[int], directory: str) -> None:
    assert run.reference is not None
    places = {i: catalogue.place(i) for i in todo}
    sizes: dict[int, list[int]] = {i: [] for i in todo}
    for shard, rows in zip(*(catalogue.row_groups[name].to_pylist() for name in ("shard", "rows")), strict=True):
        if shard in sizes:
            sizes[shard].append(rows)
    rows_left = {i: sum(sizes[i]) for i in todo}
    units = [
        {"place": places[i], "row_group": g, "first_row": sum(sizes[i][:g])}
        for i in todo
        for g, rows in enumerate(sizes[i])
        if rows
    ]
    merges = [_merge.remote(directory, places[i], [], sizes[i], 1.0) for i in todo if not rows_left[i]]
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
    fragments: dict[int, list[str]] = defaultdict(list)
    with progress.bar("reference-scores", sum(rows_left.values()), "pairs") as advance:
        for report in stage.iter_rows():
            shard, rows = report["shard"], report["rows"]
            fragments[shard].append(report["fragment"])
            rows_left[shard] -= rows
            advance(rows)
            if not rows_left[shard]:
                arguments = fragments.pop(shard), sizes[shard], run.data.max_bad_share
                merges.append(_merge.remote(directory, places[shard], *arguments))
        ray.get(merges)


def _read_and_decode(unit: dict[str, np.ndarray], run_text: str) -> Iterator[pa.Table]:
    """A row group -> blocks of decoded rows; rows that the catalogue drops or that do not decode stay, marked."""
    run = run_files.load(run_text)
    assert run.reference is not None
    inputs = towers.inputs(run.reference.model.name)
    place, row_group, first_row = unit["place"][0], int(unit["row_group"][0]), int(unit["first_row"][0])
    uids, is_kept, captions, images = _read(run, place, row_group)
    for start in range(0, len(uids), _BLOCK_ROWS):
        part = slice(start, min(start + _BLOCK_ROWS, len(uids)))
        encoded = images.slice(part.start, part.stop - part.start).to_pylist()
        pixels, status = inputs.view.batch(
            [data if keep else None for data, keep in zip(encoded, is_kept[part], strict=True)]
        )
        yield pa.table(
            {
                "shard": pa.array(np.full(len(status), place.number)),
                "row": pa.array(np.arange(first_row + part.start, first_row + part.stop), pa.int32()),
                "uid": uids[part],
                "status": np.where(is_kept[part], np.array(tables.SLOT_STATUS)[status], "dropped"),
                "pixels": blocks.pack(pixels),
                "tokens": blocks.pack(inputs.tokens(captions[part]).numpy()),
            }
        )


@storage.retried
def _read(run: Run, place: Place, row_group: int) -> tuple[list[str], NDArray[np.bool_], list[str], pa.Array]:
    """A row group's uids, which of its rows are kept, captions, and encoded images."""
    shard = place.open(run.data.columns)
    is_kept = place.aligned(shard, row_group) > 0
    return shard.uids(row_group), is_kept, shard.captions(row_group), shard.images(row_group)


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
@storage.retried
def _merge(
    directory: str, place: Place, fragments: list[str], row_group_sizes: list[int], max_bad_share: float
) -> None:
    """A shard's fragments -> its part, described in its metadata; the fragments go when the part is there."""
    fragments = sorted(fragments)
    found = [storage.open_parquet(path).read() for path in fragments]
    table = pa.concat_tables(found) if found else tables.score_cache(1, 1).empty_table()
    status = np.array(table["status"].to_pylist(), dtype=object)
    counts = Counter(status.tolist())
    n_kept = len(table) - counts["dropped"]
    if n_bad(counts) > max_bad_share * n_kept:
        raise ValueError(
            f"{place.path}: {n_bad(counts)} of {n_kept} kept rows do not decode ({_reasons(counts)}), more than "
            f"data.max_bad_share {max_bad_share}; drop them with a rule of the catalogue, or raise the share"
        )
    groups = []
    start = 0
    for number, size in enumerate(row_group_sizes):
        ok = status[start : start + size] == "ok"
        groups.append((int(ok.sum()), int(place.rows(number)[1][ok].sum())))
        start += size
    bad = np.flatnonzero((status != "ok") & (status != "dropped")).tolist()
    description = {
        "counts": counts,
        "groups": groups,
        "bad_rows": [(table["uid"][i].as_py(), i, status[i]) for i in bad],
    }
    table = table.replace_schema_metadata({_DESCRIPTION: json.dumps(description).encode()})
    storage.write_table(f"{directory}/parts/{part_name(place.number)}", table, row_group_sizes)
    for path in fragments:
        storage.remove(path)


def _finish(directory: str, catalogue: Catalogue, config: dict[str, Any]) -> dict[str, Any]:
    """What the parts say of themselves -> row_groups.parquet, bad_rows.parquet, and the manifest."""
    n_shards = len(catalogue.shards)
    stage = ray.data.from_items(
        [{"number": i, "part": f"{directory}/parts/{part_name(i)}"} for i in range(n_shards)],
        override_num_blocks=min(n_shards, 1000),
    ).map(_described)
    described = {row["number"]: json.loads(row["description"]) for row in stage.iter_rows()}
    counts: Counter[str] = Counter()
    groups, bad_rows = [], []
    for shard in range(n_shards):
        counts.update(described[shard]["counts"])
        groups += [(shard, g, ok, slots) for g, (ok, slots) in enumerate(described[shard]["groups"])]
        bad_rows += [(-1, uid, shard, row, reason) for uid, row, reason in described[shard]["bad_rows"]]
    for name, rows, schema in (("row_groups", groups, tables.SCORED), ("bad_rows", bad_rows, tables.BAD_ROWS)):
        columns = list(zip(*rows, strict=True)) or [()] * len(schema)
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
        storage.write_table(f"{directory}/{name}.parquet", table)
    fingerprint = catalogue.manifest["shards_fingerprint"]
    return storage.finish(
        directory, "reference-scores", config, shards_fingerprint=fingerprint, counts=dict(sorted(counts.items()))
    )


@storage.retried
def _described(item: dict[str, Any]) -> dict[str, Any]:
    metadata = storage.open_parquet(item["part"]).schema_arrow.metadata
    return {"number": item["number"], "description": metadata[_DESCRIPTION].decode()}


def good_slots(directory: str) -> NDArray[np.int64]:
    """Of each row group of the catalogue: the slots of its rows that decoded."""
    slots: NDArray[np.int64] = storage.open_parquet(f"{directory}/row_groups.parquet").read()["slots"].to_numpy()
    return slots


def n_bad(counts: Mapping[str, int]) -> int:
    """Kept rows that did not decode."""
    return sum(n for status, n in counts.items() if status not in ("ok", "dropped"))


def _reasons(counts: Mapping[str, int]) -> str:
    bad = [(reason, n) for reason, n in counts.items() if reason not in ("ok", "dropped")]
    return ", ".join(f"{reason} {n:,}" for reason, n in sorted(bad, key=lambda item: -item[1]))


def _summary(manifest: dict[str, Any]) -> str:
    counts, config = manifest["counts"], manifest["config"]
    temperature = f"logit_scale {config['logit_scale']:.2f}, logit_bias {config['logit_bias']:.2f}"
    bad = f"{n_bad(counts):,} bad" + (f" ({_reasons(counts)})" if n_bad(counts) else "")
    return f"{counts.get('ok', 0):,} pairs scored, {bad}; {temperature}"
