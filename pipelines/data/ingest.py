"""Lists of URLs -> image shards: rules on their metadata first, then img2dataset, a Ray task for each shard.

<shards>/ has what img2dataset writes: tars with the metadata of all rows beside them, or Parquet; and, written last,
NNNNN_stats.json, which marks a shard as done. urls/ has the list of each shard, and what the rules dropped.
"""

import importlib.util
import json
import os
import tempfile
from collections import Counter, defaultdict
from functools import partial
from typing import TypedDict

import pyarrow as pa
import ray

from jest_core import run_file
from jest_core.run_file import Run

from ..base import cluster, growth, in_parallel, manifests, owner, progress, shard_paths, storage
from . import fetch, outcomes, rules, url_lists
from .layouts import open_shard
from .outcomes import Stats

STAGE = "ingest"
_ENOUGH = 10_000  # URLs of which one at least is fetched, unless something is wrong that more of them would not mend
_FEW = 0.1  # share of URLs fetched below which the end of the stage warns


class Pass(TypedDict):
    """One pass over URLs. urls: asked for. reasons: how many URLs had each outcome, the 20 most frequent; `success` is
    a picture."""

    urls: int
    reasons: dict[str, int]


class Manifest(manifests.Manifest[manifests.Config]):
    """The manifest of a finished ingest.

    config: `urls`, SHA-256 in hex of the paths and sizes of the files of URLs; `lists`, a hash of each list that a rule
    names; and the settings of the run file's `ingest` that decide which pictures there are, and how they look. rows:
    rows of the metadata that are kept, and that each rule dropped. shards: how many. passes: the first over all kept
    rows, each further one over what the one before could not fetch.
    """

    rows: dict[str, int]
    shards: int
    passes: list[Pass]


@owner.until_return
def run_stage(run: Run, *, retry_failed: bool = False) -> Manifest:
    """Fetch the pictures of the URLs that the rules keep, into shards; returns the manifest.

    A second run does the shards that are missing. retry_failed: afterwards, fetch again what could not be fetched, into
    further shards; pictures whose owners opted out are not asked for again.
    """
    if run.ingest is None:
        raise ValueError("the run file has no `ingest` part, so there is nothing to fetch: add one, with ingest.urls")
    if importlib.util.find_spec("img2dataset") is None:
        raise ValueError("`jest ingest` fetches with img2dataset: pip install jest[ingest]")
    spec, directory = run.ingest, run.path(run.ingest.shards)
    patterns = run_file.sources(spec.urls)
    paths = [path for pattern in patterns for path in shard_paths.expand([pattern], run.path(""))]
    url_lists.refuse_columns(open_shard(paths[0], spec.columns), spec)
    config = _config(run, paths)
    _refuse_another_download(directory)
    finished = _begin(directory, config)
    if finished is None:
        cluster.connect()
        url_lists.write(run, directory, paths)
    if not url_lists.names(directory):
        _refuse_no_rows(directory)
    missing = _missing(directory)
    if finished is not None and not missing and not retry_failed:
        progress.say(STAGE, f"already at {directory}: {summary(finished)}")
        return finished
    owner.claim(directory)
    cluster.connect()
    _fetch_shards(run, directory, missing)
    if retry_failed:
        url_lists.write_failed(directory, spec.rows_per_shard)
        _fetch_shards(run, directory, _missing(directory))
    manifest = _manifest(directory, config)
    reasons = sum((Counter(each["reasons"]) for each in manifest["passes"]), Counter[str]())
    outcomes.refuse_nothing_fetched(reasons, manifest["rows"]["kept"])
    manifest = manifests.finish(directory, manifest)
    few = _fetched(manifest) < _FEW * manifest["rows"]["kept"] or reasons[outcomes.NOT_STORED]
    (progress.warn if few else progress.say)(STAGE, summary(manifest))
    for reason, n in manifest["passes"][-1]["reasons"].items():
        progress.say(STAGE, f"{n:,} {reason}")
    return manifest


