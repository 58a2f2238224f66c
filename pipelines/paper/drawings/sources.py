"""Published drawings and the names people gave them: packages in, plain records out.

Icon sets, emoji and clip art travel through package registries, which many closed networks can reach when they cannot
reach image hosts. `fetch` takes a tier's packages with the registries' ordinary clients; the readers below return what
the packages say (icon bodies, CLDR names by language, clip-art titles) and choose nothing: `build.py` does that.
"""

import hashlib
import html
import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

SOURCES_FILE = files("jest_deploy") / "data" / "sources.json"
ALL_SETS_DIR = "iconify-json"  # the package that holds every icon set; single sets lie in iconify-<prefix>
MAX_SVG_BYTES = 1_500_000  # a handful of traced posters take seconds each to draw and are gone at 64 pixels anyway


def load_sources() -> dict[str, Any]:
    """The pinned packages, the role of each icon set and the tiers."""
    if not SOURCES_FILE.is_file():
        raise FileNotFoundError(f"{SOURCES_FILE} is missing; build drawings from a checkout of the repository")
    sources: dict[str, Any] = json.loads(SOURCES_FILE.read_text(encoding="utf-8"))
    return sources


# ------------------------------------------------------------------------------------------------------ fetching


def fetch(tier: str, raw: Path) -> dict[str, str]:
    """Unpack the packages of a tier under `raw`; return package name -> version of those that are there.

    Safe to run again: a package already unpacked is left alone. Debian packages are optional, since their client
    exists on Debian only; without them the tier has less clip art and fewer sentences.
    """
    raw.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in load_sources()["packages"]:
        if tier not in package["tiers"]:
            continue
        done = raw / package["dir"] / ".done"
        if not done.exists():
            if package["kind"] == "deb" and not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
                print(f"{package['name']}: left out, it needs apt-get and dpkg-deb (Debian, Ubuntu)")
                continue
            try:
                _fetch_package(package, raw)
            except (RuntimeError, OSError) as error:
                if package["kind"] != "deb":
                    raise
                print(f"{package['name']}: left out, {error}")
                continue
        versions[package["name"]] = done.read_text(encoding="utf-8").strip()
    return versions


