"""How many pictures of the last steps did not decode: more than data.max_bad_share of them end the run."""

from collections import Counter, deque
from dataclasses import dataclass, field

import pyarrow as pa

from jest_core.run_file import Run

WINDOW = 100  # steps
FEWEST = 1000  # pictures of which a share means something: one of the 64 of a trial run is more than a hundredth


class TooManyBad(ValueError):
    """More pictures did not decode than the run file allows: the same steps would end so again."""


@dataclass
class BadPictures:
    """Reasons why pictures did not decode, by step, since this process began."""

    steps: deque[Counter[str]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, bad_rows: pa.Table, n_slots: int, run: Run) -> None:
        """The bad rows of a step's n_slots, the same on every learner.

        Raises TooManyBad where they are all of the step's, or where those of the last 100 steps are more than
        data.max_bad_share of the pictures of 100 steps (in a shorter run, of its steps; at least of 1,000).
        """
        self.steps.append(Counter(bad_rows["reason"].to_pylist()))
        share, size = run.data.max_bad_share, run.super_batch_size
        n_pictures = max(FEWEST, min(WINDOW, run.n_steps) * size)
        reasons = Counter[str]()
        for step in self.steps:
            reasons += step
        if len(bad_rows) == n_slots:
            raise TooManyBad(
                f"none of the {n_slots:,} pictures of the step decodes ({_counts(self.steps[-1])}){_REMEDY}"
            )
        if (n := reasons.total()) > share * n_pictures:
            raise TooManyBad(
                f"{n:,} pictures of {len(self.steps):,} step(s) do not decode ({_counts(reasons)}), more than "
                f"data.max_bad_share {share:g} of {n_pictures:,}{_REMEDY}, or raise data.max_bad_share"
            )


_REMEDY = ": repair the shards, or drop these rows by a rule of the catalogue"


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common())