def _fetched(manifest: Manifest) -> int:
    return sum(each["reasons"].get("success", 0) for each in manifest["passes"])


def _refuse_another_download(directory: str) -> None:
    """Raises ValueError where a folder has files of another download, which would be taken for this one's."""
    others = [name for name in storage.names(directory) if name.endswith((".tar", ".parquet", "_stats.json"))]
    if others and not manifests.exists(directory):
        raise ValueError(
            f"{directory} has files of another download ({others[0]}, {len(others):,} in all), and no {manifests.NAME} "
            "of `jest ingest`: name another directory in ingest.shards; shards that are there need no ingest"
        )


def _begin(directory: str, config: manifests.Config) -> Manifest | None:
    """The manifest of a finished ingest. A directory that no list is in yet may be begun with another configuration;
    one of an earlier version does not say what its rules' lists were."""
    return manifests.begin(
        directory,
        STAGE,
        config,
        Manifest,
        today=lambda old: {"lists": config["lists"], **old},
        extends=lambda *_: not storage.names(f"{directory}/urls"),
    )


def _refuse_no_rows(directory: str) -> None:
    """Raises ValueError with what dropped the rows, and leaves nothing that the next try would take for its own."""
    rows = url_lists.read_audit(directory)
    storage.remove_tree(f"{directory}/urls")
    dropped = ", ".join(f"{name} {n:,}" for name, n in rows.items() if n) or "nothing: there is none"
    raise ValueError(
        f"ingest.rules keep no row of the files that ingest.urls names (dropped by {dropped}): correct ingest.urls, "
        "ingest.columns or ingest.rules"
    )


def summary(manifest: Manifest) -> str:
    """A finished ingest in one line."""
    rows, passes, fetched = manifest["rows"], manifest["passes"], _fetched(manifest)
    dropped = ", ".join(f"{name} {n:,}" for name, n in rows.items() if name != "kept" and n)
    return (
        f"{fetched:,} of {rows['kept']:,} pictures fetched into {manifest['shards']:,} shards, {len(passes)} "
        f"pass(es); dropped before by {dropped or 'no rule'}"
    )


def _config(run: Run, paths: list[str]) -> manifests.Config:
    """What decides which pictures there are, and how they look; how they are fetched may change between tries."""
    assert run.ingest is not None
    looks = {"columns", "rules", "output_format", "rows_per_shard", "image_size", "resize_mode"}
    looks |= {"resize_only_if_bigger", "encode_format", "encode_quality", "blur_boxes", "verify_hash", "opt_out"}
    lists = storage.fingerprint([(path, storage.size(path)) for path in paths])
    versions = rules.list_versions(url_lists.with_own_rules(run))
    return {"urls": lists, "lists": versions, **run.ingest.model_dump(mode="json", include=looks)}


def _missing(directory: str) -> list[tuple[int, str]]:
    """Number and list of each shard that is not fetched."""
    done = set(storage.names(directory, "_stats.json"))
    return [(i, name) for i, name in enumerate(url_lists.names(directory)) if f"{i:05d}_stats.json" not in done]


def _fetch_shards(run: Run, directory: str, todo: list[tuple[int, str]]) -> None:
    if not todo or run.ingest is None:
        return
    fixed, text = run.ingest.n_tasks, run_file.dump(run)
    n_tasks = cluster.n_tasks(fixed)
    grows = fixed is None and cluster.grows()
    progress.say(STAGE, f"{len(todo):,} shards to fetch, {min(n_tasks(), len(todo)):,} at once")
    start, reasons = ray.remote(num_cpus=1, max_retries=3)(owner.carried(fetch_shard)), Counter[str]()
    jobs = ((text, directory, number, name, n_tasks(), grows) for number, name in todo)
    with progress.bar(STAGE, len(todo), "shards") as advance:
        for stats in in_parallel.ray_tasks(start.remote, jobs, n_tasks):
            reasons.update(outcomes.reasons_of(stats))
            advance(1, note=f"{reasons['success']:,} of {reasons.total():,} URLs fetched")
            if reasons.total() >= _ENOUGH:
                outcomes.refuse_nothing_fetched(reasons, reasons.total())


