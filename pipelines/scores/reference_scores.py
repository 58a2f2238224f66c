"""Catalogue + reference model -> score cache: every kept pair embedded once, one part per shard.

Ray Data reads and decodes in tasks, embeds in an actor pool, and stores fragments; on a machine of few cores this
process embeds. When a shard's fragments are complete they become its part. What is cached are embeddings, because the
loss of a pair depends on which others are in the batch.
"""

import time
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from numpy.typing import NDArray

from jest_core import run_file, tables
from jest_core.choices import LOSSES
from jest_core.models import configurations, scorers, towers
from jest_core.models.flexible import Resolution
from jest_core.models.scorers import Batch
from jest_core.models.towers import Towers
from jest_core.run_file import Reference, Run
from jest_core.selection.learnability import matched_losses
from jest_core.tables import SlotStatus
from pipelines.base import blocks, checkpoints, cluster, progress, storage
from pipelines.base.stopwatch import Stopwatch
from pipelines.data import needs
from pipelines.data.catalogue import Catalogue, open_catalogue
from pipelines.data.rows import kept, of_row_group
from pipelines.scores import calibration, imported, score_cache

_ROUNDING = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-3}  # of 1 - cosine, between two machines
_FEW_CORES = 4  # on which this process embeds: an actor each would import PyTorch first, which takes seconds
_MOST_TASKS = 5_000  # of reading: each takes row groups that follow each other, and Ray keeps a record of each
_BLOCK_BYTES = 32 << 20  # of pixels that travel together, or one batch where that is more


def run_stage(run: Run) -> dict[str, Any]:
    """Write the score cache of the run's catalogue by its reference; returns the manifest.

    A second run does the shards that are missing; a directory made by another reference or catalogue is refused.
    """
    needs.reference_scores(run)
    assert run.reference is not None
    return score(run, run.reference)


def score(run: Run, spec: Reference, label: str = score_cache.STAGE) -> dict[str, Any]:
    """The same by any model: `jest select` scores with the learner's checkpoint too."""
    catalogue = open_catalogue(run.path(run.data.catalogue))
    if spec.features is not None:
        return imported.run_stage(run, spec, catalogue)
    reference = load_reference(run, spec)
    config = _config(spec, catalogue, reference)
    directory = run.path(spec.scores)
    if (manifest := storage.begin(directory, score_cache.STAGE, config)) is not None:
        progress.say(label, f"already at {directory}: {score_cache.summary(manifest)}")
        return manifest
    todo = score_cache.missing(directory, catalogue)
    progress.say(
        label,
        f"{reference.name} embeds the kept pairs of {len(catalogue.shards):,} shards "
        f"({len(catalogue.shards) - len(todo):,} done)",
    )
    cluster.connect()
    cluster.data_context()
    if len(todo):
        _embed_shards(run, spec, catalogue, todo, config, label)
    manifest = calibration.finish(run, directory, catalogue, config)
    progress.say(label, score_cache.summary(manifest))
    return manifest


def load_reference(run: Run, spec: Reference) -> Towers:
    """A reference model with the weights of its checkpoint or its pretrained tag, in evaluation mode."""
    towers.refuse_resolution(spec.model, "reference.score_", spec.score_image_size, spec.score_patch_size)
    reference = towers.build(spec.model, seed=0)
    if spec.checkpoint is not None:
        towers.load_weights(reference, checkpoints.read(run.path(spec.checkpoint)))
    reference.model.eval()
    return reference


