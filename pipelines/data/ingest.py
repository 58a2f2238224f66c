"""Lists of URLs -> image shards: rules on their metadata first, then img2dataset, a Ray task for each shard.

The shards' directory holds what img2dataset writes: tars with the metadata of all rows beside them, or Parquet; and
NNNNN_stats.json, which comes last and marks a shard as done. urls/ holds the list of each, and the audit of the rules.
"""

import importlib.util
import json
import math
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from jest_core import run_file
from jest_core.run_file import Ingest, Run

from ..base import cluster, progress, storage
from . import fetch, rules
from .layouts import open_shard
from .shards import ALIASES, Shard

STAGE = "ingest"
_OPTED_OUT = "Use of image disallowed by X-Robots-Tag directive"  # in img2dataset's words
# What img2dataset writes of each row itself
_OWN = {"key", "caption", "url", "status", "error_message", "width", "height", "original_width", "original_height"}
_OWN |= {"exif", "md5", "sha256", "sha512", "uid", "txt", "json"}
_HASH = "sha256"
_READS_AT_ONCE = 32
T = TypeVar("T")


def run_stage(run: Run, *, retry_failed: bool = False) -> dict[str, Any]:
    """Fetch what the lists name and the rules keep, into shards; returns the manifest.

    A second run does the shards that are missing. retry_failed: afterwards, what could not be fetched is tried again,
    and what comes this time makes further shards; pictures whose owners opted out are not asked for again.
    """
    if run.ingest is None:
        raise ValueError("the run file has no `ingest` part: nothing to fetch")
    if importlib.util.find_spec("img2dataset") is None:
        raise ValueError("`jest ingest` fetches with img2dataset: pip install jest[ingest]")
    spec, directory = run.ingest, run.path(run.ingest.shards)
    patterns = run_file.sources(spec.urls)
    paths = [path for pattern in patterns for path in storage.expand([pattern], run.path(""))]
    _refuse_columns(open_shard(paths[0], spec.columns), spec)
    config = _config(run, paths)
    known = storage.begin(directory, STAGE, config)
    if known is None:
        cluster.connect()
        _list_urls(run, directory, paths)
    if not _lists(directory):
        raise ValueError(f"ingest.urls names nothing to fetch that ingest.rules keep; {directory}/urls has the audit")
    missing = _missing(directory)
    if known is not None and not missing and not retry_failed:
        progress.say(STAGE, f"already at {directory}: {summary(known)}")
        return known
    cluster.connect()
    _fetch_shards(run, directory, missing)
    if retry_failed:
        _list_failed(directory, spec.rows_per_shard)
        _fetch_shards(run, directory, _missing(directory))
    manifest = storage.finish(directory, STAGE, config, **_results(directory))
    progress.say(STAGE, summary(manifest))
    for why, n in manifest["passes"][-1]["reasons"].items():
        progress.say(STAGE, f"{n:,} {why}")
    return manifest


def summary(manifest: dict[str, Any]) -> str:
    """A finished ingest in one line."""
    rows, passes = manifest["rows"], manifest["passes"]
    fetched = sum(each["reasons"].get("success", 0) for each in passes)
    dropped = ", ".join(f"{name} {n:,}" for name, n in rows.items() if name != "kept" and n)
    return (
        f"{fetched:,} of {rows['kept']:,} pictures fetched into {manifest['shards']:,} shards, {len(passes)} "
        f"pass(es); dropped before by {dropped or 'no rule'}"
    )


def _config(run: Run, paths: list[str]) -> dict[str, Any]:
    """What decides which pictures there are, and how they look; how they are fetched may change between tries."""
    assert run.ingest is not None
    looks = {"columns", "rules", "output_format", "rows_per_shard", "image_size", "resize_mode"}
    looks |= {"resize_only_if_bigger", "encode_format", "encode_quality", "blur_boxes", "verify_hash", "opt_out"}
    lists = storage.fingerprint([(path, storage.size(path)) for path in paths])
    return {"urls": lists, **run.ingest.model_dump(mode="json", include=looks)}


# The lists: one for each shard


def _list_urls(run: Run, directory: str, paths: list[str]) -> None:
    """The rows that the rules keep, in lists of rows_per_shard; NNNNN.json, the audit, comes last."""
    done = storage.names(f"{directory}/urls", ".json")
    todo = [i for i in range(len(paths)) if f"{i:05d}.json" not in done]
    text = run_file.dump(run)
    with progress.bar(f"{STAGE} (lists)", len(todo), "files") as advance:
        for _ in _at_once([(_list_file, (text, paths[i], f"{directory}/urls/{i:05d}")) for i in todo], None):
            advance(1)


