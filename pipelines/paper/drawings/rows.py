"""Which pairs of drawing and name a tier holds: the pool, the curated set and the evaluation sets, before rendering.

No design of an evaluation vendor trains, and some emoji concepts are kept out of the curated set, so that an evaluation
can tell what was learned from the pool. `noise` names what is wrong with a caption.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

from . import clip_art, packages
from .clip_art import ClipArt
from .emoji import EmojiName, EmojiNames
from .icons import Icons, IconSet, icon_aliases, icon_base_names, load_icons, visible_icons
from .names import as_slug, as_words, stable_hash, uniform
from .packages import Plan, Roles

NOVEL_FRACTION = 0.15  # of the emoji concepts, which the curated set never shows: only the pool can teach them

# Icon sets and clip art carry some logos among their own drawings; a tier without brands drops what these words name.
BRAND_NAME = re.compile(
    r"(^|-)(brand|logos?|google|facebook|twitter|instagram|youtube|whatsapp|linkedin|github|gitlab|android|linux|ios|"
    r"microsoft|skype|wikipedia|adobe|paypal|telegram|tiktok|wechat|reddit|spotify|dropbox|stack-overflow|tux|kde|"
    r"debian|gentoo|mozilla|firefox|opera|openoffice|inkscape|gimp|sony|gameboy|bmw)(-|$)"
)
VAGUE_TITLE = re.compile(
    r"hash|clipart by|^part of|theme$|collection|icons?$|@|http|untitled|^\W*$|\d{3,}|cliparts$|^svg ", re.IGNORECASE
)


class RowFields(TypedDict, total=False):
    """The fields of a row that have a default."""

    lang: str
    noise: str
    texts_alt: list[str]
    concept: str
    group: str
    subgroup: str
    dup_group: str
    has_palette: bool


@dataclass
class Row:
    """One pair before and after rendering; `split` names its directory."""

    split: str
    kind: str
    source: str
    licence: str
    caption: str
    url: str
    prefix: str  # icon set, or "" for a file
    name: str  # icon, or the file's path below the raw directory
    lang: str = "en"
    noise: str = ""
    texts_alt: list[str] = field(default_factory=list)
    concept: str = ""
    group: str = ""
    subgroup: str = ""
    dup_group: str = ""
    has_palette: bool = True

    def __post_init__(self) -> None:
        self.caption = re.sub(r"\s+", " ", self.caption).strip()
        self.texts_alt = [text for text in dict.fromkeys(self.texts_alt) if text and text != self.caption][:8]
        # not from the url: the same pair keeps its uid in every tier, whichever package version it comes from
        identity = f"{self.split}|{self.source}|{self.name}|{self.lang}|{self.caption}"
        self.uid = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def list_rows(
    tier: str, raw: Path, icon_sets: dict[str, IconSet], emoji: EmojiNames, versions: dict[str, str], seed: int
) -> Iterator[Row]:
    """Every pair the tier may use, before the cut to its size."""
    sources = packages.load_sources()
    plan, roles = sources["tiers"][tier], sources["roles"]
    licences = plan["licences"]
    allowed = {
        prefix: icon_set
        for prefix, icon_set in icon_sets.items()
        if (icon_set.licence in licences if licences is not None else "NC" not in icon_set.licence)
    }

    def icon_row(prefix: str, name: str, split: str, kind: str, caption: str, **fields: Unpack[RowFields]) -> Row:
        package = "@iconify/json" if "@iconify/json" in versions else f"@iconify-json/{prefix}"
        folder = prefix if package == "@iconify/json" else "icons"
        source, url = f"iconify:{prefix}", f"npm:{package}@{versions[package]}#{folder}/{name}"
        return Row(split, kind, source, allowed[prefix].licence, caption, url, prefix, name, **fields)

    def file_row(
        package: str, licence: str, item: ClipArt, split: str, kind: str, text: str, **fields: Unpack[RowFields]
    ) -> Row:
        url = f"deb:{package}@{versions[package]}#{item.name}"
        fields["group"] = item.name.split("/")[0]
        return Row(split, kind, package, licence, text, url, "", item.path, **fields)

    icons = partial(load_icons, raw, tier)
    yield from _emoji_rows(icons, emoji, allowed, roles, plan, seed, icon_row)
    for prefix in roles["curated_flags"]:
        if prefix in allowed:
            yield from _flag_rows(prefix, visible_icons(icons(prefix)), emoji, icon_row)
    emoji_and_flags = {*roles["curated_emoji"], *roles["pool_emoji"], *roles["curated_flags"]}
    for prefix, icon_set in allowed.items():
        if prefix not in emoji_and_flags and not prefix.startswith(tuple(roles["never_train_prefixes"])):
            is_brand_set = prefix in roles["brand_sets"] or icon_set.category == "Logos"
            yield from _icon_set_rows(icon_set, icons(prefix), is_brand_set, plan["brands"], icon_row)
    if "openclipart-svg" in versions:
        items = list(clip_art.list_open_clip_art(raw))
        if not plan["brands"]:
            items = [item for item in items if not BRAND_NAME.search(as_slug(f"{item.title} {item.name}"))]
        yield from _clip_art_rows(items, partial(file_row, "openclipart-svg", "public-domain"))
    if "tuxpaint-stamps-default" in versions:
        yield from _stamp_rows(clip_art.list_stamps(raw), seed, partial(file_row, "tuxpaint-stamps-default", "GPL-2.0"))


def is_novel(concept: str) -> bool:
    return uniform("novel-concept", concept) < NOVEL_FRACTION


def _emoji_rows(
    icons: Callable[[str], Icons], emoji: EmojiNames, allowed: dict[str, IconSet], roles: Roles,
    plan: Plan, seed: int, icon_row: Callable[..., Row],
) -> Iterator[Row]:  # fmt: skip
    """Emoji by vendor: curated names and keywords, evaluation sets, machine slugs and other languages in the pool."""
    translatable: list[tuple[str, str, str, RowFields]] = []
    vendors = [*roles["curated_emoji"], *roles["pool_emoji"], *roles["evaluation"], *roles["i18n_emoji"]]
    for prefix in dict.fromkeys(vendor for vendor in vendors if vendor in allowed):
        icon_set = icons(prefix)
        code_points_of = emoji.match(icon_set)
        for name in visible_icons(icon_set):
            code_points = code_points_of.get(name, "")
            found = emoji.english.get(code_points)
            if not plan["skin_tones"] and (found.is_toned if found else "skin-tone" in name):
                continue
            fields = _emoji_fields(name, code_points, found, allowed[prefix].has_palette)
            if prefix in roles["evaluation"]:
                if found and not found.is_toned:
                    noise = "novel" if is_novel(found.concept) else ""
                    split = f"eval-{roles['evaluation'][prefix]}"
                    alternatives = [found.keywords]
                    yield icon_row(
                        prefix, name, split, "eval_emoji", found.label, noise=noise, texts_alt=alternatives, **fields
                    )
                continue
            if prefix in roles["curated_emoji"] and found and not is_novel(found.concept):
                label, keywords = found.label, found.keywords
                yield icon_row(prefix, name, "curated", "curated_emoji", label, texts_alt=[keywords], **fields)
                if keywords:
                    kind = "curated_emoji_keywords"
                    yield icon_row(prefix, name, "curated", kind, keywords, texts_alt=[label], **fields)
            if prefix in roles["pool_emoji"]:
                caption = name if uniform(prefix, name) < 0.5 else as_words(name)
                yield icon_row(prefix, name, "pool", "pool_emoji_en", caption, **fields)
            if prefix in roles["i18n_emoji"] and found and not found.is_toned:
                translatable.append((prefix, name, code_points, fields))

    languages = emoji.languages()
    n_wanted = plan["rows"].get("pool_emoji_i18n")
    n_each = len(translatable) if n_wanted is None else -(-n_wanted // len(languages))
    for language in languages:
        names = emoji.language(language)
        drawn = sorted(translatable, key=lambda item: stable_hash(seed, language, *item[:2]))[:n_each]
        for prefix, name, code_points, fields in drawn:
            local = names.get(code_points)
            if local and local.label != emoji.english[code_points].label:
                caption = local.label if uniform(language, name) < 0.6 or not local.keywords else local.keywords
                yield icon_row(prefix, name, "pool", "pool_emoji_i18n", caption, lang=language, noise="lang", **fields)


def _emoji_fields(name: str, code_points: str, found: EmojiName | None, has_palette: bool) -> RowFields:
    group, subgroup = (found.group, found.subgroup) if found else ("", "")
    concept, dup_group = code_points or as_slug(name), code_points or name
    return RowFields(concept=concept, group=group, subgroup=subgroup, dup_group=dup_group, has_palette=has_palette)


def _flag_rows(prefix: str, names: list[str], emoji: EmojiNames, icon_row: Callable[..., Row]) -> Iterator[Row]:
    """Flags filed under country codes, with the country's name as caption."""
    flags = emoji.flags_by_country()
    for name in names:
        code_points = flags.get(name)
        if code_points and not is_novel(code_points):
            label = emoji.english[code_points].label
            fields = {"concept": code_points, "group": "flags", "subgroup": "country-flag", "dup_group": code_points}
            texts_alt = ["flag of " + label.removeprefix("flag: ")]
            yield icon_row(prefix, name, "curated", "curated_flag", label, texts_alt=texts_alt, **fields)


