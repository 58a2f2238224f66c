"""Tars of other tools: what is unusual in a sample changes no other, captions are found, and samples stay apart."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jest_core.examples.decode import View
from jest_core.run_file import Run
from pipelines.base import storage
from pipelines.data import rules, tar_index
from pipelines.data.layouts import open_shard
from pipelines.data.shards import Shard, derive_uid

Members = list[tuple[str, bytes]]


def picture(i: int, kind: str = "JPEG") -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), (i % 256, 7 * i % 256, 90)).save(sink, kind)
    return sink.getvalue()


def tar_of(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> str:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def samples(fields: list[object]) -> Members:
    """A picture and a .json for each."""
    data = [f if isinstance(f, bytes) else json.dumps(f).encode() for f in fields]
    return [pair for i, d in enumerate(data) for pair in ((f"{i:04d}.jpg", picture(i)), (f"{i:04d}.json", d))]


def indexed(path: str) -> Shard:
    tar_index.write_index(path, f"{path}.index")
    return open_shard(path, {}, f"{path}.index")


UNUSUAL = [
    float("nan"), 12, 10**30, 10**400, -0.5, True, None, ["a", 3], [], {"en": "a cat"}, [[["deep"]]], "\ud800 half",
    float("inf"), "x\0y", "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("group_rows", [5, 1024])
@pytest.mark.parametrize("name", ["caption", "url", "NSFW", "punsafe", "width"])
def test_an_unusual_json_value_changes_no_other_row(name, group_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "GROUP_ROWS", group_rows)
    usual = [
        {"caption": f"cat {i}", "url": f"http://a/{i}", "NSFW": "UNLIKELY", "punsafe": i / 100, "width": 300 + i}
        for i in range(2 * len(UNUSUAL) + 2)
    ]
    odd = [
        fields | {name: UNUSUAL[i // 2]} if i % 2 and i < 2 * len(UNUSUAL) else fields for i, fields in enumerate(usual)
    ]
    whole, shard = (open_shard(tar_of(tmp_path / f"{n}.tar", samples(list(f)))) for n, f in (("a", usual), ("b", odd)))
    expected, got = rows_of(whole), rows_of(shard)
    assert got[::2] == expected[::2]
    assert got[2 * len(UNUSUAL) :] == expected[2 * len(UNUSUAL) :]
    pa.array([row[0] for row in got], pa.string())  # what examples are made of
    if name == "punsafe":
        counted = [value for values in shard.no_numbers.values() for value in values]
        assert counted == ["a", "{'en': 'a cat'}", "deep", "\ufffd half", "xy"]


def rows_of(shard: Shard) -> list[tuple]:
    """Caption, uid, label and score of each row."""
    rows: list[tuple] = []
    for g in range(len(shard.row_group_sizes)):
        scores = shard.numbers(g, "unsafe")
        rows += zip(shard.captions(g), shard.uids(g), shard.strings(g, "nsfw"), scores, strict=True)
    return rows


def test_a_huge_number_in_a_json_is_carried(tmp_path):
    lines = [b'{"caption": "a", "n": %s, "m": 1e999}' % (b"7" * 6000), b'{"caption": "line\nbreak"}', b'{"caption": 5}']
    shard = open_shard(tar_of(tmp_path / "a.tar", samples(lines)))
    assert shard.captions(0) == ["a", "line\nbreak", "5"]
    assert shard.strings(0, "n")[0] == "7" * 6000
    assert shard.numbers(0, "m")[0] == np.inf


def test_rules_match_what_is_beside_an_unusual_value(tmp_path, make_run):
    fields = [
        {"caption": f"cat {i}", "url": f"http://a/{i}", "NSFW": "NSFW" if i % 2 else "UNLIKELY"} for i in range(40)
    ]
    fields[3] |= {"NSFW": float("nan"), "url": 12}
    shard = open_shard(tar_of(tmp_path / "a.tar", samples(list(fields))))
    storage.write_bytes(str(tmp_path / "deny.txt"), b"http://a/0\nhttp://a/7\n")
    run: Run = make_run("x", f"data.rules=[{{rule: deny, file: {tmp_path}/deny.txt, by: url}}, {{rule: nsfw}}]")
    lists = rules.load_lists(run)
    kept = [rules.apply(rule, shard, 0, shard.uids(0), lists).sum() for rule in run.data.rules]
    assert kept == [38, 20]


CAPTIONS: dict[str, tuple[str, bytes]] = {
    "LAION's": ("json", b'{"TEXT": "a cat"}'),
    "several": ("json", b'{"texts": ["", null, "a cat", "a dog"]}'),
    "second choice": ("json", b'{"caption": " ", "text": null, "top_caption": "a cat"}'),
    "byte-order mark": ("json", b'\xef\xbb\xbf{"caption": "a cat"}'),
    "UTF-16": ("json", '{"caption": "a cat"}'.encode("utf-16")),
    "a list": ("json", b'["a cat", "a dog"]'),
    "a list of mappings": ("json", b'[{"caption": "a cat"}, {"caption": "a dog"}]'),
    "a text": ("json", b'"a cat"'),
    "long json": ("json", json.dumps({"embedding": "1 " * (1 << 20), "caption": "a cat", "n": [0] * 300_000}).encode()),
    "txt with mark": ("txt", b"\xef\xbb\xbfa cat"),
    "txt of Windows": ("txt", "a cat".encode("utf-16")),
    "another suffix": ("caption", b"a cat"),
    "upper case": ("TXT", b"a cat"),
}


@pytest.mark.parametrize("how", CAPTIONS)
def test_captions_are_found(how, tmp_path):
    suffix, data = CAPTIONS[how]
    members = [("0.jpg", picture(0)), (f"0.{suffix}", data), ("1.jpg", picture(1)), ("1.txt", b"other")]
    assert indexed(tar_of(tmp_path / "a.tar", members)).captions(0) == ["a cat", "other"]


def test_the_first_mebibyte_of_a_long_text_is_its_caption(tmp_path):
    shard = indexed(tar_of(tmp_path / "a.tar", [("0.jpg", picture(0)), ("0.txt", b"cat " * (1 << 20))]))
    assert shard.captions(0) == ["cat " * (1 << 18)]


@pytest.mark.parametrize("order", ["pictures first", "texts first", "by kind in folders", "interleaved"])
def test_members_of_a_sample_may_be_apart(order, tmp_path):
    keys = [f"d/{i:02d}" for i in range(30)]
    pictures = [(f"{key}.jpg", picture(i)) for i, key in enumerate(keys)]
    texts = [(f"{key}.txt", f"cat {i}".encode()) for i, key in enumerate(keys)]
    members = {
        "pictures first": pictures + texts,
        "texts first": texts[::-1] + pictures,
        "by kind in folders": pictures[:10] + texts[5:] + pictures[10:] + texts[:5],
        "interleaved": [m for i in range(30) for m in (pictures[i], texts[(i + 7) % 30])],
    }[order]
    shard = indexed(tar_of(tmp_path / "a.tar", members))
    got = dict(zip(shard.captions(0), shard.images(0).to_pylist(), strict=True))
    assert got == {f"cat {i}": picture(i) for i in range(30)}


def test_members_apart_are_not_joined_where_keys_start_again(tmp_path):
    """Two tars in one: in the first the text of b is lost, in the second its picture."""
    members = [("a.jpg", picture(0)), ("a.txt", b"0"), ("b.jpg", picture(1)), ("c.jpg", picture(2)), ("c.txt", b"2")]
    members += [("a.jpg", picture(3)), ("a.txt", b"3"), ("b.txt", b"of another"), ("c.jpg", picture(4))]
    shard = indexed(tar_of(tmp_path / "a.tar", members))
    assert shard.captions(0) == ["0", "", "2", "3", "of another", ""]
    assert shard.images(0).to_pylist() == [picture(0), picture(1), picture(2), picture(3), None, picture(4)]
    assert len(set(shard.uids(0))) == 6


DOTS: dict[str, tuple[list[str], list[tuple[str, str]]]] = {
    "dots in base names": (["a.b.jpg", "a.b.txt", "a.c.jpg", "a.c.txt"], [("a.b", "a.b.txt"), ("a.c", "a.c.txt")]),
    "versions": (["v1.0.1.jpg", "v1.0.1.txt", "v1.0.2.jpg", "v1.0.2.txt"], [("v1.0.1",) * 2, ("v1.0.2",) * 2]),
    "pictures first": (["a.b.jpg", "a.c.png", "a.b.txt", "a.c.txt"], [("a.b", "a.b.txt"), ("a.c", "a.c.txt")]),
    "one input": (["s.input.jpg", "s.txt", "t.input.png", "t.txt"], [("s", "s.txt"), ("t", "t.txt")]),
    "input with its text": (["s.input.jpg", "s.input.txt"], [("s", "s.input.txt")]),
    "mask": (["g.seg.png", "g.jpg", "g.txt"], [("g", "g.txt")]),
    "two views": (["g.left.png", "g.right.jpg", "g.txt"], [("g.left", "g.txt"), ("g.right", "g.txt")]),
    "copies": (["cat.jpg", "cat.txt", "cat.1.jpg", "cat.1.txt"], [("cat", "cat.txt"), ("cat.1", "cat.1.txt")]),
    "same name twice": (["a.jpg", "a.txt", "a.jpg", "a.txt"], [("a", "a.txt"), ("a", "a.txt")]),
    "folders with dots": (["x.y/a.jpg", "x.y/a.txt", "x.y/b.jpg"], [("x.y/a", "x.y/a.txt"), ("x.y/b", "")]),
}


@pytest.mark.parametrize("case", DOTS)
def test_base_names_with_dots(case, tmp_path):
    names, expected = DOTS[case]
    if case == "versions":
        expected = [(key, f"{key}.txt") for key, _ in expected]
    members = [(name, name.encode() if name.endswith("txt") else picture(i)) for i, name in enumerate(names)]
    shard = indexed(tar_of(tmp_path / "a.tar", members))
    assert list(zip(shard.strings(0, "key"), shard.captions(0), strict=True)) == expected
    assert None not in shard.images(0).to_pylist()
    assert len(set(shard.uids(0))) == len(expected)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PNG", "WEBP", "AVIF"])
def test_pictures_of_every_kind_are_found(kind, tmp_path):
    members = [(f"a.{kind}", picture(1, kind)), ("a.txt", b"cat"), (f"b.{kind.lower()[:3]}", picture(2, kind))]
    images = indexed(tar_of(tmp_path / "a.TAR", members)).images(0).to_pylist()
    assert images == [picture(1, kind), None if kind in ("WEBP", "AVIF") else picture(2, kind)]
    View(8)(images[0])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, "old GNU"])
@pytest.mark.parametrize("length", [99, 100, 101, 150])
def test_names_about_as_long_as_their_field(length, form, tmp_path):
    name = f"{'d' * 60}/{'n' * (length - 65)}.jpg"
    assert len(name) == length
    path = tmp_path / "a.tar"
    if form == "old GNU":  # it ends the field with a NUL: a name of 100 bytes has a member of its own
        info = tarfile.TarInfo(name)
        info.size = len(picture(0))
        long = tarfile.TarInfo._create_gnu_long_header(name, tarfile.GNUTYPE_LONGNAME, "utf-8", "surrogateescape")
        info.name = name[:99]
        body = picture(0) + bytes(-len(picture(0)) % 512)
        path.write_bytes(long + info.tobuf(tarfile.GNU_FORMAT) + body + bytes(1024))
    else:
        tar_of(path, [(name, picture(0))], form)
    assert indexed(str(path)).images(0).to_pylist() == [picture(0)]


def test_keys_that_start_again_in_each_tar_name_no_sample(tmp_path):
    """A tar per class, keys from 0 in each, the class as caption; equal pictures of other keys stay apart too."""
    uids = []
    for name, start in (("a", 0), ("b", 40), ("c", 80)):
        members = [m for i in range(40) for m in ((f"{i:06d}.jpg", picture(start + i)), (f"{i:06d}.txt", b"cat"))]
        uids += indexed(
            tar_of(tmp_path / f"{name}.tar", [*members, ("40.jpg", picture(5)), ("41.jpg", picture(5))])
        ).uids(0)
    assert len(set(uids)) == 3 * 40 + 2  # the last two of each tar are the same samples
    assert open_shard(str(tmp_path / "a.tar")).uids(0) == uids[:42]  # with an index or without


def test_urls_and_uids_name_samples_as_before_and_their_pictures_are_not_hashed(tmp_path):
    fields = [{"url": "http://a/0", "caption": "c"}, {"uid": "A" * 32, "caption": "c"}, {"url": None, "caption": "c"}]
    path = tar_of(tmp_path / "a.tar", samples(list(fields)))
    shard = indexed(path)
    uids = shard.uids(0)
    assert uids[:2] == [derive_uid("http://a/0", "c"), "a" * 32]
    digests = pq.read_table(f"{path}.index")["digest"].to_pylist()
    assert digests[:2] == [None, None]
    assert uids[2] == derive_uid(f"0002\x1f{digests[2]}", "c")


def test_pictures_are_hashed_on_the_one_way_through_a_tar(tmp_path, monkeypatch):
    """On S3 a second one would fetch all of it again."""
    back, digest = [], tar_index._digest
    monkeypatch.setattr(
        tar_index,
        "_digest",
        lambda file, offset, size: (back.append(file.tell() > offset), digest(file, offset, size))[1],
    )
    index, _ = tar_index.index_of(tar_of(tmp_path / "a.tar", samples([{"caption": "a"}] * 5)))
    assert back == [False] * 5
    assert len(set(index["digest"].to_pylist()) - {None}) == 5


def test_an_index_of_an_earlier_version_names_samples_as_that_did(tmp_path):
    path = tar_of(tmp_path / "a.tar", samples([{"caption": "c"}] * 3))
    index = f"{path}.index"
    tar_index.write_index(path, index)
    table = pq.read_table(index)
    pq.write_table(table.drop_columns(["digest"]), index, row_group_size=2)
    shard = open_shard(path, {}, index)
    assert shard.row_group_sizes == [2, 1]
    assert shard.uids(0) + shard.uids(1) == [derive_uid(f"{i:04d}", "c") for i in range(3)]


def test_row_groups_are_bounded_by_bytes(tmp_path, monkeypatch):
    """Also by those of members between the pictures, which are read with them."""
    monkeypatch.setattr(tar_index, "GROUP_BYTES", 100_000)
    members = []
    for i in range(12):
        members += [(f"{i}.jpg", picture(i)), (f"{i}.npy", bytes(60_000 if i < 6 else 10)), (f"{i}.txt", b"cat")]
    shard = indexed(tar_of(tmp_path / "a.tar", [*members, ("x.jpg", bytes(200_000)), ("y.jpg", picture(1))]))
    assert shard.row_group_sizes == [2, 2, 2, 6, 1, 1]
    images = [image for g in range(6) for image in shard.images(g).to_pylist()]
    assert images == [*(picture(i) for i in range(12)), bytes(200_000), picture(1)]