@ray.remote(num_cpus=1)
def _list_file(run_text: str, path: str, prefix: str) -> None:
    run = run_file.load(run_text)
    assert run.ingest is not None
    spec = run.ingest
    asked = run.model_copy(update={"data": run.data.model_copy(update={"rules": spec.rules})})
    lists, audit = rules.load_lists(asked), Counter(dict.fromkeys(("kept", "url"), 0))
    shard = open_shard(path, spec.columns)

    def kept() -> Iterator[pa.Table]:
        for row_group in range(len(shard.row_group_sizes)):
            rows = _rows(shard, row_group, spec)
            keep = np.array([bool(re.match("https?://", url)) for url in rows["url"].to_pylist()], dtype=bool)
            audit["url"] += int((~keep).sum())
            for rule in spec.rules:
                by_rule = rules.apply(rule, shard, row_group, rows["uid"].to_pylist(), lists) > 0
                audit[rule.rule] += int((keep & ~by_rule).sum())
                keep &= by_rule
            audit["kept"] += int(keep.sum())
            yield rows.filter(pa.array(keep))

    _write_lists(kept(), prefix, spec.rows_per_shard)
    storage.write_json(f"{prefix}.json", dict(audit))


def _rows(shard: Shard, row_group: int, spec: Ingest) -> pa.Table:
    """uid, url and caption by those names, and the metadata's other columns by their own."""
    used = {shard.actual(name) for name in ("uid", "url", "caption")}
    others = sorted(shard.names - used - _OWN - set(ALIASES["image"]))
    rows = shard.table(row_group, others) if others else pa.table({})
    plain = [field.name for field in rows.schema if not pa.types.is_binary(field.type)]
    rows = rows.select(plain)
    columns: dict[str, Any] = {
        "uid": shard.uids(row_group),
        "url": [url.strip() for url in shard.strings(row_group, "url")],
        "caption": shard.captions(row_group),
    }
    _refuse_columns(shard, spec)
    if spec.verify_hash:
        columns[_HASH] = shard.strings(row_group, _HASH)
    return pa.table({**columns, **{name: rows[name] for name in plain}})


def _refuse_columns(shard: Shard, spec: Ingest) -> None:
    """Raises ValueError where the metadata lacks a column that fetching needs."""
    needed = {
        "ingest.columns": [spec.columns.get(name, name) for name in ("url", "caption") if shard.actual(name) is None],
        "ingest.verify_hash": [_HASH] if spec.verify_hash else [],
        "ingest.blur_boxes": [spec.blur_boxes] if spec.blur_boxes else [],
    }
    for setting, names in needed.items():
        if missing := [name for name in names if name not in shard.names]:
            raise ValueError(
                f"{shard.path} has no column {', '.join(missing)}; it has {', '.join(sorted(shard.names))}: correct "
                f"{setting}"
            )


def _write_lists(tables: Iterator[pa.Table], prefix: str, size: int) -> int:
    """Tables -> prefix-NNNNN.parquet of `size` rows each, the last fewer; returns how many."""
    held: list[pa.Table] = []
    n = 0
    for table in tables:
        held.append(table)
        while sum(map(len, held)) >= size:
            whole = _joined(held)
            storage.write_table(f"{prefix}-{n:05d}.parquet", whole.slice(0, size))
            held, n = [whole.slice(size)], n + 1
    if sum(map(len, held)):
        storage.write_table(f"{prefix}-{n:05d}.parquet", _joined(held))
        n += 1
    return n


def _joined(tables: list[pa.Table]) -> pa.Table:
    """Parts of a data set may have a column in several types."""
    return pa.concat_tables(tables, promote_options="permissive")


def _lists(directory: str) -> list[str]:
    """Names of all lists, in the order of their shards' numbers: those of a file or pass that is not listed to its end
    do not count."""
    names = storage.names(f"{directory}/urls")
    whole = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    return [name for name in names if name.endswith(".parquet") and name.rpartition("-")[0] in whole]


def _list_failed(directory: str, size: int) -> None:
    """What the latest pass could not fetch, as the lists of a further one. Who opted out is not asked again."""
    lists = _lists(directory)
    latest = max(map(_pass, lists), default=0)
    numbers = [i for i, name in enumerate(lists) if _pass(name) == latest]

    def failed(number: int) -> pa.Table:
        rows = storage.open_parquet(f"{directory}/urls/{lists[number]}").read()
        told = storage.open_parquet(f"{directory}/{number:05d}.parquet").read(["key", "status", "error_message"])
        opted_out = pc.equal(pc.fill_null(told["error_message"], ""), _OPTED_OUT)
        settled = told.filter(pc.or_(pc.not_equal(told["status"], "failed_to_download"), opted_out))
        numbers_of_rows = [int(key) % 10 ** math.ceil(math.log10(size)) for key in settled["key"].to_pylist()]
        again = np.ones(len(rows), dtype=bool)  # those too of which img2dataset says nothing
        again[numbers_of_rows] = False
        return rows.filter(pa.array(again))

    prefix = f"{directory}/urls/retry-{latest + 1:03d}"
    if n := _write_lists(_each(failed, numbers), prefix, size):
        storage.write_json(f"{prefix}.json", {"lists": n})


def _pass(name: str) -> int:
    """Of a list: 0 for the first pass, 1 for what it could not fetch, and so on."""
    return int(name.split("-")[1]) if name.startswith("retry-") else 0


def _each(function: Callable[[int], T], numbers: Sequence[int]) -> Iterator[T]:
    """function of each number, in order, some at a time."""
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for start in range(0, len(numbers), 1_000):  # no more are held at once
            yield from pool.map(storage.retried(function), numbers[start : start + 1_000])


