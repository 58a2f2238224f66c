"""Catalogue + reference model -> score cache: every kept pair embedded once, one part per shard.

Ray Data reads and decodes in tasks, embeds in an actor pool, and stores fragments; on a machine of few cores this
process embeds. When a shard's fragments are complete they become its part. What is cached are embeddings, because the
loss of a pair depends on which others are in the batch.
"""

import uuid
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from numpy.typing import NDArray

from jest_core import run_file, tables
from jest_core.choices import LOSSES
from jest_core.models import configurations, towers
from jest_core.models.towers import Towers
from jest_core.run_file import Reference, Run
from jest_core.selection.learnability import matched_losses
from jest_core.tables import SlotStatus

from ..base import blocks, cluster, manifests, node_checks, owner, progress
from ..base.stage_table import STAGES
from ..base.stopwatch import Stopwatch
from ..data import local_cache
from ..data.catalogue import Catalogue, open_catalogue
from ..data.rows import kept, of_row_group
from . import calibration, imported, score_cache
from .embedder import Embedder, load_reference, resolution_of
from .parts import Fragment, Parts, StoreReport, store
from .score_cache import STAGE, Config, Manifest

_ROUNDING = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-3}  # of 1 - cosine, between two machines
_FEW_CORES = 4  # up to so many, this process embeds: each actor would import PyTorch first, which takes seconds
_MOST_TASKS = 5_000  # that read: each reads consecutive row groups, and Ray keeps a record of every task
_BLOCK_BYTES = 32 << 20  # of the pixels of a block, or one batch where that is more


@dataclass(frozen=True)
class _Units:
    """The row groups to embed, one entry for each. first_row: of the shard. slots: sum of multiplicities."""

    shard: NDArray[np.int64]
    row_group: NDArray[np.int64]
    first_row: NDArray[np.int64]
    slots: NDArray[np.int64]


def run_stage(run: Run, *, verify: bool = False) -> Manifest:
    """Write the score cache of the run's catalogue by its reference; returns the manifest.

    A second run does the shards that are missing; a directory made by another reference or catalogue is refused.
    verify: embed a sample of a finished cache again and compare, and write nothing.
    """
    STAGES[score_cache.STAGE].refuse(run)
    assert run.reference is not None
    if verify:
        verify_cache(run)
        return score_cache.opened(run.path(run.reference.scores))
    return score(run, run.reference)


@owner.until_return
def score(run: Run, spec: Reference, label: str = STAGE) -> Manifest:
    """The same by any model: `jest select` scores with the learner's checkpoint too. label: of its progress lines."""
    catalogue = open_catalogue(run.path(run.data.catalogue))
    if spec.features is not None:
        return imported.import_scores(run, spec, catalogue)
    reference = load_reference(run, spec)
    config = _config(spec, catalogue, reference)
    directory = run.path(spec.scores)
    manifest = manifests.begin(directory, STAGE, config, Manifest)
    todo = score_cache.missing(directory, catalogue)
    if manifest is not None and score_cache.is_whole(directory, todo):
        progress.say(label, f"already at {directory}: {score_cache.summary(manifest)}")
        return manifest
    owner.claim(directory)  # of a finished one too, of which damaged parts are made again
    progress.say(
        label,
        f"{reference.name} embeds the kept pairs of {len(catalogue.shards):,} shards "
        f"({len(catalogue.shards) - len(todo):,} done)",
    )
    cluster.connect()
    node_checks.refuse_unfit(gpus=bool(spec.gpus_per_actor), compiled=spec.compile)
    local_cache.warn_where_unusable(run)
    cluster.data_context()
    if len(todo):
        _embed_shards(run, spec, catalogue, todo, config, label)
    manifest = calibration.finish(run, directory, catalogue, config)
    progress.say(label, score_cache.summary(manifest))
    return manifest


