"""Real image-text pairs without a download site: a noisy pool, a curated set and evaluation sets of drawings.

Every picture is a rendering of a published icon, emoji or clip art, and every caption is what its package calls it;
nothing is generated. `noise` says what is wrong with a caption, so a selection can be measured against it. The shards
have img2dataset's parquet layout, so they enter jest the way web images do. Equal arguments give equal bytes.
"""

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from ...evaluation.sets import Class, ClassTask
from . import icons, packages
from .emoji import EmojiNames
from .icons import IconSet
from .names import as_words
from .packages import Plan
from .pictures import IMAGE_SIZE, Picture, batches, import_resvg, near_copies, render_rows
from .rows import Row, cut_to_plan, list_rows

# Order and types of img2dataset 1.47.0: additional columns, caption, url, its own columns, then the encoded image.
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("uid", "source", "licence", "kind", "lang", "noise")]
    + [("texts_alt", pa.list_(pa.string()))]
    + [(name, pa.string()) for name in ("concept", "group", "subgroup", "dup_group")]
    + [(name, pa.string()) for name in ("caption", "url", "key", "status", "error_message")]
    + [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    + [("exif", pa.string()), ("sha256", pa.string()), ("webp", pa.binary())]
)


class ShardFile(TypedDict):
    """A shard, in the manifest."""

    name: str
    rows: int
    bytes: int


class ShardStats(TypedDict):
    """img2dataset's _stats.json."""

    count: int
    successes: int
    failed_to_download: int
    failed_to_resize: int
    duration: float  # seconds
    start_time: float
    end_time: float
    status_dict: dict[str, int]


def build(tier: str, out: Path, *, raw: Path, seed: int = 0, n_workers: int | None = None) -> None:
    """Fetch what `tier` needs into `raw`, render its pairs and write the built tier to `out`, replacing it."""
    sources = packages.load_sources()
    if tier not in sources["tiers"]:
        raise ValueError(f"tier {tier!r} is unknown; choose one of {', '.join(sources['tiers'])}")
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").exists():
        raise FileExistsError(f"{out} holds files but no manifest.json of a built tier; name another directory")
    import_resvg()
    plan = sources["tiers"][tier]
    raw = raw.resolve()
    versions = packages.fetch(tier, raw)
    icon_sets = icons.list_icon_sets(raw, tier)
    emoji = EmojiNames(raw / "emojibase-data/package")

    rows = cut_to_plan(list_rows(tier, raw, icon_sets, emoji, versions, seed), plan, seed)
    pictures = render_rows(rows, tier, raw, n_workers)
    copies = near_copies(rows, pictures)
    rows = [row for row in rows if row.uid not in copies]

    unfinished = out.with_name(out.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    files = write_splits(rows, pictures, plan, unfinished)
    _write_json(unfinished / "classes.json", zero_shot_tasks(emoji, rows), indent=0)
    (unfinished / "ATTRIBUTION.md").write_text(attribution(rows, icon_sets), encoding="utf-8")
    manifest = {"tier": tier, "seed": seed, "image_size": IMAGE_SIZE, "packages": versions}
    manifest |= {"n_near_copies_dropped": len(copies), "splits": count_splits(rows, pictures), "files": files}
    _write_json(unfinished / "manifest.json", manifest, indent=1)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)


def write_splits(rows: list[Row], pictures: dict[str, Picture], plan: Plan, out: Path) -> list[ShardFile]:
    """Shards of every split, img2dataset's way; returns name, rows and bytes of each."""
    files: list[ShardFile] = []
    n_key_digits = len(str(plan["rows_per_shard"] - 1))
    for split in sorted({row.split for row in rows}):
        (out / split).mkdir()
        members = [row for row in rows if row.split == split]
        for shard, part in enumerate(batches(members, plan["rows_per_shard"])):
            keys = (f"{shard:05d}{i:0{n_key_digits}d}" for i in range(len(part)))
            records = [_record(row, pictures[row.uid], key) for row, key in zip(part, keys, strict=True)]
            path = out / split / f"{shard:05d}.parquet"
            pq.write_table(
                pa.Table.from_pylist(records, schema=SCHEMA),
                path,
                row_group_size=plan["rows_per_group"],
                compression={name: "NONE" if name == "webp" else "ZSTD" for name in SCHEMA.names},
                use_dictionary=[n for n in SCHEMA.names if n not in ("uid", "caption", "url", "key", "sha256", "webp")],
                write_statistics=[n for n in SCHEMA.names if n != "webp"],
            )
            _write_json(out / split / f"{shard:05d}_stats.json", _shard_stats(records), indent=4)
            files.append({"name": f"{split}/{path.name}", "rows": len(part), "bytes": path.stat().st_size})
    return files


def _record(row: Row, picture: Picture, key: str) -> dict[str, Any]:
    record: dict[str, Any] = {name: getattr(row, name, None) for name in SCHEMA.names} | {"key": key}
    if picture.webp is None:
        return record | {"status": "failed_to_resize", "error_message": picture.error}
    width, height = picture.original_size
    record |= {"status": "success", "width": IMAGE_SIZE, "height": IMAGE_SIZE, "exif": "{}", "webp": picture.webp}
    # of the stored picture: an SVG out of its package has no file of its own to hash
    return record | {
        "original_width": width,
        "original_height": height,
        "sha256": hashlib.sha256(picture.webp).hexdigest(),
    }