# The shards


def _missing(directory: str) -> list[tuple[int, str]]:
    """Numbers and lists of the shards that are not fetched."""
    done = set(storage.names(directory, "_stats.json"))
    return [(i, name) for i, name in enumerate(_lists(directory)) if f"{i:05d}_stats.json" not in done]


def _fetch_shards(run: Run, directory: str, todo: list[tuple[int, str]]) -> None:
    if not todo or run.ingest is None:
        return
    n_tasks, text = run.ingest.n_tasks or cluster.n_workers(0), run_file.dump(run)
    progress.say(STAGE, f"{len(todo):,} shards to fetch, {n_tasks} at once")
    fetched, asked = 0, 0
    jobs = [(_fetch, (text, directory, number, name, n_tasks)) for number, name in todo]
    with progress.bar(STAGE, len(todo), "shards") as advance:
        for stats in _at_once(jobs, n_tasks):
            fetched, asked = fetched + stats["successes"], asked + stats["count"]
            advance(1, note=f"{fetched:,} of {asked:,} URLs came")


@ray.remote(num_cpus=1, max_retries=3)
def _fetch(run_text: str, directory: str, number: int, name: str, n_tasks: int) -> dict[str, Any]:
    """One shard, made on this machine and then copied: its statistics come last."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    from img2dataset.blurrer import BoundingBoxBlurrer
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import ParquetSampleWriter, WebDatasetSampleWriter

    spec = run_file.load(run_text).ingest
    assert spec is not None
    rows = storage.retried(storage.open_parquet)(f"{directory}/urls/{name}").read()
    resizer = Resizer(
        spec.image_size,
        spec.resize_mode,
        spec.resize_only_if_bigger,
        encode_quality=spec.quality,
        encode_format=spec.encode_format,
        blurrer=BoundingBoxBlurrer() if spec.blur_boxes else None,
    )
    with tempfile.TemporaryDirectory() as folder, fetch.bounded(spec, n_tasks):
        with pa.ipc.new_file(f"{folder}/urls.arrow", rows.schema) as file:
            file.write_table(rows)
        Downloader(
            WebDatasetSampleWriter if spec.output_format == "webdataset" else ParquetSampleWriter,
            resizer,
            thread_count=spec.threads,
            save_caption=True,
            extract_exif=False,
            output_folder=folder,
            column_list=rows.column_names,
            timeout=spec.timeout_seconds,
            number_sample_per_shard=spec.rows_per_shard,
            oom_shard_count=5,
            compute_hash=_HASH,
            verify_hash_type=_HASH if spec.verify_hash else None,
            encode_format=spec.encode_format,
            retries=spec.retries,
            user_agent_token=spec.user_agent_token,
            disallowed_header_directives=spec.opt_out,
            blurring_bbox_col=spec.blur_boxes,
        ).download_shard((number, f"{folder}/urls.arrow"))
        for suffix in (".tar", ".parquet", "_stats.json"):
            if os.path.exists(local := f"{folder}/{number:05d}{suffix}"):
                storage.retried(storage.upload)(local, f"{directory}/{number:05d}{suffix}")
        with open(f"{folder}/{number:05d}_stats.json") as stats:
            return dict(json.load(stats))


def _results(directory: str) -> dict[str, Any]:
    """Rows by the rule that dropped them, and for each pass what became of its URLs."""
    rows: Counter[str] = Counter()
    for name in storage.names(f"{directory}/urls", ".json"):
        if not name.startswith("retry-"):
            rows.update(storage.read_json(f"{directory}/urls/{name}"))
    lists = _lists(directory)
    reasons: dict[int, Counter[str]] = defaultdict(Counter)
    stats = _each(lambda number: storage.read_json(f"{directory}/{number:05d}_stats.json"), range(len(lists)))
    for name, each in zip(lists, stats, strict=True):
        for message, n in each["status_dict"].items():
            reasons[_pass(name)][_reason(message)] += n
    passes = [{"urls": reasons[i].total(), "reasons": dict(reasons[i].most_common(20))} for i in sorted(reasons)]
    return {"rows": dict(rows), "shards": len(lists), "passes": passes}


def _reason(message: str) -> str:
    """What img2dataset tells of a picture, without what only that picture has."""
    text = re.sub(r"<urlopen error (.*)>", r"\1", message)
    return re.sub(r"<(\S+) object at 0x[0-9a-f]+>", r"\1", text).strip()[:80]


def _at_once(jobs: Sequence[tuple[Any, tuple[Any, ...]]], n: int | None) -> Iterator[Any]:
    """Results of Ray tasks as they come, of which no more than n are under way."""
    n = n or cluster.n_workers(0)
    under_way: list[Any] = []
    for task, arguments in jobs:
        under_way.append(task.remote(*arguments))
        if len(under_way) >= n:
            done, under_way = ray.wait(under_way)
            yield from ray.get(done)
    while under_way:
        done, under_way = ray.wait(under_way)
        yield from ray.get(done)
