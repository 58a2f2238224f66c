"""Which parts of a run's selection log each checkpoint commits: selection/commits.jsonl, a line for each part.

A line names a part and the step of the checkpoint that commits it. A checkpoint commits the parts of the lines up to
its step, so that readers list the checkpoints and load none. The file is written whole, after the part and before the
checkpoint: lines beyond the newest checkpoint are what a killed run left, and are ignored.
"""

from __future__ import annotations

import json
from typing import TypedDict

from . import checkpoints, storage

FILE = "commits.jsonl"


class Commit(TypedDict):
    """A line. step: finished updates at the checkpoint, one more than the last step of the part."""

    step: int
    part: str  # its file name in selection/


def read(run_dir: str) -> list[str]:
    """Names of the log parts that the newest checkpoint commits, in the order of their steps.

    Earlier versions wrote no such file, or it may be damaged: the checkpoint lists the parts too. Raises
    FileNotFoundError where there is no checkpoint.
    """
    newest = (checkpoints.steps(run_dir) or [0])[-1]
    lines = _lines(path_of(run_dir))
    if newest in {line["step"] for line in lines}:
        return [line["part"] for line in lines if line["step"] <= newest]
    parts: list[str] = checkpoints.read(run_dir)["jest"]["log_parts"]
    return parts


@storage.retried
def _lines(path: str) -> list[Commit]:
    """The lines of the file; none where one is damaged, so that the checkpoint's own list is used."""
    lines, step = storage.read_lines(path), 0
    for line in lines:
        try:
            first, last = steps_of(line["part"])
        except (TypeError, LookupError, ValueError, AttributeError):
            return []
        if first != step or line["step"] != last + 1:  # each part begins where the one before it ends
            return []
        step = last + 1
    return lines


def write(run_dir: str, parts: list[str]) -> None:
    """Name all parts so far, before the checkpoint that commits the last of them; nothing where there are none."""
    lines = [Commit(step=steps_of(part)[1] + 1, part=part) for part in parts]
    if lines:
        storage.write_bytes(path_of(run_dir), "".join(json.dumps(line) + "\n" for line in lines).encode())


def path_of(run_dir: str) -> str:
    return f"{run_dir}/selection/{FILE}"


def steps_of(part: str) -> tuple[int, int]:
    """The first and the last step of a part, which its name says: 00000004-00000007.parquet."""
    first, last = part.removesuffix(".parquet").split("-")
    return int(first), int(last)