def verify_cache(run: Run, n_pairs: int = 256) -> None:
    """Embed a sample of a finished cache again, and compare. Raises ValueError where more than rounding differs."""
    if run.reference is None or run.reference.features is not None:
        raise ValueError("--verify embeds pairs again: the run file needs a `reference` with a model")
    spec, catalogue = run.reference, open_catalogue(run.path(run.data.catalogue))
    directory, reference = run.path(spec.scores), load_reference(run, spec)
    score_cache.opened(directory)
    manifests.begin(directory, STAGE, _config(spec, catalogue, reference), Manifest)
    groups = catalogue.row_groups.filter(pc.greater(catalogue.row_groups["slots"], 0))
    generator, left = np.random.default_rng(run.seed), n_pairs
    furthest = {"image": 0.0, "text": 0.0, "loss": 0.0}
    for i in generator.permutation(len(groups)):
        shard, number = (groups[name][int(i)].as_py() for name in ("shard", "row_group"))
        place = catalogue.place(shard)
        group = kept(run, shard, number)
        picked = np.sort(generator.permutation(len(group.rows))[: min(left, 1 + n_pairs // 8)])
        columns = ["status", "image_embedding", "text_embedding", "matched_pair_loss"]
        cached = score_cache.read(directory, place, number, place.rows(number)[0], columns)
        cached = cached.take(pa.array(group.rows[picked]))
        pixels, status = reference.view.batch(group.images(picked))
        if cached["status"].to_pylist() != tables.status_labels(status):
            raise ValueError(
                f"{place.path}, row group {number}: other pictures decode than in {directory}; score it again into a "
                "new directory, with the libraries that training uses"
            )
        tokens = reference.tokens([group.captions[j] for j in picked])
        embeddings = reference.embed(
            torch.from_numpy(pixels),
            tokens,
            batch_size=spec.batch_size,
            resolution=resolution_of(spec, reference),
            precision=spec.precision,
        )
        ok = status == SlotStatus.OK
        for side, new in (("image", embeddings.image), ("text", embeddings.text)):
            old = blocks.unpack(cached[f"{side}_embedding"]).astype(np.float32)
            distances = 1 - (old * new.numpy()).sum(1)[ok] / np.maximum(np.linalg.norm(old, axis=1)[ok], 1e-12)
            furthest[side] = max(furthest[side], float(distances.max(initial=0.0)))
        losses = matched_losses(embeddings, reference.loss).numpy() - cached["matched_pair_loss"].to_numpy()
        furthest["loss"] = max(furthest["loss"], float(np.abs(losses[ok]).max(initial=0.0)))
        left -= len(picked)
        if not left:
            break
    result = (
        f"{n_pairs - left} pairs embedded again: 1 - cosine to what is cached is at most {furthest['image']:.1e} "
        f"(image) and {furthest['text']:.1e} (text), the matched-pair loss differs by at most {furthest['loss']:.1e}"
    )
    if max(furthest["image"], furthest["text"]) > _ROUNDING[spec.precision]:
        raise ValueError(
            f"{directory} is not what {reference.name} gives: {result}; score it again into a new directory"
        )
    progress.say(STAGE, result)


def _config(spec: Reference, catalogue: Catalogue, reference: Towers) -> Config:
    config: Config = {
        "catalogue": catalogue.manifest["fingerprint"],
        "model": reference.name,
        "weights": towers.weights_hash(reference.model),
        "preprocessing": reference.inputs.fingerprint,
        "precision": f"{spec.precision} forward, float16 embeddings",
        "loss": reference.loss,
        "logit_scale": reference.scale_and_bias()[0],
        "logit_bias": reference.scale_and_bias()[1] if LOSSES[reference.loss].has_bias else spec.logit_bias,
        "width": configurations.width(reference.name),
        "scorers": [scorer.model_dump() for scorer in spec.scorers],
    }
    if reference.view.decoder != "pillow":
        config["decoder"] = reference.view.decoder
    if (seen := resolution_of(spec, reference)) != reference.resolution():
        patches = f", patches of {seen.patch_size}" if seen.patch_size else ""
        config["resolution"] = f"{seen.image_size} pixels{patches}"
    return config


def _embed_shards(
    run: Run, spec: Reference, catalogue: Catalogue, todo: NDArray[np.int64], config: Config, label: str
) -> None:
    """Read and decode -> embed -> store fragments -> a part for each shard, all at once on the cluster."""
    directory = run.path(spec.scores)
    units = _units(catalogue, todo)
    inputs = configurations.inputs_of(spec.model, run.data.decoder)
    parts = Parts(run, directory, config, inputs.tokenizer.identity)
    for shard in np.setdiff1d(todo, units.shard).tolist():
        parts.write(shard, [])
    rows_a_block = spec.batch_size * max(1, _BLOCK_BYTES // (3 * inputs.view.image_size**2 * spec.batch_size))
    # no actor without a block to embed: it would load the model for nothing, and Ray warns of it
    n_blocks = int(np.ceil(units.slots / rows_a_block).sum())
    n_actors = min(_n_actors(spec), n_blocks)
    n_most = n_blocks if spec.n_actors is None and cluster.grows() else n_actors
    # on one machine no more tasks than cores: each keeps one busy
    cluster.data_context(n_actors + cluster.n_cores() if cluster.is_local() else None)
    rates = Stopwatch(
        ("read", "decode", "embed", "write"), "embed", n_actors or cluster.n_cores(), shared=not spec.gpus_per_actor
    )
    if len(units.shard):
        to_read = ray.put(np.stack([units.shard, units.row_group, units.first_row], 1))
        decoded = ray.data.range(len(units.shard), override_num_blocks=min(len(units.shard), _MOST_TASKS)).map_batches(
            of_row_group,  # type: ignore[arg-type]
            batch_size=1,
            fn_args=(to_read, run_file.dump(run), inputs, rows_a_block),
        )
        embed = partial(_embed_by_actors, n_actors, n_most) if n_actors else _embed_here
        session = f"{directory}/fragments/{uuid.uuid4().hex}"  # another process may write the same cache
        _collect(embed(decoded, run, spec, session), units, parts, rates, label)
        progress.say(label, rates.summary())
    parts.wait()


def _units(catalogue: Catalogue, todo: NDArray[np.int64]) -> _Units:
    """The row groups with kept rows of these shards."""
    columns = (catalogue.row_groups[name].to_numpy() for name in ("shard", "row_group", "rows", "slots"))
    shards, numbers, rows, slots = (column.astype(np.int64) for column in columns)
    chosen = np.flatnonzero(np.isin(shards, todo) & (slots > 0))
    first_rows = np.cumsum(rows) - rows
    first_rows -= first_rows[np.searchsorted(shards, shards)]  # within the shard
    return _Units(shards[chosen], numbers[chosen], first_rows[chosen], slots[chosen])


def _collect(reports: Iterator[StoreReport], units: _Units, parts: Parts, rates: Stopwatch, label: str) -> None:
    """Start each shard's part as soon as all of its fragments are stored."""
    units_left = np.bincount(units.shard)  # by shard
    rows_left: dict[int, int] = {}  # by unit, of those of which a block has been stored
    fragments: dict[int, list[Fragment]] = defaultdict(list)  # by shard
    with progress.bar(label, int(units.slots.sum()), "pairs") as advance:
        for report in reports:
            unit = report["unit"]
            shard = int(units.shard[unit])
            rates.add(report)
            fragments[shard].append(Fragment(report["first_row"], report["path"]))
            rows_left[unit] = rows_left.get(unit, report["unit_rows"]) - report["rows"]
            if rows_left[unit]:
                continue
            del rows_left[unit]
            advance(int(units.slots[unit]), note=rates.note())
            units_left[shard] -= 1
            if not units_left[shard]:
                parts.write(shard, fragments.pop(shard))


def _n_actors(spec: Reference) -> int:
    """How many actors embed; 0 where this process embeds."""
    plain = spec.n_actors is None and not spec.gpus_per_actor and not spec.compile
    if plain and cluster.is_local() and cluster.n_cores() <= _FEW_CORES:
        return 0
    return spec.n_actors or cluster.n_workers(spec.gpus_per_actor)


def _embed_by_actors(
    n_actors: int, n_most: int, decoded: ray.data.Dataset, run: Run, spec: Reference, session: str
) -> Iterator[StoreReport]:
    """Embed and store blocks anywhere on the cluster; returns their reports. n_most: actors, if the cluster grows."""
    n_threads = max(1, cluster.n_cores() // n_actors)
    stage = decoded.map_batches(
        Embedder,
        fn_constructor_args=(run_file.dump(run), spec.model_dump_json(), n_threads),
        batch_size=spec.batch_size if spec.gpus_per_actor else None,  # whole blocks, but Ray wants a number for GPUs
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=n_actors, max_size=n_most),
        num_cpus=1,
        num_gpus=spec.gpus_per_actor,
    ).map_batches(store, batch_size=None, batch_format="pyarrow", fn_args=(session,))  # type: ignore[arg-type]
    yield from cast(Iterator[StoreReport], stage.iter_rows())


def _embed_here(decoded: ray.data.Dataset, run: Run, spec: Reference, session: str) -> Iterator[StoreReport]:
    """The same in threads of this process, one for each core; each embeds a block alone and waits for no other."""
    n, before = cluster.n_cores(), torch.get_num_threads()
    embedders: SimpleQueue[Embedder] = SimpleQueue()
    for _ in range(n):
        embedders.put(Embedder(run_file.dump(run), spec.model_dump_json()))

    def embed(block: pa.Table) -> list[StoreReport]:
        embedder = embedders.get()
        try:
            reports: list[StoreReport] = store(embedder(block), session).to_pylist()
        finally:
            embedders.put(embedder)
        return reports

    under_way: deque[Future[list[StoreReport]]] = deque()
    try:
        with ThreadPoolExecutor(n, "embed", initializer=partial(torch.set_num_threads, 1)) as pool:
            for block in decoded.iter_batches(batch_size=None, batch_format="pyarrow"):
                under_way.append(pool.submit(embed, block))
                if len(under_way) > n:
                    yield from under_way.popleft().result()
            for left in under_way:
                yield from left.result()
    finally:
        torch.set_num_threads(before)  # PyTorch gives threads that start later what was set last