def _icon_set_rows(
    icon_set: IconSet, icons: Icons, is_brand_set: bool, with_brands: bool, icon_row: Callable[..., Row]
) -> Iterator[Row]:
    """An icon set as the web shows it: the machine name, the name in words, or the name behind the set's title."""
    if is_brand_set and not with_brands:
        return
    kind = "pool_brand" if is_brand_set else "pool_color_icon" if icon_set.has_palette else "pool_ui_mono"
    aliases, base_names = icon_aliases(icons), icon_base_names(icons)
    categories = {name: title for title, names in icons.get("categories", {}).items() for name in names}
    for name in visible_icons(icons):
        category = categories.get(name, icon_set.category)
        if not with_brands and (BRAND_NAME.search(name) or re.search("brand|logo", category, re.IGNORECASE)):
            continue
        form = uniform(icon_set.prefix, name, "form")
        words = as_words(name)
        yield icon_row(
            icon_set.prefix, name, "pool", kind,
            name if form < 0.5 else words if form < 0.85 else f"{icon_set.title} {words}",
            noise="brand" if is_brand_set else "",
            texts_alt=[as_words(alias) for alias in aliases.get(name, [])],
            group=category,
            dup_group=f"{icon_set.prefix}:{base_names[name]}",
            has_palette=icon_set.has_palette,
        )  # fmt: skip