def _fetch_package(package: dict[str, Any], raw: Path) -> None:
    target, partial = raw / package["dir"], raw / f"{package['dir']}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if package["kind"] == "npm":
        if shutil.which("npm") is None:
            raise FileNotFoundError(
                f"npm is not on PATH and {target} is not unpacked yet; install Node.js (npm comes with it), or copy "
                "the raw directory of a machine that has it"
            )
        version = package["version"]
        # pack only downloads: no install script of the package runs
        archive = partial / _run(["npm", "pack", "--silent", f"{package['name']}@{version}"], partial).split()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    elif package["kind"] == "deb":
        _run(["apt-get", "download", "-qq", package["name"]], partial)
        archive = next(partial.glob("*.deb"))
        version = _run(["dpkg-deb", "-f", str(archive), "Version"], partial).strip()
        _run(["dpkg-deb", "-x", str(archive), str(partial)], partial)
    else:
        raise ValueError(f"package kind {package['kind']!r} of {package['name']}: npm and deb are known")
    archive.unlink()
    (partial / ".done").write_text(version, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _run(command: list[str], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` ended with {result.returncode}: {result.stderr.strip()[-500:]}")
    return result.stdout


# ------------------------------------------------------------------------------------------------------ text helpers


def stable_hash(*keys: object) -> int:
    """64 bits that depend on the keys alone, so every choice can be repeated on any machine and in any order."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=8).digest(), "big")


def uniform(*keys: object) -> float:
    """A number in [0, 1) that depends on the keys alone."""
    return stable_hash(*keys) / 2**64


def as_words(name: str) -> str:
    return re.sub(r"[-_/]+", " ", name).strip()


def as_slug(label: str) -> str:
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_label.replace("&", "and").replace("'", "")).strip("-")


# ------------------------------------------------------------------------------------------------------ icon sets


@dataclass(frozen=True)
class IconSet:
    """What a package says about an icon set, without its drawings."""

    prefix: str
    title: str
    author: str
    author_url: str
    licence: str  # SPDX identifier
    category: str
    has_palette: bool  # False: drawn in one ink that the page chooses


def list_icon_sets(raw: Path, tier: str) -> dict[str, IconSet]:
    """Icon sets of the packages that the tier pins, by prefix."""
    infos: dict[str, dict[str, Any]] = {}
    for package in load_sources()["packages"]:
        folder = raw / package["dir"] / "package"
        if tier not in package["tiers"]:
            continue
        if package["dir"] == ALL_SETS_DIR:
            infos |= json.loads((folder / "collections.json").read_text(encoding="utf-8"))
        elif package["dir"].startswith("iconify-"):
            info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
            infos[info["prefix"]] = info
    return {
        prefix: IconSet(
            prefix=prefix,
            title=info["name"],
            author=info["author"]["name"],
            author_url=info["author"].get("url", ""),
            licence=info["license"].get("spdx") or info["license"]["title"],
            category=info.get("category") or "",
            has_palette=bool(info.get("palette")),
        )
        for prefix, info in sorted(infos.items())
    }


@lru_cache(maxsize=2)  # the largest sets take tens of megabytes, and callers go through them one by one
def load_icons(raw: Path, tier: str, prefix: str) -> dict[str, Any]:
    """An icon set in Iconify's JSON: icons, aliases, categories, suffixes, chars, default sizes."""
    if any(package["dir"] == ALL_SETS_DIR and tier in package["tiers"] for package in load_sources()["packages"]):
        icons: dict[str, Any] = json.loads((raw / ALL_SETS_DIR / f"package/json/{prefix}.json").read_text("utf-8"))
        return icons
    folder = raw / f"iconify-{prefix}" / "package"
    icons = json.loads((folder / "icons.json").read_text("utf-8"))
    if (folder / "metadata.json").exists():
        icons |= json.loads((folder / "metadata.json").read_text("utf-8"))
    if (folder / "chars.json").exists():
        icons["chars"] = json.loads((folder / "chars.json").read_text("utf-8"))
    return icons


def visible_icons(icons: dict[str, Any]) -> list[str]:
    """Names of the icons that the set still shows; hidden ones were withdrawn by their authors."""
    return [name for name, icon in icons["icons"].items() if not icon.get("hidden")]


def icon_aliases(icons: dict[str, Any]) -> dict[str, list[str]]:
    """Other names of the same picture; an alias that turns or mirrors it names another picture."""
    aliases = defaultdict(list)
    for alias, entry in icons.get("aliases", {}).items():
        if not {"rotate", "hFlip", "vFlip"} & entry.keys():
            aliases[entry["parent"]].append(alias)
    return aliases


def icon_base_names(icons: dict[str, Any]) -> dict[str, str]:
    """Icon name without the set's style suffix (`-bold`, `-24px`): variants of a drawing share it."""
    suffixes = sorted((f"-{suffix}" for suffix in icons.get("suffixes", {}) if suffix), key=len, reverse=True)
    return {
        name: name.removesuffix(next((suffix for suffix in suffixes if name.endswith(suffix)), ""))
        for name in icons["icons"]
    }


# ------------------------------------------------------------------------------------------------------ emoji


@dataclass(frozen=True)
class EmojiName:
    """One emoji in one language, as the Unicode CLDR names it."""

    label: str
    keywords: str
    concept: str  # code points of the emoji without skin tone, which all its variants share
    group: str
    subgroup: str
    is_toned: bool


@dataclass
class EmojiNames:
    """CLDR names by language and the way from an icon's name to its emoji."""

    folder: Path
    english: dict[str, EmojiName] = field(init=False)
    _by_slug: dict[str, str] = field(init=False, default_factory=dict)
    _groups: dict[str, dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self._groups = json.loads((self.folder / "meta/groups.json").read_text("utf-8"))
        self.english = self.language("en")
        for code_points, emoji in self.english.items():
            self._by_slug.setdefault(as_slug(emoji.label), code_points)

    def languages(self) -> list[str]:
        """Every language but the varieties of English."""
        names = sorted(path.parent.name for path in self.folder.glob("*/data.json"))
        return [name for name in names if not name.startswith("en")]

    def language(self, language: str) -> dict[str, EmojiName]:
        """Code points -> names in that language, skin tones included."""
        names = {}
        for entry in json.loads((self.folder / language / "data.json").read_text("utf-8")):
            for variant in [entry, *entry.get("skins", [])]:
                names[_code_points(variant["hexcode"])] = EmojiName(
                    label=variant["label"],
                    keywords=", ".join(variant.get("tags") or entry.get("tags") or []),
                    concept=_code_points(entry["hexcode"]),
                    group=self._groups["groups"].get(str(entry.get("group")), ""),
                    subgroup=self._groups["subgroups"].get(str(entry.get("subgroup")), ""),
                    is_toned=variant is not entry,
                )
        return names

    def match(self, icons: dict[str, Any]) -> dict[str, str]:
        """Icon name -> code points: by the set's own table where it has one, else by the name or an alias."""
        by_name = {name: _code_points(code) for code, name in reversed(icons.get("chars", {}).items())}
        aliases = icon_aliases(icons)
        matches = {}
        for name in visible_icons(icons):
            code_points = by_name.get(name)
            if code_points not in self.english:
                candidates = (self._by_slug.get(other) for other in [name, *aliases.get(name, [])])
                code_points = next((candidate for candidate in candidates if candidate), None)
            if code_points:
                matches[name] = code_points
        return matches

    def flags_by_country(self) -> dict[str, str]:
        """ISO 3166 code in lower case -> code points of the flag."""
        flags = {}
        for code_points in self.english:
            letters = [int(point, 16) - 0x1F1E6 for point in code_points.split("-")]
            if len(letters) == 2 and all(0 <= letter < 26 for letter in letters):
                flags["".join(chr(ord("a") + letter) for letter in letters)] = code_points
        return flags


def _code_points(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")  # fe0f only asks for colour


# ------------------------------------------------------------------------------------------------------ clip art


@dataclass(frozen=True)
class ClipArt:
    """One file of a clip-art collection; `path` is relative to the raw directory, `name` to the collection."""

    path: str
    name: str
    title: str
    description: str = ""
    tags: tuple[str, ...] = ()
    translations: tuple[tuple[str, str], ...] = ()  # (language, sentence)


def list_open_clip_art(raw: Path) -> Iterator[ClipArt]:
    """Open Clip Art Library: titles, descriptions and tags from each file's own metadata."""
    root = raw / "openclipart-svg/usr/share/openclipart/svg"
    for path in sorted(root.rglob("*.svg")):
        if not path.is_file() or path.stat().st_size > MAX_SVG_BYTES:
            continue
        svg = path.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"<metadata.*?</metadata>", svg, re.DOTALL)
        metadata = found.group() if found else ""
        yield ClipArt(
            path=path.relative_to(raw).as_posix(),
            name=path.relative_to(root).as_posix(),
            title=" ".join(_element_texts(metadata, "dc:title")[:1]),
            description=" ".join(_element_texts(metadata, "dc:description")[:1]),
            tags=tuple(filter(None, _element_texts(metadata, "rdf:li"))),
        )


def _element_texts(metadata: str, tag: str) -> list[str]:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", metadata, re.DOTALL)
    return [re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).strip() for text in texts]


def list_stamps(raw: Path) -> Iterator[ClipArt]:
    """Tux Paint's stamps: a sentence for each picture, and the same sentence in many languages."""
    root = raw / "tuxpaint-stamps-default/usr/share/tuxpaint/stamps"
    for text_file in sorted(root.rglob("*.txt")):
        lines = text_file.read_text(encoding="utf-8", errors="replace").splitlines()
        pictures = [text_file.with_suffix(suffix) for suffix in (".png", ".svg")]
        picture = next((path for path in pictures if path.exists()), None)
        if picture is None or not lines or not lines[0].strip():
            continue
        translated = (re.match(r"([\w@]+)\.utf8=(.+)", line) for line in lines[1:])
        yield ClipArt(
            path=picture.relative_to(raw).as_posix(),
            name=picture.relative_to(root).as_posix(),
            title=lines[0].strip(),
            translations=tuple((match[1], match[2].strip()) for match in translated if match),
        )