def verify(run: Run, n_pairs: int = 256) -> None:
    """Embed a sample of a finished cache again, and compare. Raises ValueError where more than rounding differs."""
    if run.reference is None or run.reference.features is not None:
        raise ValueError("--verify embeds again, which needs a `reference` part with a model")
    spec, catalogue = run.reference, open_catalogue(run.path(run.data.catalogue))
    directory, reference = run.path(spec.scores), load_reference(run, spec)
    score_cache.opened(directory)
    storage.begin(directory, score_cache.STAGE, _config(spec, catalogue, reference))
    groups = catalogue.row_groups.filter(pc.greater(catalogue.row_groups["slots"], 0))
    generator, left = np.random.default_rng(run.seed), n_pairs
    furthest = {"image": 0.0, "text": 0.0, "loss": 0.0}
    for i in generator.permutation(len(groups)):
        shard, number = (groups[name][int(i)].as_py() for name in ("shard", "row_group"))
        place = catalogue.place(shard)
        rows, _, captions, images = kept(run, shard, number)
        picked = np.sort(generator.permutation(len(rows))[: min(left, 1 + n_pairs // 8)])
        columns = ["status", "image_embedding", "text_embedding", "matched_pair_loss"]
        cached = score_cache.read(directory, place, number, place.rows(number)[0], columns)
        cached = cached.take(pa.array(rows[picked]))
        pixels, status = reference.view.batch(images.take(pa.array(picked)).to_pylist())
        if cached["status"].to_pylist() != tables.status_labels(status):
            raise ValueError(f"{place.path}, row group {number}: other pictures decode than in {directory}")
        tokens = reference.tokens([captions[j] for j in picked])
        found = reference.embed(
            torch.from_numpy(pixels),
            tokens,
            batch_size=spec.batch_size,
            resolution=_resolution(spec, reference),
            precision=spec.precision,
        )
        ok = status == SlotStatus.OK
        for side, new in (("image", found.image), ("text", found.text)):
            old = blocks.unpack(cached[f"{side}_embedding"]).astype(np.float32)
            distances = 1 - (old * new.numpy()).sum(1)[ok] / np.maximum(np.linalg.norm(old, axis=1)[ok], 1e-12)
            furthest[side] = max(furthest[side], float(distances.max(initial=0.0)))
        losses = matched_losses(found, reference.loss).numpy() - cached["matched_pair_loss"].to_numpy()
        furthest["loss"] = max(furthest["loss"], float(np.abs(losses[ok]).max(initial=0.0)))
        left -= len(picked)
        if not left:
            break
    told = (
        f"{n_pairs - left} pairs embedded again: 1 - cosine to what is cached is at most {furthest['image']:.1e} "
        f"(image) and {furthest['text']:.1e} (text), the matched-pair loss differs by at most {furthest['loss']:.1e}"
    )
    if max(furthest["image"], furthest["text"]) > _ROUNDING[spec.precision]:
        raise ValueError(f"{directory} is not what {reference.name} gives: {told}")
    progress.say(score_cache.STAGE, told)


def _resolution(spec: Reference, reference: Towers) -> Resolution:
    return reference.resolution(spec.score_image_size, spec.score_patch_size)


def _other_resolution(spec: Reference, reference: Towers) -> dict[str, str]:
    """Where the reference does not look at its own."""
    seen = _resolution(spec, reference)
    if seen == reference.resolution():
        return {}
    return {"resolution": f"{seen.image_size} pixels" + (f", patches of {seen.patch_size}" if seen.patch_size else "")}


def _config(spec: Reference, catalogue: Catalogue, reference: Towers) -> dict[str, Any]:
    """What decides the cache's content: another value of these makes another cache."""
    return {
        "catalogue": catalogue.manifest["fingerprint"],
        "model": reference.name,
        "weights": towers.weights_hash(reference.model),
        "preprocessing": reference.inputs.fingerprint,
        **_other_resolution(spec, reference),
        "precision": f"{spec.precision} forward, float16 embeddings",
        "loss": reference.loss,
        "logit_scale": reference.scale_and_bias()[0],
        "logit_bias": reference.scale_and_bias()[1] if LOSSES[reference.loss].has_bias else spec.logit_bias,
        "width": configurations.width(reference.name),
        "scorers": [scorer.model_dump() for scorer in spec.scorers],
    }


def _embed_shards(
    run: Run, spec: Reference, catalogue: Catalogue, todo: NDArray[np.int64], config: dict[str, Any], label: str
) -> None:
    """Read and decode -> embed -> store fragments -> a part a shard, all at once on the cluster."""
    directory = run.path(spec.scores)
    groups = catalogue.row_groups.to_pydict()
    shards, numbers, rows, slots = (np.array(groups[n]) for n in ("shard", "row_group", "rows", "slots"))
    units = np.flatnonzero(np.isin(shards, todo) & (slots > 0))
    first_rows = np.cumsum(rows) - rows
    first_rows -= first_rows[np.searchsorted(shards, shards)]  # within the shard
    held = ray.put(np.stack([shards[units], numbers[units], first_rows[units]], 1))
    units_left = np.bincount(shards[units], minlength=len(catalogue.shards))
    rows_left: dict[int, int] = {}  # of units that are under way
    takes = configurations.inputs_of(spec.model)
    batch_bytes = 3 * takes.view.image_size**2 * spec.batch_size
    session = f"{directory}/fragments/{uuid.uuid4().hex}"  # of this run: another may write the same cache
    parts = score_cache.Parts(run, directory, config)
    for shard in todo[units_left[todo] == 0].tolist():
        parts.write(shard, [])
    n_actors = _n_actors(spec)
    # on one machine no more tasks than cores: each keeps one busy
    cluster.data_context(n_actors + cluster.n_cores() if cluster.is_local() else None)
    rates = Stopwatch(
        ("read", "decode", "embed", "write"), "embed", n_actors or cluster.n_cores(), shared=not spec.gpus_per_actor
    )
    if len(units):
        decoded = ray.data.range(len(units), override_num_blocks=min(len(units), _MOST_TASKS)).map_batches(
            of_row_group,  # type: ignore[arg-type]
            batch_size=1,
            fn_args=(held, run_file.dump(run), takes, spec.batch_size * max(1, _BLOCK_BYTES // batch_bytes)),
        )
        embed = partial(_embed_by_actors, n_actors) if n_actors else _embed_here
        reports = embed(decoded, run, spec, session)
        fragments: dict[int, list[tuple[int, str]]] = defaultdict(list)
        with progress.bar(label, int(slots[units].sum()), "pairs") as advance:
            for report in reports:
                unit = report["unit"]
                shard = int(shards[units[unit]])
                rates.add(report)
                fragments[shard].append((report["first_row"], report["path"]))
                rows_left[unit] = rows_left.get(unit, report["unit_rows"]) - report["rows"]
                if rows_left[unit]:
                    continue
                del rows_left[unit]
                advance(int(slots[units[unit]]), note=rates.note())
                units_left[shard] -= 1
                if not units_left[shard]:
                    parts.write(shard, fragments.pop(shard))
        progress.say(label, rates.summary())
    parts.wait()


def _n_actors(spec: Reference) -> int:
    """How many processes embed; 0 where this one does."""
    plain = spec.n_actors is None and not spec.gpus_per_actor and not spec.compile
    if plain and cluster.is_local() and cluster.n_cores() <= _FEW_CORES:
        return 0
    return spec.n_actors or cluster.n_workers(spec.gpus_per_actor)


def _embed_by_actors(n_actors: int, decoded: Any, run: Run, spec: Reference, session: str) -> Iterator[Any]:
    """Embed and store blocks anywhere on the cluster; reports of them."""
    n_threads = max(1, cluster.n_cores() // n_actors)
    stage = decoded.map_batches(
        _Embedder,
        fn_constructor_args=(run_file.dump(run), spec.model_dump_json(), n_threads),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=n_actors),
        num_cpus=1,
        num_gpus=spec.gpus_per_actor,
    ).map_batches(score_cache.store, batch_size=None, batch_format="pyarrow", fn_args=(session,))
    yield from stage.iter_rows()


def _embed_here(decoded: Any, run: Run, spec: Reference, session: str) -> Iterator[Any]:
    """The same in threads of this process, one a core; each computes by itself, so that none waits for another's."""
    n, before = cluster.n_cores(), torch.get_num_threads()
    embedders: SimpleQueue[_Embedder] = SimpleQueue()
    for _ in range(n):
        embedders.put(_Embedder(run_file.dump(run), spec.model_dump_json()))

    def embed(block: pa.Table) -> list[Any]:
        embedder = embedders.get()
        try:
            reports: list[Any] = score_cache.store(embedder(block), session).to_pylist()
        finally:
            embedders.put(embedder)
        return reports

    under_way: deque[Future[list[Any]]] = deque()
    try:
        with ThreadPoolExecutor(n, "embed", initializer=partial(torch.set_num_threads, 1)) as pool:
            for block in decoded.iter_batches(batch_size=None, batch_format="pyarrow"):
                under_way.append(pool.submit(embed, block))
                if len(under_way) > n:
                    yield from under_way.popleft().result()
            for left in under_way:
                yield from left.result()
    finally:
        torch.set_num_threads(before)  # for threads that begin later: PyTorch gives them what was set last


class _Embedder:
    """What holds the reference on its device: a block of decoded rows -> the cache's columns of them.

    n_threads: of an actor on CPUs, to which Ray would give one; where not given, as many as the process has.
    """

    def __init__(self, run_text: str, spec_text: str, n_threads: int | None = None) -> None:
        run, self.spec = run_file.load(run_text), Reference.model_validate_json(spec_text)
        self.reference = load_reference(run, self.spec)
        if self.spec.gpus_per_actor:
            self.reference.model.cuda()
        elif n_threads is not None:
            torch.set_num_threads(n_threads)
        if self.spec.compile:
            self.reference.compile()
        self.scorers = {s.name: scorers.create(s.scorer, _resolved(run, s.options)) for s in self.spec.scorers}

    def __call__(self, block: pa.Table) -> pa.Table:
        return pa.concat_tables(self._columns(part) for part in blocks.runs(block, "unit"))

    def _columns(self, block: pa.Table) -> pa.Table:
        began, started = time.time(), time.perf_counter()
        columns: dict[str, Any] = {name: block[name] for name in ("uid", "row", "status")}
        for name, value in self._embed(block).items():
            columns[name] = blocks.pack(value) if value.ndim > 1 else value
        table = pa.table(columns).cast(
            tables.score_cache(configurations.width(self.reference.name), list(self.scorers))
        )
        told = {name: block[name][0].as_py() for name in ("unit", "unit_rows", "shard", "read", "decode")}
        return blocks.tell(table, told | {"embed": time.perf_counter() - started, "began": began})

    def _embed(self, block: pa.Table) -> dict[str, NDArray[Any]]:
        """Embeddings and scores of a block's rows; zeros where the image did not decode."""
        size = self.reference.view.image_size
        status = np.array(block["status"].to_pylist(), dtype=object)
        ok = np.flatnonzero(status == SlotStatus.OK.label)
        pixels = torch.from_numpy(blocks.unpack(block["pixels"])[ok].reshape(-1, 3, size, size))
        found = self.reference.embed(
            pixels,
            torch.from_numpy(blocks.unpack(block["tokens"])[ok]),
            batch_size=self.spec.batch_size,
            resolution=_resolution(self.spec, self.reference),
            precision=self.spec.precision,
        )
        values = {
            "image_embedding": found.image.half().cpu().numpy(),
            "text_embedding": found.text.half().cpu().numpy(),
            "matched_pair_loss": matched_losses(found, self.reference.loss).float().cpu().numpy(),
            "cosine": (found.image * found.text).sum(1).cpu().numpy(),
        }
        if self.scorers:
            captions = block["caption"].to_pylist()
            batch = Batch(pixels, [captions[i] for i in ok], found.image, found.text)
            values |= {name: scorer(batch) for name, scorer in self.scorers.items()}
        out = {name: np.zeros((len(block), *value.shape[1:]), value.dtype) for name, value in values.items()}
        for name, value in values.items():
            out[name][ok] = value
        return out


def _resolved(run: Run, options: dict[str, Any]) -> dict[str, Any]:
    """A scorer's options; its path as every path of the run file."""
    return options | ({"path": run.path(options["path"])} if "path" in options else {})
