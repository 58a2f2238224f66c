"""What a piece measures, as lines of results.jsonl: each is on disk before the next measurement starts."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line, and wait until it is on disk."""
    with path.open("a") as file:
        file.write(json.dumps(row, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The lines; a last one that was cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


@dataclass
class Results:
    """Where a piece puts its measurements, and what it is asked for."""

    piece: str
    path: Path  # results.jsonl
    scratch: Path  # shared by the pieces of one call, removed afterwards
    device: str = "cpu"
    small: bool = False  # sizes at which everything runs and no time means anything
    deadline: float = float("inf")  # time.monotonic() at which this process is killed
    failed: bool = False

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def row(self, what: str, **values: Any) -> None:
        """One measurement. What is None is left out, and at sizes at which no time means anything whether a goal is
        met."""
        left_out = {name for name, value in values.items() if value is None} | (
            {"goal", "met"} if self.small else set()
        )
        values = {name: value for name, value in values.items() if name not in left_out}
        row = {"piece": self.piece, "what": what, **{name: _rounded(value) for name, value in values.items()}}
        print(json.dumps(row, default=str), flush=True)
        append(self.path, row)

    def check(self, what: str, passed: bool, **values: Any) -> None:
        """One measurement that can be wrong. The piece goes on, and fails in the end."""
        self.failed |= not passed
        self.row(what, passed=bool(passed), **values)

    def skip(self, what: str, why: str) -> None:
        """Something that is not measured, with the reason."""
        self.row(what, skipped=why)

    def has_seconds(self, what: str, seconds: float) -> bool:
        """Whether the piece has so many left; that there is too little time for `what` is written down."""
        if self.seconds_left >= seconds:
            return True
        self.skip(what, f"{max(0.0, self.seconds_left):.0f} s are left, and it may take {seconds:.0f}")
        return False

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A part of a piece, which may fail without the rest: `with results.attempt("softmax, 32,768"): ...`."""
        try:
            yield
        except Exception:
            self.failed = True
            self.row(what, error=traceback.format_exc())


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
