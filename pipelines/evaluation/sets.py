"""Pictures to evaluate on -> a stream of examples with captions and labels, and the classes that come with them."""

import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NotRequired, TypedDict

import pyarrow as pa

from jest_core import run_file
from jest_core.run_file import Pictures, Run

from ..base import shard_paths, storage
from ..data.layouts import open_shard
from ..data.shards import Shard, clean

if TYPE_CHECKING:
    from jest_core.evaluation import ClassNames

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_read = storage.retried(storage.read_bytes)
_MAX_MEMBER = 1 << 28  # bytes of a tar's member that is read


@dataclass(frozen=True)
class Example:
    """One picture. label: its class by name, as the set names classes; columns: others that may hold labels."""

    read: Callable[[], bytes | None]  # called late: looking for labels reads no pictures
    captions: Sequence[str] = ()
    label: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


class Class(TypedDict):
    """One class of a task."""

    id: str  # its value in the label column
    names: list[str]


class ClassTask(TypedDict):
    """A task of the file evaluation.classes, which maps its name to this."""

    label: str  # column of the shards that has an example's class
    classes: list[Class]
    templates: list[str]  # prompts, with {} for the name


class _KarpathyPicture(TypedDict):
    """A picture of Karpathy's JSON, and what is read of it."""

    filename: str
    filepath: NotRequired[str]  # folder
    split: str
    sentences: list[dict[str, str]]  # each with `raw`


def examples(run: Run, source: Pictures, columns: Iterable[str] = ()) -> Iterator[Example]:
    """The pictures of a source, in its order; columns: of shards, those that are wanted beside the captions.

    Raises FileNotFoundError and ValueError where the source is not laid out as its format says.
    """
    wanted = sorted(set(columns))
    match source.format:
        case "shards":
            for path in shard_paths.expand(run_file.sources(source.shards), run.path("")):
                yield from _of_tar(path) if shard_paths.is_tar(path) else _of_parquet(path, source.columns, wanted)
        case "folder":
            directory = _directory(run, source)
            for name in class_folders(directory):
                for picture in storage.names(f"{directory}/{name}"):
                    if picture.lower().endswith(_PICTURES):
                        yield Example(partial(_read, f"{directory}/{name}/{picture}"), label=name)
        case "webdataset":
            directory = f"{_directory(run, source)}/{source.split}"
            n_shards = int(storage.read_bytes(f"{directory}/nshards.txt"))
            for i in range(n_shards):
                yield from _of_tar(f"{directory}/{i}.tar", lines=True)
        case "karpathy":
            yield from _of_karpathy(run, source)


def class_tasks(run: Run) -> dict[str, ClassTask]:
    """The tasks of the file evaluation.classes, by name."""
    path = run.evaluation.classes if run.evaluation else None
    return dict(storage.read_json(run.path(path))) if path else {}


def classes(run: Run, source: Pictures, *, canonical: bool = False) -> "ClassNames":
    """The classes that come with a set, with their prompts. Raises ValueError where none do."""
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    from jest_core.evaluation import ClassNames

    if source.format == "folder":
        found = class_folders(_directory(run, source))
        templates = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
        if all(re.fullmatch(r"n\d{8}", name) for name in found):
            if len(found) != len(IMAGENET_CLASSNAMES):
                raise ValueError(
                    f"{_directory(run, source)} has {len(found)} of ImageNet's synsets, which have names only if all "
                    "1,000 are there: give the classes in evaluation.classes, or lay the pictures out as webdataset"
                )
            # CLIP's names are in the order of the folders'
            return ClassNames(found, [[name] for name in IMAGENET_CLASSNAMES], templates, canonical)
        return ClassNames(found, [[name.replace("_", " ")] for name in found], templates, canonical)
    if source.format == "webdataset":
        directory = _directory(run, source)
        names = storage.read_bytes(f"{directory}/classnames.txt").decode().splitlines()
        lines = storage.read_bytes(f"{directory}/zeroshot_classification_templates.txt").decode().splitlines()
        templates = [template.replace("{c}", "{}") for template in lines if template]
        return ClassNames([str(i) for i in range(len(names))], [[name] for name in names], templates, canonical)
    raise ValueError(
        f"an evaluation set of format {source.format} brings no classes: name a task of evaluation.classes"
    )


