"""Ingest of LAION's metadata, with pictures from a local web server that also fails in many ways."""

import datetime
import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jest_core import run_file
from pipelines.base import storage
from pipelines.data import catalogue, ingest, outcomes
from pipelines.data.layouts import open_shard
from pipelines.data.shards import derive_uid
from tests import layouts
from tests.commands import Command, command, finish, write
from tests.websites import Website

ODD = [
    "missing",
    "hang",
    "drip",
    "huge",
    "endless",
    "short/5",
    "loop",
    "page",
    "file",
    "noai/1",
    "forbidden/2",
    "flaky/3",
    "flaky/4",
]
ODD_KINDS = {name.split("/")[0] for name in ODD}
ERRORS = {
    "HTTP Error 404: Not Found": 1,
    "timed out": 1,
    "slower than 5 seconds": 1,
    "ended early": 1,
    "larger than 1,000,000 bytes": 2,
    "Image decoding error": 1,
    "Use of image disallowed by X-Robots-Tag directive": 2,
    "HTTP Error 503: Service Unavailable": 2,
    "HTTP Error 302: Found - Redirection to url 'file:///etc/hostname' is not allowed": 1,
    "HTTP Error 302: The HTTP server returned a redirect error that would lead to an ": 1,
}


@pytest.fixture
def site() -> Iterator[Website]:
    pictures = []
    for pair in layouts.make_pairs():
        Image.open(io.BytesIO(pair.image)).convert("RGB").save(sink := io.BytesIO(), "JPEG", quality=95)
        pictures.append(sink.getvalue())
    website = Website(pictures)
    yield website
    website.close()


def metadata(folder: str, address: str) -> list[dict]:
    """Write two parts as LAION publishes them, one with heights as floats; their rows."""
    pairs, rows = layouts.make_pairs(), []
    names = [f"ok/{i}" for i in range(30)] + [f"redirect/{i}" for i in range(30, 34)] + ODD
    for i, name in enumerate(names):
        rows.append(
            {
                "SAMPLE_ID": 1000 + i,
                "URL": f"{address}/{name}",
                "TEXT": pairs[i % len(pairs)].caption,
                "HEIGHT": 64,
                "WIDTH": 64,
                "LICENSE": "?",
                "NSFW": "NSFW" if i == 0 else "UNLIKELY",
                "similarity": 0.1 if i == 1 else 0.31,
                "CRAWLED": datetime.datetime(2024, 2, 29, tzinfo=datetime.UTC),
                "THUMBNAIL": b"\xff\xd8",
                "aesthetic": float("nan"),
            }
        )
    rows.append(rows[5] | {"SAMPLE_ID": 1, "URL": "file:///etc/hostname"})
    for part, chosen in enumerate((rows[:20], rows[20:])):
        table = pa.Table.from_pylist(chosen)
        if part:
            table = table.set_column(3, "HEIGHT", table["HEIGHT"].cast(pa.float64()))
        sink = io.BytesIO()
        pq.write_table(table, sink)
        storage.write_bytes(f"{folder}/laion/part-{part:05d}-c000.snappy.parquet", sink.getvalue())
    storage.write_bytes(f"{folder}/deny.txt", f"{address}/ok/2\n".encode())
    return rows


SETTINGS = """{urls: "laion/*.parquet", shards: fetched, rows_per_shard: 12, image_size: 48, timeout_seconds: 3,
 max_seconds: 5, max_bytes: 1000000, private_addresses: true, threads: 16, user_agent_token: jest, n_tasks: 2,
 rules: [{rule: nsfw}, {rule: similarity, at_least: 0.28}, {rule: deny, file: deny.txt, by: url}]}"""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "output_format"), [("local", "webdataset"), ("s3", "parquet")])
