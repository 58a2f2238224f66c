"""Which part of a pipeline limits it: seconds of work by part, and how busy the part that should limit it was."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence


class Stopwatch:
    """Sums what blocks report of the work that was done on them.

    A report has each part's seconds, and in `began` the clock when the goal began with the block: reports come late.
    parts: of the pipeline, in order. goal: the part that ought to be busy all the time, on n_workers workers. shared:
    all parts share the same cores, so that what takes most of them limits.
    """

    def __init__(self, parts: Sequence[str], goal: str, n_workers: int, *, shared: bool) -> None:
        self.parts, self.goal, self.n_workers, self.shared = parts, goal, n_workers, shared
        self.seconds: Counter[str] = Counter()
        self.began: float | None = None  # when the goal began with the first block: starting up does not count

    def add(self, report: Mapping[str, float]) -> None:
        self.began = min(self.began or report["began"], report["began"])
        self.seconds.update({part: report[part] for part in self.parts})

    @property
    def busy(self) -> float:
        """Share of the time in which the goal's workers worked."""
        elapsed = 0.0 if self.began is None else time.time() - self.began
        return min(1.0, self.seconds[self.goal] / (elapsed * self.n_workers)) if elapsed else 0.0

    @property
    def limit(self) -> str:
        """The part that everything waits for: the goal where it was busy, else what took most of the others' time."""
        if self.busy >= 0.8 and not self.shared:
            return self.goal
        others = self.parts if self.shared else [part for part in self.parts if part != self.goal]
        return max(others, key=lambda part: self.seconds[part])

    def note(self) -> str:
        return f"{self.goal} busy {self.busy:.0%}"

    def summary(self) -> str:
        """One line for the end of a stage."""
        work = ", ".join(f"{part} {self.seconds[part]:.1f} s" for part in self.parts)
        return f"limited by {self.limit}; {self.goal} was busy {self.busy:.0%} of the time (work: {work})"
