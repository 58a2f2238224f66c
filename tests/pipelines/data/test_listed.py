"""Lists of uids, URLs and hashes in the forms in which people and programs write them."""

import bz2
import gzip
import lzma
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import listed, rules, uid_lists

UIDS = [f"{i:08x}{'ab' * 12}" for i in (1, 2, 3)]
URLS = ["http://x/1.jpg", "https://y/a,b.jpg?c=d;e", "http://z/%20.png"]
MD5 = [f"{i:032x}" for i in (7, 8, 9)]
DASHED = [str(uuid.UUID(uid)) for uid in UIDS]
PLAIN = "\n".join(UIDS)
CSV = "\n".join(f'"{uid}","a reason, and {url}","{md5}"' for uid, url, md5 in zip(UIDS, URLS, MD5, strict=True))


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "data",
    [
        PLAIN.encode(),
        PLAIN.upper().replace("\n", "\r\n\r\n").encode("utf-8-sig"),
        ("\n".join(DASHED) + "\n").encode("utf-16"),
        PLAIN.encode("utf-16-be"),
        b"\xff\xfe" + PLAIN.encode("utf-16-le"),
        PLAIN.encode("utf-32"),
        "\n".join(f"{{{uid.upper()}}}" for uid in DASHED).encode(),
        "\n".join(f"urn:uuid:{uid}" for uid in DASHED).encode(),
        "\n".join(f"  0x{uid} " for uid in UIDS).encode(),
        CSV.encode(),
        f"UID,reason,md5\n{CSV}".encode(),
        f"md5;uid\n{chr(10).join(f'{m};{u}' for m, u in zip(MD5, UIDS, strict=True))}".encode(),
        "\n".join(f"{i}\t{uid}\tgone" for i, uid in enumerate(UIDS)).encode(),
        "\n".join(f"{uid} gone" for uid in UIDS).encode(),
        "[\n" + ",\n".join(f'  "{uid}"' for uid in UIDS).encode().decode() + "\n]\n",
        gzip.compress(PLAIN.encode("utf-16")),
        bz2.compress(PLAIN.encode()),
        lzma.compress(CSV.encode()),
        zstd(PLAIN.encode()),
    ],
)
def test_a_list_of_uids_is_read_in_whichever_form(tmp_path: Path, data: bytes | str):
    (tmp_path / "list.txt").write_bytes(data.encode() if isinstance(data, str) else data)
    assert listed.entries(f"{tmp_path}/list.txt", "uid") == UIDS
    assert uid_lists.from_file(f"{tmp_path}/list.txt").tolist() == [[int(u[:16], 16), int(u[16:], 16)] for u in UIDS]


@pytest.mark.parametrize(
    "columns",
    [
        {"uid": UIDS},
        {"note": ["a", "b", "c"], "md5": MD5, "UID": UIDS},
        {"note": ["a", None, "c"], "id": DASHED, "md5": MD5},
        {"x": pa.array([bytes.fromhex(uid) for uid in UIDS], pa.binary(16))},
        {"x": pa.array([bytes.fromhex(uid) for uid in UIDS], pa.uuid())},
        {"x": [uid.encode() for uid in UIDS]},
        {"x": pa.array(UIDS).dictionary_encode()},
        {"x": pa.array([[uid] for uid in UIDS])},
    ],
)
def test_a_list_of_uids_in_parquet_is_the_column_that_has_them(tmp_path: Path, columns: dict):
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    assert listed.entries(f"{tmp_path}/list.parquet", "uid") == UIDS


