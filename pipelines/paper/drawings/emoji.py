"""Emoji by the names that the Unicode CLDR gives them in each language."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .icons import Icons, icon_aliases, visible_icons
from .names import as_slug


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

    def match(self, icons: Icons) -> dict[str, str]:
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
