"""The patterns of data.shards -> paths of shards: folders, globs, brace ranges, and paths that are written out.

A path that exists as it is written is that path, whatever characters are in it.
"""

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from braceexpand import braceexpand

from jest_core.run_file import join

from . import progress, storage

MAX_PATHS = 1_000_000  # that the brace ranges of one pattern may name; LAION-5B has 231,350 shards
_FORMATS = "shards are .tar and .parquet files"
_GLOB = "*?["
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.[a-z0-9]+)$", re.IGNORECASE)
_BRACES = re.compile(
    r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}|\\.|[{},]"
)  # a range of numbers, or what splits a pattern

Listing = dict[str, bool]  # names in a folder -> whether it is a folder itself


def is_tar(path: str) -> bool:
    return path.lower().endswith(".tar")


def expand(patterns: Sequence[str], root: str) -> list[str]:
    """Paths of shards from paths, folders, globs and brace ranges, below root.

    A folder stands for its .tar files, or for its .parquet files where it has no tar; a DataComp folder for the tars in
    its subfolder `shards`. Raises FileNotFoundError where a pattern names no file, and ValueError where what it names
    are no shards.
    """
    paths: list[str] = []
    listings: dict[str, Listing] = {}  # each folder is listed once: a brace range may name 200,000 files of it
    for pattern in patterns:
        start = _written_out(pattern, root)
        for rest in _braces(pattern[len(start) :]):
            path = join(root, start + rest)
            matches = _matches(path, listings)
            if not matches:
                raise FileNotFoundError(f"no shard at {path}: correct the path, or root")
            paths += matches
    return paths


def _written_out(pattern: str, root: str = "") -> str:
    """The longest leading part of a pattern that exists as it is written: no character in it is special."""
    if not any(c in pattern for c in _GLOB + "{}\\"):
        return pattern
    first = pattern.find("://") + 3 if "://" in pattern else 0
    ends = [len(pattern), *(i for i in range(len(pattern) - 1, first, -1) if pattern[i] == "/")]
    return next((pattern[:end] for end in ends if storage.exists(join(root, pattern[:end]))), "")


def _braces(pattern: str) -> Iterator[str]:
    if (n := _n_paths(pattern)) > MAX_PATHS:
        raise ValueError(
            f"data.shards: {pattern} names {n:,} paths, more than {MAX_PATHS:,}: correct the range, or name a folder"
        )
    try:
        yield from braceexpand(pattern)
    except ValueError as error:
        raise ValueError(f"data.shards: {error}: close each brace, or put a backslash before it") from error


def _n_paths(pattern: str) -> int:
    """How many strings a pattern expands to, without expanding it: the expansion keeps all of them in memory."""
    outer: list[tuple[int, int]] = []  # of each open brace: as below, at its place
    before, n = 0, 1  # strings of the alternatives before this one, and of this one so far
    for found in _BRACES.finditer(pattern):
        token = found[0]
        if found[1]:
            start, stop, step = (int(number or 1) for number in found.groups())
            n *= abs(stop - start) // max(1, abs(step)) + 1
        elif token == "{":
            outer.append((before, n))
            before, n = 0, 1
        elif token == "," and outer:
            before, n = before + n, 1
        elif token == "}" and outer:
            inside = before + n
            before, n = outer.pop()
            n *= inside
    return n


def _matches(path: str, listings: dict[str, Listing]) -> list[str]:
    fs, inner = storage.filesystem(path)
    if any(c in path for c in _GLOB) and (start := _written_out(path)) != path:
        rest = path.rstrip("/")[len(start) :]
        found = fs.glob(glob.escape(inner[: len(inner) - len(rest)]) + rest, detail=True)
        return _of_listing(
            {fs.unstrip_protocol(p) if "://" in path else p: info["type"] == "directory" for p, info in found.items()},
            path,
        )
    path = path.rstrip("/")
    folder, name = path.rpartition("/")[0], _name(path)
    if _is_shard(name):
        if folder not in listings:
            listings[folder] = _listing(folder)
        if not listings[folder].get(name, True):
            return [path]
        if name not in listings[folder]:
            return []
    if fs.isdir(inner):
        return _of_folder(path)
    if fs.exists(inner):
        _refuse_compressed([path])
        raise ValueError(f"{path} is no shard: {_FORMATS}, or folders of them; convert it, or correct data.shards")
    return []


def _of_folder(folder: str) -> list[str]:
    listing = _listing(folder)
    if listing.get("shards"):  # DataComp's
        folder = f"{folder}/shards"
        listing = {name: is_folder for name, is_folder in _listing(folder).items() if is_tar(name)}
    return _of_listing({f"{folder}/{name}": is_folder for name, is_folder in listing.items()}, folder)


def _of_listing(listing: Listing, where: str) -> list[str]:
    """The tars of a listing, or where there are none its Parquet files: img2dataset writes .parquet and .json beside
    its tars. A folder named like a Parquet file, as Spark writes them, stands for the files in it."""
    files = sorted(path for path, is_folder in listing.items() if not is_folder)
    _refuse_compressed(files)
    tars = [path for path in files if is_tar(path)]
    shards = tars or [path for path in files if _is_shard(path)]
    if not tars:
        spark = sorted(path for path, is_folder in listing.items() if is_folder and path.endswith(".parquet"))
        shards += [shard for path in spark for shard in _of_folder(path)]
    visible = [path for path in files if not _name(path).startswith(("_", "."))]
    shards = shards or [path for path in visible if "." not in _name(path)]
    if not shards and files:
        raise FileNotFoundError(
            f"no shard at {where}: correct the path, or root; there are {_kinds(files)}, and {_FORMATS}"
        )
    if not shards and listing:
        raise FileNotFoundError(
            f"no shard at {where}, but folders (such as {_name(min(listing))}): name those that have shards, or their "
            "files by a glob such as */*.tar"
        )
    stems = {_stem(path) for path in shards}
    if others := [path for path in visible if _stem(path) not in stems]:
        progress.warn("shards", f"{where}: {_kinds(others)} are not read; {_FORMATS}, and beside tars only those are")
    return shards


def _refuse_compressed(files: Sequence[str]) -> None:
    there = set(files)
    for path in files:
        if _COMPRESSED.search(path) and _COMPRESSED.sub(".tar", path) not in there:
            raise ValueError(
                f"{path} is compressed, and the pictures of a tar are read as ranges of its bytes: decompress it to a"
                " .tar (pictures are compressed already), or name the other shards by a glob such as *.tar"
            )


def _listing(folder: str) -> Listing:
    fs, inner = storage.filesystem(folder)
    try:
        entries = fs.ls(inner, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {
        _name(entry["name"].rstrip("/")): entry["type"] == "directory"
        or (entry["type"] not in ("file", "directory") and fs.isdir(entry["name"]))
        for entry in entries
    }


def _is_shard(path: str) -> bool:
    return path.lower().endswith((".tar", ".parquet"))


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    """The name without its suffix: img2dataset's 00000.tar, 00000.parquet and 00000_stats.json have the same."""
    name = _COMPRESSED.sub(".tar", _name(path))
    return (name.rpartition(".")[0] or name).removesuffix("_stats")


def _kinds(files: Sequence[str]) -> str:
    """How many files there are of each suffix, with the name of one of them."""
    names = [_name(path) for path in files]
    suffixes = Counter("." + name.rpartition(".")[2] if "." in name else "without suffix" for name in names)
    return ", ".join(f"{n:,} {suffix}" for suffix, n in suffixes.most_common(5)) + f" (such as {names[0]})"