@pytest.mark.parametrize(
    "array",
    [
        np.array(UIDS),
        np.array([uid.encode() for uid in UIDS]),
        np.array(DASHED),
        np.array([(int(u[:16], 16), int(u[16:], 16)) for u in UIDS], np.dtype("u8,u8")),
        np.array([(int(u[:16], 16), int(u[16:], 16)) for u in UIDS], np.dtype([("high", ">u8"), ("low", ">u8")])),
        np.array([(int(u[:16], 16), int(u[16:], 16)) for u in UIDS], np.uint64),
    ],
)
def test_a_list_of_uids_in_npy(tmp_path: Path, array: np.ndarray):
    np.save(tmp_path / "list.npy", array)
    (tmp_path / "list.npy.gz").write_bytes(gzip.compress((tmp_path / "list.npy").read_bytes()))
    for name in ("list.npy", "list.npy.gz"):
        high, low = rules.subset(f"{tmp_path}/{name}")
        assert [f"{h:016x}{v:016x}" for h, v in zip(high.tolist(), low.tolist(), strict=True)] == UIDS


def test_urls_keep_their_commas_and_hashes_their_column(tmp_path: Path):
    for name, text in {
        "plain.txt": "\n".join(URLS),
        "quoted.txt": "\n".join(f'"{url}"' for url in URLS),
        "named.csv": "id,url\n" + "\n".join(f'{i},"{url}"' for i, url in enumerate(URLS)),
        "tabs.tsv": "\n".join(f"{i}\t{url}\twhy not" for i, url in enumerate(URLS)),
    }.items():
        (tmp_path / name).write_text(text)
        assert listed.entries(f"{tmp_path}/{name}", "url") == URLS
    (tmp_path / "hashes.csv").write_text(
        "uid,MD5\n" + "\n".join(f"{u},{m.upper()}" for u, m in zip(UIDS, MD5, strict=True))
    )
    assert listed.entries(f"{tmp_path}/hashes.csv", "hash") == MD5
    np.save(tmp_path / "hashes.npy", np.array([-5, 2**62]))  # LAION's
    assert listed.entries(f"{tmp_path}/hashes.npy", "hash") == ["-5", str(2**62)]


@pytest.mark.parametrize(
    ("content", "by", "match"),
    [
        ("\n".join(URLS), "uid", r"none of its 3 entries is a uid \(32 hex digits\), such as 'http.*set `by: url`"),
        ("17\n18\n", "uid", r"such as '17'.*set `by: hash`"),
        ("\n".join(uid[:31] for uid in UIDS), "uid", "none of its 3 entries"),
        ("some red cats\nmy dog\n", "hash", "none of its 2 entries is a hash"),
        (PLAIN, "url", r"is a URL.*set `by: uid`"),
        ('{"uids": []}', "uid", "correct the list"),
        (b"\x1f\x8b\x08damaged", "uid", "is damaged.*replace it"),
        (gzip.compress(PLAIN.encode(), mtime=0)[:-20], "uid", "is damaged"),
        (b"PAR1damaged", "url", "is damaged"),
        (b"PK\x03\x04 a spreadsheet", "uid", "none of its"),
        (b"\x93NUMPY\x01\x00", "url", "is damaged"),
    ],
)
def test_a_list_that_can_match_nothing_is_refused(tmp_path: Path, content: str | bytes, by: str, match: str):
    (tmp_path / "list").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=rf"list[: ].*{match}"):
        rules.deny_list(f"{tmp_path}/list", by)


def test_entries_of_another_form_are_said(tmp_path: Path, capsys):
    (tmp_path / "list.txt").write_text(f"{PLAIN}\nfourth\n")
    assert listed.entries(f"{tmp_path}/list.txt", "uid") == UIDS
    assert "1 of 4 entries are no uid (32 hex digits), such as 'fourth'" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "list.txt").write_text("\n\n")
    assert listed.entries(f"{tmp_path}/list.txt", "uid") == []


def test_of_columns_that_look_like_hashes_the_longest_counts(tmp_path):
    (tmp_path / "l.csv").write_text("row,md5sum\n" + "\n".join(f"{i},{md5}" for i, md5 in enumerate(MD5)))
    assert listed.entries(str(tmp_path / "l.csv"), "hash")[1:] == MD5
