"""A tar as webdataset, img2dataset and DataComp write them -> its index: the samples, and where their pictures are.

Nothing is unpacked. A sample is the members whose names are the same up to the first dot of the last part, as in
webdataset: `000010005.jpg`, `000010005.txt`, `000010005.json`. They follow each other, or may be apart in a tar in
which no key comes twice (all pictures first, then all texts). Names are labels only: no path in a tar is ever opened.
"""

import hashlib
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, Required, TypedDict

import pyarrow as pa

from ..base import storage
from .shards import ALIASES, WHOLE_BYTES, clean

INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("member", pa.binary()),  # the picture's name in the tar; null where the sample has no picture
        ("offset", pa.int64()),  # of the picture's first byte
        ("size", pa.int64()),
        ("text", pa.string()),  # the sample's .txt
        ("json", pa.string()),  # the sample's .json, unparsed
        ("digest", pa.string()),  # of the picture, where neither a uid nor a URL names the sample; absent before 0.1.0
    ]
)
NAMES = b"jest.columns"  # in the index's Parquet metadata: JSON list of the keys that the .json members have
GROUP_ROWS = 1024  # samples of a virtual row group, at most
GROUP_BYTES = WHOLE_BYTES  # from its first picture to the end of its last, at most: what reading it takes
HEADER = 512  # bytes of a member's header
IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"}
TEXTS = ("txt", "text", "caption")
_MAX_TEXT = 1 << 20  # bytes: a longer text is cut there, and a longer .json keeps its shorter fields
_MAX_JSON = 64 << 20  # bytes of a .json; a longer one is left out
_HASHED = 1 << 20  # bytes of a picture that its digest is of, with its size
_CHUNK = 1 << 20


class Sample(TypedDict, total=False):
    """A row of INDEX; what the sample lacks is absent. offset and size: of the picture, in bytes of the tar."""

    key: Required[str]
    member: bytes
    offset: int
    size: int
    text: str
    json: str
    digest: str


class _Member(NamedTuple):
    """A regular file of a tar: its name up to the first dot, what follows in lower case, and its text if it is one."""

    key: str
    kind: str
    name: bytes
    offset: int
    size: int
    text: str | None
    digest: str | None  # of a picture, until a uid or a URL names the samples of the tar

    @property
    def stem(self) -> str:
        """What is between the key and the suffix: `b` of `a.b.jpg`."""
        return self.kind.rpartition(".")[0]

    @property
    def suffix(self) -> str:
        return self.kind.rpartition(".")[2]


def write_index(path: str, index: str) -> None:
    """Make the index of a tar in one pass over its headers and texts. Raises ValueError where the tar is not whole."""
    table, group_sizes = index_of(path)
    storage.write_table(index, table, group_sizes)


def index_of(path: str, n_members: int | None = None) -> tuple[pa.Table, list[int]]:
    """The index, and the rows of each virtual row group; n_members: of the first members of the tar only."""
    samples = scan(path, n_members)
    table = pa.Table.from_pylist(samples, schema=INDEX)
    names = sorted({name for sample in samples for name in fields(sample.get("json"))})
    return table.replace_schema_metadata({NAMES: json.dumps(names).encode()}), _group_sizes(samples)


def _group_sizes(samples: Sequence[Sample]) -> list[int]:
    """Rows of each virtual row group."""
    sizes: list[int] = []
    low = high = 0
    for sample in samples:
        place = sample.get("offset", low if sizes else 0)
        end = place + sample.get("size", 0)
        if not sizes or sizes[-1] == GROUP_ROWS or max(high, end) - min(low, place) > GROUP_BYTES:
            sizes.append(0)
            low, high = place, end
        sizes[-1] += 1
        low, high = min(low, place), max(high, end)
    return sizes