def _clip_art_rows(items: list[ClipArt], file_row: Callable[..., Row]) -> Iterator[Row]:
    """Clip art: clean titles are shared out over the three kinds of split, the others are the pool's noise."""
    n_uses = Counter(item.title.lower() for item in items)
    for item in items:
        has_word = re.search(r"[A-Za-z]{3,}", item.title) is not None
        is_clean = has_word and n_uses[item.title.lower()] <= 2 and len(item.title) <= 60
        if is_clean and not VAGUE_TITLE.search(item.title):
            share = uniform("clipart-split", item.title.lower())  # by title: two drawings of one name stay together
            split = "eval-clipart" if share < 0.25 else "curated" if share < 0.75 else "pool"
            kind = {"eval-clipart": "eval_clipart", "curated": "curated_clipart", "pool": "pool_clipart_raw"}[split]
            tags = [as_words(tag) for tag in item.tags if not re.search(r"hash|\d|@|http", tag) and len(tag) < 30]
            alternatives = [", ".join(tags), item.description[:200]]
            title = as_words(item.title)
            yield file_row(item, split, kind, title, texts_alt=alternatives, dup_group=item.title.lower())
        else:
            tags_text = ", ".join(item.tags) or item.title or item.name
            caption = item.title if item.title and uniform("title-or-tags", item.name) < 0.6 else tags_text
            fields = {"noise": "generic_title", "dup_group": item.title.lower()}
            yield file_row(item, "pool", "pool_clipart_raw", caption, **fields)


def _stamp_rows(items: Iterator[ClipArt], seed: int, file_row: Callable[..., Row]) -> Iterator[Row]:
    """Stamps: half of the pictures for evaluation, the others curated in English and in the pool in two languages."""
    for item in items:
        is_glyph = "alphabets/" in item.name or "numbers/" in item.name or item.name.startswith("symbols/")
        if uniform("stamp-split", item.title.lower()) < 0.5 and not is_glyph:
            yield file_row(item, "eval-stamps", "eval_stamp", item.title, dup_group=item.title)
            continue
        yield file_row(item, "curated", "curated_stamp", item.title, dup_group=item.title)
        for lang, text in sorted(item.translations, key=lambda pair: stable_hash(seed, item.name, pair[0]))[:2]:
            if not lang.startswith("en"):
                fields = {"lang": lang, "noise": "lang", "dup_group": item.title}
                yield file_row(item, "pool", "pool_stamp_i18n", text, **fields)


def cut_to_plan(rows: Iterator[Row], plan: Plan, seed: int) -> list[Row]:
    """The tier's number of rows of each kind, drawn by hash; a kind the plan does not number is taken whole.

    A plan that keeps to some licences also lists every kind it wants, so that nothing enters unnoticed.
    """
    kinds: dict[str, list[Row]] = defaultdict(list)
    seen = set()
    for row in rows:
        if row.caption and row.uid not in seen:  # an emoji's only keyword may be its name
            seen.add(row.uid)
            kinds[row.split if row.split.startswith("eval-") else row.kind].append(row)
    chosen: list[Row] = []
    for kind, members in sorted(kinds.items()):
        members.sort(key=lambda row: stable_hash(seed, "cut", row.uid))
        chosen += members[: plan["rows"].get(kind, 0 if plan["licences"] is not None else None)]
    return sorted(chosen, key=lambda row: stable_hash(seed, "order", row.uid))
