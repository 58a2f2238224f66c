"""The first shards of each source, looked at before Ray starts: what a setting got wrong shows within a second."""

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import islice

from jest_core.run_file import Run
from jest_core.run_file.rules import DenyRule, DuplicateRule, Rule, ScoreRule, SubsetRule

from ..base import storage
from ..base.shard_paths import is_tar
from . import rules
from .layouts import open_shard
from .shards import Shard
from .tars import TarShard

_MEMBERS = 1000  # of a tar that are looked at
_N_COMPARED = 8  # shards whose first rows are compared, at most
_OPTIONAL = ("uid", "id", "url")  # an absent column of these is a way to derive uids from something else
_NONE = "none"  # how messages call an absent column, which no similar name makes a mistake


@storage.retried
def check(run: Run, by_source: Sequence[Sequence[str]]) -> None:
    """Raises ValueError where the first shard of a source is no shard, lacks a column that data.columns or a rule
    names, or has pictures and no captions, and where the ids of rows that only these name start again in each shard.

    by_source: the paths of each source.
    """
    shards = [shard for paths in by_source if (shard := _first(run, paths)) is not None]
    refuse_columns(run.data.columns, shards)
    for shard in shards:
        try:
            _read(run, shard)
        except ValueError:
            if not is_tar(shard.path):
                raise
            _read(run, open_shard(shard.path, run.data.columns))  # a key that few samples have may come later
    for paths in by_source:
        _refuse_restarting_ids(run, paths)


def _first(run: Run, paths: Sequence[str]) -> Shard | None:
    """The first shard of a source that has rows, among its first few; of a tar only what comes first."""
    for path in islice(paths, 4):
        shard = TarShard(path, run.data.columns, None, _MEMBERS) if is_tar(path) else open_shard(path, run.data.columns)
        needed = {column for name, column in run.data.columns.items() if name not in _OPTIONAL}
        if is_tar(path) and not needed <= shard.names:
            shard = open_shard(path, run.data.columns)  # a key that few samples have may come later
        if sum(shard.row_group_sizes):
            return shard
    return None


def refuse_columns(columns: Mapping[str, str], shards: Sequence[Shard]) -> None:
    """Raises ValueError where no shard has a column that data.columns names."""
    for name, column in columns.items():
        if not shards or any(column in shard.names for shard in shards) or (name in _OPTIONAL and column == _NONE):
            continue
        near = get_close_matches(column, sorted(set().union(*(shard.names for shard in shards))), n=1)
        if near or name not in _OPTIONAL:
            remedy = f"did you mean {near[0]}?" if near else f"name another column for {name}, or leave it out"
            raise ValueError(
                f"data.columns names {column} for {name}, and {shards[0].path} has no such column; it has "
                f"{shards[0].listed()}: {remedy}"
            )


def _read(run: Run, shard: Shard) -> None:
    """Read what the catalogue and training need of the first row group. Raises ValueError where the shard lacks it."""
    uids = shard.uids(0)
    if shard.actual("image") is not None:
        shard.captions(0)
    for rule in run.data.rules:
        _read_for(rule, shard, uids)


def _read_for(rule: Rule, shard: Shard, uids: list[str]) -> None:
    match rule:
        case DenyRule():
            if rule.by != "uid":
                shard.strings(0, rule.by)
        case DuplicateRule():
            rules.duplicate_keys(rule, shard, 0, uids)
        case SubsetRule() | ScoreRule(scores=str()):
            pass
        case _:
            rules.apply(rule, shard, 0, uids, {})


def _refuse_restarting_ids(run: Run, paths: Sequence[str]) -> None:
    """Parquet only: in tars a picture's digest is a part of what names a sample."""
    seen: Counter[str] = Counter()
    paths = list(dict.fromkeys(path for path in paths if not is_tar(path)))
    for path in paths[:: -(-len(paths) // _N_COMPARED) or 1]:
        shard = open_shard(path, run.data.columns)
        if not sum(shard.row_group_sizes) or shard.actual("id") is None or shard.actual("uid") or shard.actual("url"):
            return
        seen.update(shard.uids(0))
    if 2 * len(seen) < seen.total():
        raise ValueError(
            f"{paths[0]} and the shards beside it name rows by the column {shard.actual('id')}, in which values come "
            f"again: {seen.total() - len(seen):,} of the first {seen.total():,} rows have the id and caption of another"
            " row. Name a column of uids or URLs in data.columns, or {id: none} to name rows by their pictures"
        )