def test_lists_of_urls_become_shards(
    ray_session, request, make_run, tmp_path, site: Website, where: str, output_format: str
):
    root = str(tmp_path) if where == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    rows = metadata(root, site.address)
    suffix = "tar" if output_format == "webdataset" else "parquet"
    shards = f"data.shards=fetched/*.{suffix}"
    run = make_run("joint", f"ingest={SETTINGS}", f"ingest.output_format={output_format}", shards, root=root)
    manifest = ingest.run_stage(run)
    directory = f"{root}/fetched"
    assert manifest["rows"] == {"kept": 44, "url": 1, "nsfw": 1, "similarity": 1, "deny": 1}
    (first,) = manifest["passes"]
    assert first["reasons"] == {"success": 31, **ERRORS}
    assert not [path for path in site.requests if path in ("/ok/0", "/ok/1", "/ok/2")]

    # downloaded pictures can be catalogued by their uids; the others have an error
    sizes = {}
    for name in storage.names(directory, f".{suffix}"):
        shard = open_shard(f"{directory}/{name}")
        for group in range(len(shard.row_group_sizes)):
            for uid, image in zip(shard.uids(group), shard.images(group).to_pylist(), strict=True):
                if image is not None:
                    sizes[uid] = max(Image.open(io.BytesIO(image)).size)
    assert set(sizes.values()) == {48}
    by_uid = {derive_uid(row["URL"], row["TEXT"]): row for row in rows}
    assert {by_uid[uid]["SAMPLE_ID"] for uid in sizes} == {row["SAMPLE_ID"] for row in rows[3:34]}
    kept = catalogue.run_stage(run).manifest
    assert kept["counts"]["kept"] == 31
    table = storage.open_parquet(f"{directory}/00000.parquet").read().to_pylist()
    assert {"SAMPLE_ID", "NSFW", "similarity", "LICENSE", "uid", "sha256", "error_message"} <= table[0].keys()
    assert (table[0]["CRAWLED"], table[0]["aesthetic"]) == ("2024-02-29 00:00:00.000000", None)

    # a second run requests nothing; an unfinished shard is the only one repeated
    requests = site.requests.total()
    assert ingest.run_stage(run)["passes"] == manifest["passes"]
    assert site.requests.total() == requests
    storage.remove(f"{directory}/00001_stats.json")
    ingest.run_stage(run)
    assert site.requests.total() - requests == 5  # the second list of the first part

    # retry what failed: the server has recovered for two, and pictures whose owner opted out are not requested
    requests = Counter(site.requests)
    again = ingest.run_stage(run, retry_failed=True)
    assert [each["urls"] for each in again["passes"]] == [44, 10]
    assert again["passes"][1]["reasons"]["success"] == 2
    assert {path.split("/")[1] for path in site.requests - requests} == ODD_KINDS - {"noai", "forbidden", "page"}
    assert again["shards"] == manifest["shards"] + 1
    more = make_run("joint", f"ingest={SETTINGS}", shards, "data.catalogue=catalogue-again", root=root)
    assert catalogue.run_stage(more).manifest["counts"]["kept"] == 33


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_ingest_repeats_only_unfinished_shards(make_run, tmp_path, site: Website):
    rows = [{"URL": f"{site.address}/ok/{i % 30}?{i}", "TEXT": f"picture {i}"} for i in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "urls.parquet")
    settings = "{urls: urls.parquet, shards: fetched, rows_per_shard: 5, n_tasks: 2, private_addresses: true}"
    slowly = "ingest.requests_per_host_per_second=10"
    run = make_run("joint", f"ingest={settings}", slowly, "data.shards=fetched/*.tar")
    directory, words = str(tmp_path / "fetched"), command("ingest", write(run, tmp_path))
    with Command(tmp_path / "log", *words) as first:
        first.wait_until(lambda: len(storage.names(directory, "_stats.json")) >= 3)
        first.kill()
    done = {name.removesuffix("_stats.json") for name in storage.names(directory, "_stats.json")}
    assert 3 <= len(done) < 12
    requests = Counter(site.requests)
    finish(*words)
    fetched = {5 * int(shard) + i for shard in done for i in range(5)}
    again = [path for path in site.requests - requests if int(path.partition("?")[2]) in fetched]
    assert not again  # finished shards are not downloaded again
    shards = [open_shard(f"{directory}/{name}") for name in storage.names(directory, ".tar")]
    uids = [uid for shard in shards for group in range(len(shard.row_group_sizes)) for uid in shard.uids(group)]
    assert sorted(uids) == sorted(derive_uid(row["URL"], row["TEXT"]) for row in rows)


def test_datacomps_hashes_are_checked_and_faces_are_blurred(ray_session, make_run, tmp_path, site: Website):
    right = hashlib.sha256(site.pictures[0]).hexdigest()
    rows = [
        {
            "uid": f"{i:032x}",
            "url": f"{site.address}/ok/0?{i}",
            "text": "a drawing",
            "sha256": digest,
            "face_bboxes": boxes,
        }
        for i, (digest, boxes) in enumerate([(right, []), (right, [[0.1, 0.1, 0.9, 0.9]]), ("0" * 64, [])])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "datacomp.parquet")
    part = (
        "{urls: datacomp.parquet, shards: fetched, private_addresses: true, verify_hash: true, blur_boxes: face_bboxes}"
    )
    run = make_run("joint", f"ingest={part}", "ingest.output_format=parquet", "data.shards=fetched")
    assert ingest.run_stage(run)["passes"][0]["reasons"] == {"success": 2, "hash mismatch": 1}
    plain, blurred, other = pq.read_table(tmp_path / "fetched/00000.parquet").sort_by("uid").to_pylist()
    assert [row["uid"] for row in (plain, blurred, other)] == [row["uid"] for row in rows]
    assert plain["jpg"] != blurred["jpg"]
    assert other["jpg"] is None