def fetch_shard(run_text: str, directory: str, number: int, name: str, n_tasks: int, grows: bool) -> Stats:
    """Fetch one shard into a local folder, then copy it to the storage, its statistics last.

    n_tasks: how many fetch at once. grows: the cluster may grow meanwhile, and their number with it.
    """
    spec = run_file.load(run_text).ingest
    assert spec is not None
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    # Of formats that Pillow does not know; OpenCV reads it when it is imported
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(spec.max_pixels)
    from img2dataset.blurrer import BoundingBoxBlurrer
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import ParquetSampleWriter, WebDatasetSampleWriter

    rows = storage.retried(storage.open_parquet)(f"{directory}/urls/{name}").read()
    resizer = Resizer(
        spec.image_size,
        spec.resize_mode,
        spec.resize_only_if_bigger,
        encode_quality=spec.quality,
        encode_format=spec.encode_format,
        blurrer=BoundingBoxBlurrer() if spec.blur_boxes else None,
    )
    with tempfile.TemporaryDirectory() as folder, fetch.bounded(spec, n_tasks, growth.n_cpus if grows else None):
        with pa.ipc.new_file(f"{folder}/urls.arrow", rows.schema) as file:
            file.write_table(rows)
        Downloader(
            WebDatasetSampleWriter if spec.output_format == "webdataset" else ParquetSampleWriter,
            fetch.bounded_pixels(resizer, spec),
            thread_count=spec.threads,
            save_caption=True,
            extract_exif=False,
            output_folder=folder,
            column_list=rows.column_names,
            timeout=spec.timeout_seconds,
            number_sample_per_shard=spec.rows_per_shard,
            oom_shard_count=5,
            compute_hash=url_lists.HASH,
            verify_hash_type=url_lists.HASH if spec.verify_hash else None,
            encode_format=spec.encode_format,
            retries=spec.retries,
            user_agent_token=spec.user_agent_token,
            disallowed_header_directives=spec.opt_out,
            blurring_bbox_col=spec.blur_boxes,
        ).download_shard((number, f"{folder}/urls.arrow"))
        for suffix in (".tar", ".parquet"):
            if os.path.exists(local := f"{folder}/{number:05d}{suffix}"):
                storage.retried(storage.upload)(local, f"{directory}/{number:05d}{suffix}")
        with open(f"{folder}/{number:05d}_stats.json") as file:
            stats: Stats = json.load(file)
        stats = outcomes.corrected(stats, _n_stored(f"{folder}/{number:05d}", spec))
        storage.retried(storage.write_json)(f"{directory}/{number:05d}_stats.json", stats)
        return stats


def _n_stored(shard: str, spec: run_file.Ingest) -> int:
    """How many pictures a fetched shard has, given without the suffix of its file."""
    opened = open_shard(f"{shard}.tar" if spec.output_format == "webdataset" else f"{shard}.parquet")
    images = (opened.images(i) for i in range(len(opened.row_group_sizes)))
    return sum(len(each) - int(each.null_count) for each in images)


def _manifest(directory: str, config: manifests.Config) -> Manifest:
    """The manifest of all lists and shards, which are read for it."""
    lists = url_lists.names(directory)
    reasons: dict[int, Counter[str]] = defaultdict(Counter)
    for name, stats in zip(lists, in_parallel.read_each(partial(_stats, directory), range(len(lists))), strict=True):
        reasons[url_lists.pass_of(name)].update(outcomes.reasons_of(stats))
    return {
        "stage": STAGE,
        "complete": True,
        "config": config,
        "rows": url_lists.read_audit(directory),
        "shards": len(lists),
        "passes": [{"urls": reasons[i].total(), "reasons": dict(reasons[i].most_common(20))} for i in sorted(reasons)],
    }


def _stats(directory: str, number: int) -> Stats:
    stats: Stats = storage.read_json(f"{directory}/{number:05d}_stats.json")
    return stats