def _shard_stats(records: list[dict[str, Any]]) -> ShardStats:
    """What img2dataset says of a shard."""
    statuses = Counter(record["error_message"] or "success" for record in records)
    n_successes = statuses["success"]
    return {
        "count": len(records),
        "successes": n_successes,
        "failed_to_download": 0,
        "failed_to_resize": len(records) - n_successes,
        "duration": 0.0,  # no clock here, so that equal builds are equal bytes
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": dict(sorted(statuses.items())),
    }


def zero_shot_tasks(emoji: EmojiNames, rows: list[Row]) -> dict[str, ClassTask]:
    """Classification tasks of the emoji evaluation sets: task -> label column, classes with names, templates.

    An evaluation set may hold only some of a task's classes; a task of which none holds any is left out.
    """
    labels = {value for row in rows if row.kind == "eval_emoji" for value in (row.concept, row.group, row.subgroup)}
    named = {c: e for c, e in emoji.english.items() if not e.is_toned and e.group not in ("component", "")}
    object_groups = {"animals-nature", "food-drink", "travel-places", "activities", "objects"}

    def task(label: str, names: dict[str, str]) -> ClassTask:
        classes = [Class(id=label_id, names=[name]) for label_id, name in names.items()]
        return {"label": label, "classes": classes, "templates": ["{}"]}

    tasks = {
        "emoji_name": task("concept", {c: e.label for c, e in named.items()}),
        "emoji_objects": task("concept", {c: e.label for c, e in named.items() if e.group in object_groups}),
        "flags": task("concept", {c: e.label for c, e in named.items() if e.subgroup == "country-flag"}),
        "group": task("group", {g: as_words(g) for g in sorted({e.group for e in named.values()})}),
        "subgroup": task("subgroup", {g: as_words(g) for g in sorted({e.subgroup for e in named.values()})}),
    }
    return {
        name: content for name, content in tasks.items() if any(item["id"] in labels for item in content["classes"])
    }


def attribution(rows: list[Row], icon_sets: dict[str, IconSet]) -> str:
    """The table that the licences ask for, largest source first."""
    files = {
        "openclipart-svg": ("Open Clip Art Library 0.18", "openclipart.org contributors", "https://openclipart.org"),
        "tuxpaint-stamps-default": ("Tux Paint stamps", "Bill Kendrick and contributors", "https://tuxpaint.org"),
    }
    lines = ["# Attribution", "", "Drawings were rendered at 64 x 64 pixels, some on a coloured background.", ""]
    lines += ["| source | rows | author | licence | url |", "| --- | --- | --- | --- | --- |"]
    counts = Counter((row.source, row.licence) for row in rows)
    for (source, licence), n_rows in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        icon_set = icon_sets.get(source.removeprefix("iconify:"))
        title, author, url = files[source] if icon_set is None else (
            f"{icon_set.title} ({icon_set.prefix})", icon_set.author, icon_set.author_url
        )  # fmt: skip
        lines.append(f"| {title} | {n_rows} | {author} | {licence} | {url} |")
    names = "| emoji names and keywords | | Unicode CLDR, through emojibase-data | Unicode-3.0, MIT |"
    return "\n".join([*lines, f"{names} https://emojibase.dev |"]) + "\n"


def count_splits(rows: list[Row], pictures: dict[str, Picture]) -> dict[str, Any]:
    """Rows by split, and within it by what a selection can be measured against."""
    splits: dict[str, dict[str, Any]] = {}
    for split in sorted({row.split for row in rows}):
        members = [row for row in rows if row.split == split]
        splits[split] = {
            "rows": len(members),
            "successes": sum(pictures[row.uid].webp is not None for row in members),
            "bytes_of_images": sum(len(pictures[row.uid].webp or b"") for row in members),
        }
        for name in ("kind", "licence", "noise", "lang"):
            counts = Counter(getattr(row, name) or "none" for row in members)
            splits[split][name] = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return splits


def _write_json(path: Path, content: Mapping[str, object], *, indent: int) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def main(
    tier: Annotated[str, typer.Option(help="A tier of deploy/data/sources.json.")],
    out: Annotated[Path, typer.Option(help="Where the built tier goes; an older build there is replaced.")],
    raw: Annotated[Path, typer.Option(help="Unpacked packages, kept between builds.")] = Path("raw"),
    seed: Annotated[int, typer.Option(help="Which rows are drawn, and their order.")] = 0,
    n_workers: Annotated[int | None, typer.Option(help="Rendering processes; one per core by default.")] = None,
) -> None:
    """Build a tier of drawing and caption pairs out of published packages."""
    build(tier, out, raw=raw, seed=seed, n_workers=n_workers)
    sys.stdout.write((out / "manifest.json").read_text(encoding="utf-8"))
