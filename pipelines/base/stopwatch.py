"""Which part of a pipeline limits its speed: seconds of work by part, and how busy its goal was."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


class Stopwatch:
    """Adds up the seconds of work that each block of data reports.

    A report has the seconds of each part, and in `began` the time (time.time()) at which the goal started with the
    block. parts: of the pipeline, in order. goal: the part that should be busy all the time, on n_workers workers.
    shared: all parts share the same cores, so that the part which uses most of them limits the pipeline.
    """

    def __init__(self, parts: Sequence[str], goal: str, n_workers: int, *, shared: bool) -> None:
        self.parts, self.goal, self.n_workers, self.shared = parts, goal, n_workers, shared
        self.seconds: Counter[str] = Counter()
        self.began: float | None = None  # when the goal started with the first block; start-up does not count

    def add(self, report: Mapping[str, Any]) -> None:
        """report: seconds of each part, and `began`; what else it has is not looked at."""
        self.began = min(self.began or report["began"], report["began"])
        self.seconds.update({part: report[part] for part in self.parts})

    @property
    def busy(self) -> float:
        """Share of the elapsed time in which the goal's workers were at work, in [0, 1]."""
        elapsed = 0.0 if self.began is None else time.time() - self.began
        return min(1.0, self.seconds[self.goal] / (elapsed * self.n_workers)) if elapsed else 0.0

    @property
    def limit(self) -> str:
        """The part that the others wait for: the goal where it was busy, else the one that took the most seconds."""
        if self.busy >= 0.8 and not self.shared:
            return self.goal
        others = self.parts if self.shared else [part for part in self.parts if part != self.goal]
        return max(others, key=lambda part: self.seconds[part])

    def note(self) -> str:
        """A few words for a progress bar."""
        return f"{self.goal} busy {self.busy:.0%}"

    def summary(self) -> str:
        """One line for the end of a stage."""
        work = ", ".join(f"{part} {self.seconds[part]:.1f} s" for part in self.parts)
        return f"limited by {self.limit}; {self.goal} was busy {self.busy:.0%} of the time (work: {work})"
