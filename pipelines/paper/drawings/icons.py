"""Icon sets as Iconify's packages hold them."""

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NotRequired, TypedDict

from .packages import load_sources

ALL_SETS_DIR = "iconify-json"  # the package of all icon sets; single sets are in iconify-<prefix>


class Author(TypedDict):
    name: str
    url: NotRequired[str]


class Licence(TypedDict):
    title: str
    spdx: NotRequired[str]


class IconSetInfo(TypedDict):
    """What Iconify's info.json says of a set."""

    prefix: str
    name: str
    author: Author
    license: Licence
    category: NotRequired[str]
    palette: NotRequired[bool]


class Icon(TypedDict):
    """One drawing; sizes in its own units, those of the set if not given."""

    body: str  # SVG without its root
    left: NotRequired[float]
    top: NotRequired[float]
    width: NotRequired[float]
    height: NotRequired[float]
    hidden: NotRequired[bool]


class Alias(TypedDict):
    """Another name of an icon, perhaps of it turned or mirrored."""

    parent: str
    rotate: NotRequired[int]
    hFlip: NotRequired[bool]
    vFlip: NotRequired[bool]


class Icons(TypedDict):
    """An icon set in Iconify's JSON."""

    icons: dict[str, Icon]  # by name
    aliases: NotRequired[dict[str, Alias]]
    categories: NotRequired[dict[str, list[str]]]  # title -> names
    suffixes: NotRequired[dict[str, str]]
    chars: NotRequired[dict[str, str]]  # code points -> name
    left: NotRequired[float]
    top: NotRequired[float]
    width: NotRequired[float]
    height: NotRequired[float]


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
    infos: dict[str, IconSetInfo] = {}
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
def load_icons(raw: Path, tier: str, prefix: str) -> Icons:
    """An icon set in Iconify's JSON: icons, aliases, categories, suffixes, chars, default sizes."""
    if any(package["dir"] == ALL_SETS_DIR and tier in package["tiers"] for package in load_sources()["packages"]):
        whole: Icons = json.loads((raw / ALL_SETS_DIR / f"package/json/{prefix}.json").read_text("utf-8"))
        return whole
    folder = raw / f"iconify-{prefix}" / "package"
    icons: Icons = json.loads((folder / "icons.json").read_text("utf-8"))
    if (folder / "metadata.json").exists():
        icons |= json.loads((folder / "metadata.json").read_text("utf-8"))
    if (folder / "chars.json").exists():
        icons["chars"] = json.loads((folder / "chars.json").read_text("utf-8"))
    return icons


def visible_icons(icons: Icons) -> list[str]:
    """Names of the icons that the set still shows; hidden ones were withdrawn by their authors."""
    return [name for name, icon in icons["icons"].items() if not icon.get("hidden")]


def icon_aliases(icons: Icons) -> dict[str, list[str]]:
    """Other names of the same picture; an alias that turns or mirrors it names another picture."""
    aliases = defaultdict(list)
    for alias, entry in icons.get("aliases", {}).items():
        if not {"rotate", "hFlip", "vFlip"} & entry.keys():
            aliases[entry["parent"]].append(alias)
    return aliases


def icon_base_names(icons: Icons) -> dict[str, str]:
    """Icon name without the set's style suffix (`-bold`, `-24px`): variants of a drawing share it."""
    suffixes = sorted((f"-{suffix}" for suffix in icons.get("suffixes", {}) if suffix), key=len, reverse=True)
    return {
        name: name.removesuffix(next((suffix for suffix in suffixes if name.endswith(suffix)), ""))
        for name in icons["icons"]
    }