def scan(path: str, n_members: int | None = None) -> list[Sample]:
    """The samples of a tar, as rows of INDEX; n_members: of its first members only."""
    fs, inner = storage.filesystem(path)
    with fs.open(inner, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
                members = list(islice(_members(tar, file), n_members))
                if n_members is None:
                    _refuse_more(file, tar.offset)
        except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
            raise ValueError(f"{path} is no tar, or is cut off or damaged: {error}; replace it") from error
        digests = {member.offset: member.digest for member in members if member.digest}
        samples = [sample for group in _joined(_groups(members)) for sample in _samples(group)]
        for sample in samples:
            if "member" in sample and not _is_named(fields(sample.get("json"))):
                known = digests.get(sample["offset"])
                sample["digest"] = known or _digest(file, sample["offset"], sample["size"])
    return samples


def _members(tar: tarfile.TarFile, file: BinaryIO) -> Iterator[_Member]:
    """Pictures are digested where they are passed: a second way through the tar would fetch all of it again."""
    named = False
    for member in tar:
        split = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", member.name, re.DOTALL)  # as webdataset splits it
        if split and member.isreg() and not member.issparse():
            name, kind = member.name.encode("utf-8", "surrogateescape"), split[2].lower()
            suffix = kind.rpartition(".")[2]
            text = _text(tar, member, suffix)
            named = named or (suffix == "json" and _is_named(fields(text)))
            digest = None if named or suffix not in IMAGES else _digest(file, member.offset_data, member.size)
            yield _Member(split[1], kind, name, member.offset_data, member.size, text, digest)
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> str | None:
    if suffix not in (*TEXTS, "json") or (suffix == "json" and member.size > _MAX_JSON):
        return None
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    if suffix != "json":
        return decoded(file.read(_MAX_TEXT))
    text = decoded(file.read())
    if member.size <= _MAX_TEXT:
        return text
    room = _MAX_TEXT // 16
    return json.dumps({name: value for name, value in fields(text).items() if len(json.dumps(value)) <= room})


def decoded(data: bytes) -> str:
    """Bytes as text, in the encoding that a byte-order mark names, or UTF-8."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" in data:
        return clean(data.decode("utf-16", "replace"))
    return clean(data.removeprefix(b"\xef\xbb\xbf"))


def _groups(members: Sequence[_Member]) -> list[list[_Member]]:
    """Members that follow each other with the same key; where a kind comes again, another sample begins."""
    groups: list[list[_Member]] = []
    kinds: set[str] = set()
    for member in members:
        if not groups or groups[-1][0].key != member.key or member.kind in kinds:
            groups.append([])
            kinds = set()
        groups[-1].append(member)
        kinds.add(member.kind)
    return groups


def _joined(groups: list[list[_Member]]) -> list[list[_Member]]:
    """Groups of the same key as one, unless the tar has two members of one name or two pictures of one key apart: then
    keys start again in it, and say nothing of members that are apart."""
    by_key: dict[str, list[list[_Member]]] = defaultdict(list)
    for group in groups:
        by_key[group[0].key].append(group)
    for parts in by_key.values():
        kinds = ["picture" if m.kind in IMAGES else m.kind for part in parts for m in part]
        if len(parts) > 1 and len(set(kinds)) < len(kinds):
            return groups
    return [[member for part in parts for member in part] for parts in by_key.values()]


def _samples(group: list[_Member]) -> Iterator[Sample]:
    """The samples of a group: one for its picture `a.jpg`, and one for each picture `a.b.jpg` that has a text `a.b.txt`
    or, where there is no `a.jpg`, for each of them. Other pictures, such as masks, are left out."""
    by_stem: dict[str, dict[str, _Member]] = defaultdict(dict)
    for member in group:
        by_stem[member.stem].setdefault("picture" if member.suffix in IMAGES else member.suffix, member)
    shared = by_stem.pop("", {})
    dotted = {stem: own for stem, own in by_stem.items() if "picture" in own}
    if "picture" in shared:
        dotted = {stem: own for stem, own in dotted.items() if len(own.keys() & {*TEXTS, "json"})}
    key = group[0].key
    if "picture" in shared or not dotted:
        yield _sample(key, shared)
    alone = len(dotted) == 1 and "picture" not in shared
    for stem, own in dotted.items():
        yield _sample(key if alone else f"{key}.{stem}", shared | own)


def _sample(key: str, members: Mapping[str, _Member]) -> Sample:
    """members: by their suffix; the picture by `picture`."""
    sample: Sample = {"key": clean(key.encode("utf-8", "surrogateescape"))}
    if (picture := members.get("picture")) is not None:
        sample.update({"member": picture.name, "offset": picture.offset, "size": picture.size})
    text = next((members[kind].text for kind in TEXTS if kind in members), None)
    if text is not None:
        sample["text"] = text
    if "json" in members and members["json"].text is not None:
        sample["json"] = members["json"].text
    return sample


def fields(text: str | None) -> dict[str, Any]:
    """The dictionary in a sample's .json, with whatever keys its makers chose: of a list the first; a list of texts, or
    a text, is the caption. Empty where it is none of these."""
    try:
        value = json.loads(text or "{}", strict=False, parse_int=_number)
    except (ValueError, RecursionError):
        return {}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0]
    if isinstance(value, list | str):
        value = {"caption": value}
    return {clean(name): field for name, field in value.items()} if isinstance(value, dict) else {}


def _number(digits: str) -> int | str:
    return int(digits) if len(digits) <= 300 else digits  # Python converts no text of more than 4,300 digits


def _is_named(values: Mapping[str, Any]) -> bool:
    """Whether a uid or a URL names the sample, so that its picture need not."""
    return any(clean(values.get(alias)) for name in ("uid", "url") for alias in ALIASES[name])


def _digest(file: BinaryIO, offset: int, size: int) -> str:
    file.seek(offset)
    return hashlib.blake2b(size.to_bytes(8, "little") + file.read(min(size, _HASHED)), digest_size=16).hexdigest()


def _refuse_more(file: BinaryIO, end: int) -> None:
    """Raises ValueError unless only zeros follow: tarfile stops, without an error, at a header that it cannot read."""
    file.seek(end)
    block = file.read(HEADER)
    if len(block) < HEADER:
        raise ValueError(f"no end-of-archive mark at byte {end}")
    while block:
        if block.count(0) != len(block):
            raise ValueError(f"unreadable header or data after the end, at byte {end}")
        block = file.read(_CHUNK)
