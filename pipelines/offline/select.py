"""The select stage: select from every super-batch of the catalogue by a fixed learner and reference -> a static subset.

JEST as an offline filter: embeddings come from two score caches, and no image is read. The result is a selection log:
`export` turns it into a list of uids, and the rule `subset` of a catalogue reads it as it is.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray

from jest_core import run_file, tables
from jest_core.run_file import Run
from jest_core.selection import Embeddings, select
from jest_core.selection.learnability import matched_losses
from jest_core.tables import SlotStatus

from ..base import blocks, cluster, in_parallel, manifests, owner, progress, storage
from ..data.catalogue import Catalogue, held_catalogue, open_catalogue
from ..scores import reference_scores, score_cache

if TYPE_CHECKING:
    from ray import ObjectRef

STAGE = "select"
_COLUMNS = ["status", "image_embedding", "text_embedding"]


class Config(TypedDict):
    """What decides a subset: fingerprints of the catalogue and of the score caches, and settings of the run file."""

    catalogue: str
    learner: NotRequired[str]
    reference: NotRequired[str]
    selection: dict[str, Any]
    super_batch_size: int
    seed: int


class Manifest(manifests.Manifest[Config]):
    """The manifest of a finished selection. n_selected: pairs."""

    n_selected: int


@dataclass(frozen=True)
class _Cache:
    """A finished score cache of one model."""

    directory: str
    manifest: score_cache.Manifest


@dataclass(frozen=True)
class _Task:
    """What every task needs, stored once on each node.

    batches: of each super-batch, its row groups (k, 2) as (shard, row group). caches: by model, learner or reference.
    """

    run_text: str
    batches: list[NDArray[np.int64]]
    caches: dict[str, _Cache]


@owner.until_return
def run_stage(run: Run) -> Manifest:
    """Write the selection of the run's catalogue to subset.directory; returns the manifest.

    A second run does the super-batches that are missing.
    """
    if run.subset is None or not run.selection.selects:
        raise ValueError(
            "`jest select` needs a `subset` part in the run file, and a selection.method other than uniform: add one"
        )
    catalogue = open_catalogue(run.path(run.data.catalogue))
    directory, caches = run.path(run.subset.directory), _caches(run)
    config = _config(run, catalogue, caches)
    if (manifest := manifests.begin(directory, STAGE, config, Manifest)) is not None:
        progress.say(STAGE, f"already at {directory}: {_summary(manifest)}")
        return manifest
    batches = plan(catalogue, run.super_batch_size, run.seed)
    done = set(storage.names(f"{directory}/parts", ".parquet"))
    todo = [i for i in range(len(batches)) if _name(i) not in done]
    progress.say(
        STAGE,
        f"{run.selection.method} selection by {run.selection.criterion}: {len(batches):,} super-batches of about "
        f"{run.super_batch_size:,} of {catalogue.manifest['counts'].get('kept', 0):,} pairs ({len(done):,} done)",
    )
    cluster.connect()
    cluster.data_context()
    task = _Task(run_file.dump(run), batches, caches)
    stage = ray.data.from_items(todo, override_num_blocks=max(1, len(todo))).map_batches(
        partial(owner.carried(_select), held_task=ray.put(task)),
        batch_size=1,
        num_cpus=run.subset.cpus_per_task,
        num_gpus=run.subset.gpus_per_task,
    )
    with progress.bar(STAGE, len(todo), "super-batches") as advance:
        for _ in stage.iter_rows() if todo else ():
            advance(1)
    manifest = _finish(directory, config, len(batches))
    progress.say(STAGE, _summary(manifest))
    return manifest


def _config(run: Run, catalogue: Catalogue, caches: dict[str, _Cache]) -> Config:
    fingerprints = {name: cache.manifest["fingerprint"] for name, cache in caches.items()}
    settings = {
        "selection": run.selection.model_dump(mode="json"),
        "super_batch_size": run.super_batch_size,
        "seed": run.seed,
    }
    return cast(Config, {"catalogue": catalogue.manifest["fingerprint"], **fingerprints, **settings})


def _caches(run: Run) -> dict[str, _Cache]:
    """The score caches that the criterion needs, by model; the learner's is made here where it is missing."""
    caches = {}
    assert run.subset is not None
    if run.uses_learner:
        if run.subset.learner is None:
            raise ValueError(f"criterion {run.selection.criterion!r} scores with a learner: give subset.learner")
        manifest = reference_scores.score(run, run.subset.learner, label=f"{STAGE}, learner")
        caches["learner"] = _Cache(run.path(run.subset.learner.scores), manifest)
    if run.uses_reference:
        assert run.reference is not None
        directory = run.path(run.reference.scores)
        manifest = score_cache.opened(directory)
        score_cache.refuse_other(manifest, open_catalogue(run.path(run.data.catalogue)), directory)
        score_cache.refuse_other_decoder(manifest, run.data.decoder, directory)
        caches["reference"] = _Cache(directory, manifest)
    return caches