def class_folders(directory: str) -> list[str]:
    """Names of the classes of an image folder, in the order that numbers them."""
    found = [name for name in storage.folders(directory) if not name.startswith(".")]
    if not found:
        raise FileNotFoundError(
            f"{directory} has no folders, and an image folder has one for each class: correct the set's shards"
        )
    return found


def _directory(run: Run, source: Pictures) -> str:
    if not isinstance(source.shards, str):
        raise ValueError(f"an evaluation set of format {source.format} is one directory or file, not a list")
    return run.path(source.shards).rstrip("/")


def _of_parquet(path: str, names: dict[str, str], wanted: list[str]) -> Iterator[Example]:
    shard = open_shard(path, names)
    for group in range(len(shard.row_group_sizes)):
        columns, images, captions = _row_group(shard, group, wanted)
        for i in range(len(images)):
            labels = {name: values[i] for name, values in columns.items()}
            yield Example(images[i].as_py, [c for c in captions[i : i + 1] if c], columns=labels)


@storage.retried
def _row_group(shard: Shard, group: int, wanted: list[str]) -> tuple[dict[str, list[str]], pa.Array, list[str]]:
    columns = {name: shard.strings(group, name) for name in wanted if shard.actual(name)}
    return columns, shard.images(group), shard.captions(group) if shard.actual("caption") else []


def _of_tar(path: str, *, lines: bool = False) -> Iterator[Example]:
    """Members with the same name up to the first dot are one example. lines: a caption in each line of the text."""
    fs, inner = storage.filesystem(path)
    try:
        with fs.open(inner, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            key, members = "", dict[str, bytes]()
            for member in tar:
                if not member.isfile():
                    continue
                folder, name = PurePosixPath(member.name).parent, PurePosixPath(member.name).name
                stem, _, suffix = name.partition(".")
                if str(folder / stem) != key:
                    yield from _example(members, lines=lines)
                    key, members = str(folder / stem), {}
                if member.size > _MAX_MEMBER:
                    raise ValueError(
                        f"{path}: {member.name} has {member.size:,} bytes, more than {_MAX_MEMBER:,}: remove it"
                    )
                opened = tar.extractfile(member)
                members[f".{suffix.lower()}"] = opened.read() if opened else b""
            yield from _example(members, lines=lines)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable tar: {error}; replace the file") from error


def _example(members: dict[str, bytes], *, lines: bool) -> Iterator[Example]:
    image = next((suffix for suffix in _PICTURES if suffix in members), None)
    if image is None:
        return
    text = members.get(".txt", b"").decode(errors="replace")
    captions = [line for line in text.splitlines() if line] if lines else [clean(text)]
    label = members[".cls"].decode().strip() if ".cls" in members else None
    columns = json.loads(members[".json"]) if ".json" in members else {}
    yield Example(partial(members.get, image), captions if text else [], label, {k: str(v) for k, v in columns.items()})


def _of_karpathy(run: Run, source: Pictures) -> Iterator[Example]:
    path = _directory(run, source)
    content = storage.read_json(path)
    if not isinstance(content, dict) or "images" not in content:
        raise ValueError(f"{path} has no `images`: it is not Karpathy's JSON; correct the set's shards or format")
    pictures: list[_KarpathyPicture] = content["images"]
    folder = run.path(source.images) if source.images is not None else path.rpartition("/")[0]
    for picture in pictures:
        if picture["split"] == source.split:
            name = "/".join(part for part in (picture.get("filepath", ""), picture["filename"]) if part)
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{path} names {name!r}, which is outside of {folder}: correct the name, or `images`")
            yield Example(partial(_read, f"{folder}/{name}"), [s["raw"] for s in picture["sentences"]])
