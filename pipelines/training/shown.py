"""What is new on the board -> the progress bar, and lines for the user."""

from ..base import progress
from .heartbeat import Progress


class Shown:
    """Shows what is new on the board: steps, of which so many are shown already, and messages."""

    def __init__(self, label: str, step: int, advance: progress.Advance) -> None:
        self._label, self._step, self._advance, self._n_messages = label, step, advance, 0

    def __call__(self, seen: Progress) -> None:
        if seen.step > self._step:
            self._advance(seen.step - self._step, note=seen.note)
            self._step = seen.step
        for text in seen.messages[self._n_messages :]:
            progress.warn(self._label, text)
        self._n_messages = len(seen.messages)