def plan(catalogue: Catalogue, super_batch_size: int, seed: int) -> list[NDArray[np.int64]]:
    """Row groups (k, 2) of each super-batch, as (shard, row group): all of the catalogue once, in a seeded order.

    Row groups stay whole, so that each is read once: super-batches differ from super_batch_size by up to a row group.
    """
    groups = catalogue.row_groups
    slots = groups["slots"].to_numpy()
    kept = np.flatnonzero(slots > 0)
    order = kept[np.random.Generator(np.random.Philox(seed)).permutation(len(kept))]
    places = np.stack([groups[name].to_numpy()[order].astype(np.int64) for name in ("shard", "row_group")], 1)
    total = slots[order].sum()
    n_batches = max(1, round(total / super_batch_size))
    middles = np.cumsum(slots[order]) - slots[order] / 2
    batch = np.minimum((middles * n_batches // max(1, total)).astype(np.int64), n_batches - 1)
    return [places[batch == i] for i in np.unique(batch)]


def _select(batch: dict[str, NDArray[np.int64]], held_task: "ObjectRef[_Task]") -> pa.Table:
    """Write one super-batch's part of the selection log. batch: column `item`, the number of the super-batch."""
    task, number = ray.get(held_task), int(batch["item"][0])
    run = run_file.load(task.run_text)
    assert run.subset is not None
    device = torch.device("cuda" if run.subset.gpus_per_task else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, round(run.subset.cpus_per_task)))
    catalogue = held_catalogue(run.path(run.data.catalogue))
    groups = task.batches[number].tolist()
    rows = pa.concat_tables([_rows(catalogue, shard, group, task.caches) for shard, group in groups])
    models = {}
    for name, cache in task.caches.items():
        sides = [blocks.unpack(rows[f"{name}_{side}"]).astype(np.float32) for side in ("image", "text")]
        image, text = (torch.from_numpy(side).to(device) for side in sides)
        models[name] = Embeddings(image, text, *score_cache.scale_and_bias(cache.manifest))
    table = _selected(run, number, rows, models)
    storage.retried(storage.write_table)(f"{run.path(run.subset.directory)}/parts/{_name(number)}", table)
    return pa.table({"selected": [len(table)]})


def _selected(run: Run, number: int, rows: pa.Table, models: dict[str, Embeddings]) -> pa.Table:
    """The selection from one super-batch (columns: tables.SELECTION). rows: as `_rows`. models: embeddings of the
    rows by the learner and the reference, or one of them."""
    high, low = tables.uid_from_hex(rows["uid"].to_pylist())
    config = run.selection
    n_chunks = config.n_draws
    size = round(len(rows) * (1 - config.filter_ratio) / n_chunks) * n_chunks
    if not size:
        return tables.SELECTION.empty_table()
    chosen = select(
        models.get("learner"),
        models.get("reference"),
        sub_batch_size=size,
        n_chunks=n_chunks,
        method=config.method,
        criterion=config.criterion,
        loss=config.loss,
        draw=config.draw,
        gain=config.gain,
        uids=np.stack([high, low], 1),
        seed=run.seed,
        step=number,
        precision=config.precision,
    )
    indices = chosen.indices.cpu().numpy()
    losses = {
        name: matched_losses(model, config.loss).cpu().numpy()[indices].astype(np.float32)
        for name, model in models.items()
    }
    missing = np.full(size, np.nan, dtype=np.float32)
    picks = rows.take(pa.array(indices))
    columns = {
        "step": np.full(size, number),
        "position": indices,
        "uid": picks["uid"],
        "occurrence": np.zeros(size, np.int64),
        "chunk": chosen.chunk.cpu().numpy(),
        "shard": picks["shard"],
        "row": picks["row"],
        "learner_loss": losses.get("learner", missing),
        "reference_loss": losses.get("reference", missing),
        "draw_score": chosen.draw_score.cpu().numpy(),
        "selected": np.ones(size, dtype=bool),
    }
    return pa.table({field.name: columns[field.name] for field in tables.SELECTION}).cast(tables.SELECTION)


def _rows(catalogue: Catalogue, shard: int, row_group: int, caches: dict[str, _Cache]) -> pa.Table:
    """The kept rows of a row group that have embeddings in every cache: uid, shard, row of the shard, embeddings."""
    place = catalogue.place(shard)
    uids, multiplicity = place.rows(row_group)
    good = multiplicity > 0
    start = sum(catalogue.row_group_sizes(shard)[:row_group])
    columns = {
        "uid": pa.array(uids, pa.string()),
        "shard": pa.array(np.full(len(uids), shard)),
        "row": pa.array(np.arange(start, start + len(uids))),
    }
    for name, cache in caches.items():
        cached = score_cache.read(cache.directory, place, row_group, uids, _COLUMNS)
        good &= np.array(cached["status"].to_pylist(), dtype=object) == SlotStatus.OK.label
        columns[f"{name}_image"], columns[f"{name}_text"] = cached["image_embedding"], cached["text_embedding"]
    return pa.table(columns).filter(pa.array(good))


def _finish(directory: str, config: Config, n_batches: int) -> Manifest:
    paths = [f"{directory}/parts/{_name(i)}" for i in range(n_batches)]
    n_selected = sum(in_parallel.read_each(_n_rows, paths))
    return manifests.finish(directory, Manifest(stage=STAGE, complete=True, config=config, n_selected=n_selected))


def _n_rows(part: str) -> int:
    """The number of rows of a part; reads only the file's footer."""
    return int(storage.open_parquet(part).metadata.num_rows)


def _name(number: int) -> str:
    return f"{number:06d}.parquet"


def _summary(manifest: Manifest) -> str:
    return f"{manifest['n_selected']:,} pairs selected"