def test_invalid_ingest_settings_are_refused(make_run, tmp_path, site: Website):
    metadata(str(tmp_path), site.address)
    with pytest.raises(ValueError, match="no `ingest` part"):
        ingest.run_stage(make_run("joint"))
    with pytest.raises(ValueError, match=r"data\.shards .* has nothing of ingest\.shards fetched"):
        make_run("joint", f"ingest={SETTINGS}")
    with pytest.raises(ValueError, match="`duplicate` is one of a catalogue"):
        make_run("joint", "ingest={urls: x, shards: fetched, rules: [{rule: duplicate}]}", "data.shards=fetched")


def test_an_ingest_that_fetches_nothing_is_no_success(
    ray_session, make_run, tmp_path, site: Website, capsys, monkeypatch
):
    rows = [{"URL": f"{site.address}/ok/{i}", "TEXT": f"picture {i}"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "urls.parquet")

    def run(settings: str = "", shards: str = "fetched") -> run_file.Run:
        part = f"ingest={{urls: urls.parquet, n_tasks: 1, shards: {shards}{settings}}}"
        return make_run("joint", part, f"data.shards={shards}/*.tar")

    directory = tmp_path / "fetched"
    directory.mkdir()
    (directory / "00000_stats.json").write_text("{}")
    with pytest.raises(ValueError, match=r"another download \(00000_stats\.json, 1 in all\)"):
        ingest.run_stage(run())
    (directory / "00000_stats.json").unlink()
    (tmp_path / "deny.csv").write_text("url,why\nhttp://nowhere/1,gone\n")
    strict = run(", rules: [{rule: deny, by: url, file: deny.csv}, {rule: caption, min_words: 9}]")
    for _ in range(2):  # what failed claims nothing
        with pytest.raises(ValueError, match=r"keep no row .* \(dropped by caption 3\)"):
            ingest.run_stage(strict)
        assert "deny.csv: none of the list's 1 entries is among the 3 rows" in capsys.readouterr().out
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"0 of 3 .* \(3 address of a private network\): .*ingest\.private_addresses"
        ):
            ingest.run_stage(run())
    assert not site.requests
    assert not ingest.manifests.is_finished(str(directory))
    monkeypatch.setattr(ingest, "_ENOUGH", 2)
    with pytest.raises(ValueError, match="0 of 2 pictures fetched"):  # the third is not tried
        ingest.run_stage(run(", rows_per_shard: 1", shards="other"))
    monkeypatch.undo()
    manifest = ingest.run_stage(run(", private_addresses: [127.0.0.0/8]"), retry_failed=True)
    assert [each["reasons"] for each in manifest["passes"]] == [{"address of a private network": 3}, {"success": 3}]
    assert "3 of 3 pictures fetched" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("<urlopen error [Errno 111] Connection refused>", "[Errno 111] Connection refused"),
        ("<urlopen error _ssl.c:989: The handshake operation timed out>", "The handshake operation timed out"),
        (
            "URL can't contain control characters. '/a b.jpg' (found at least ' ')",
            "URL can't contain control characters.",
        ),
        (
            "'ascii' codec can't encode characters in position 14-16: ordinal",
            "'ascii' codec can't encode characters in position : ordinal",
        ),
        ("cannot read <_io.BytesIO object at 0x7f01>", "cannot read _io.BytesIO"),
        (
            "OpenCV(4.14.0) /io/loadsave.cpp:79: error: (-215:Assertion failed) pixels <= CV_IO_MAX_IMAGE_PIXELS in "
            "function 'validateInputImageSize'\n",
            "more pixels than ingest.max_pixels",
        ),
    ],
)
def test_reasons_are_without_what_differs_between_pictures(message: str, reason: str):
    assert outcomes._reason(message) == reason


def test_a_picture_counts_that_is_in_the_shard(tmp_path):
    """img2dataset counts what it fetched, also where it could not write it."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("1.jpg", "1.txt", "2.jpg", "2.json", "3.txt"):
            tar.addfile(tarfile.TarInfo(name))
    pq.write_table(pa.table({"jpg": [b"a", None, b"b"], "key": ["1", "2", "3"]}), tmp_path / "1.parquet")
    tars, parquet = (run_file.Ingest(urls="x", shards="y", output_format=kind) for kind in ("webdataset", "parquet"))
    assert ingest._n_stored(f"{tmp_path}/0", tars) == 2
    assert ingest._n_stored(f"{tmp_path}/1", parquet) == 2
    stats = outcomes.Stats(count=5, successes=4, status_dict={"success": 4, "hash mismatch": 1})
    assert outcomes.corrected(stats, 4) == stats
    assert outcomes.corrected(stats, 1) == {
        "count": 5,
        "successes": 1,
        "status_dict": {"success": 1, "fetched, but not stored": 3, "hash mismatch": 1},
    }
