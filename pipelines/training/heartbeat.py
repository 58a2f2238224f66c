"""The board: where the learners say how far they are, and read whether they are to stop."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

EVALUATES = "evaluates"  # which takes as long as it takes
_BEAT = 2.0  # seconds between two signs of life of a learner


@dataclass
class Progress:
    step: int = 0
    note: str = ""
    told: list[str] = field(default_factory=list)  # what the user is to know
    failure: str = ""  # why the run is over, which no restart would mend
    doing: dict[int, str] = field(default_factory=dict)  # by rank: what each learner said last
    silent: dict[int, float] = field(default_factory=dict)  # by rank: seconds since it did
    still: float = 0.0  # seconds since one of them said something new

    def hang(self, minutes: float) -> str:
        """Who does what, where no learner has moved for so many minutes; empty where one has, or none has begun."""
        if not self.doing or self.still < 60 * minutes or EVALUATES in self.doing.values():
            return ""
        told = []
        for rank, doing in sorted(self.doing.items()):
            silent = self.silent[rank]
            told.append(f"learner {rank} {doing}" + (f", silent for {silent:.0f} s" if silent > 5 * _BEAT else ""))
        return f"no learner has moved for {self.still / 60:.1f} minutes (training.hang_minutes): {'; '.join(told)}"


@dataclass
class Pulse:
    doing: str = "starts"


class _Board:
    def __init__(self) -> None:
        self.progress, self.stopping = Progress(), False
        self.heard: dict[int, float] = {}
        self.moved = time.monotonic()

    def put(self, step: int, note: str) -> bool:
        self.progress.step, self.progress.note = step, note
        return self.stopping

    def tell(self, text: str) -> None:
        self.progress.told.append(text)

    def fail(self, reason: str) -> None:
        self.progress.failure = self.progress.failure or reason

    def beat(self, rank: int, doing: str) -> None:
        self.heard[rank] = time.monotonic()
        if self.progress.doing.get(rank) != doing:
            self.progress.doing[rank] = doing
            self.moved = time.monotonic()

    def get(self) -> Progress:
        now = time.monotonic()
        self.progress.silent = {rank: now - heard for rank, heard in self.heard.items()}
        self.progress.still = now - self.moved
        return self.progress

    def stop(self) -> None:
        self.stopping = True


class Board:
    """A handle that travels to the learners. The board itself is an actor on the driver's node, and lost with that
    alone; in_process: an object of this process, which has the only learner too."""

    def __init__(self, *, in_process: bool = False) -> None:
        self._answer: Any = None
        self._own: _Board | None = _Board() if in_process else None
        if in_process:
            return
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor: Any = ray.remote(num_cpus=0)(_Board).options(scheduling_strategy=here).remote()

    def _call(self, name: str, *arguments: Any) -> Any:
        """Start a call of the board; returns what `_wait` gets its answer from."""
        if self._own is not None:
            return getattr(self._own, name)(*arguments)
        return getattr(self._actor, name).remote(*arguments)

    def _wait(self, answer: Any) -> Any:
        if self._own is not None:
            return answer
        import ray

        return ray.get(answer)

    def put(self, step: int, note: str) -> None:
        """Say how far the run is; does not wait."""
        self._answer = self._call("put", step, note)

    def tell(self, text: str) -> None:
        """Have the driver say it; does not wait."""
        self._call("tell", text)

    def fail(self, reason: str) -> None:
        """Say that the run is over, and why, which the first who fails knows; returns once that is told."""
        self._wait(self._call("fail", reason))

    @contextlib.contextmanager
    def pulse(self, rank: int) -> Iterator[Pulse]:
        """Within the block a learner gives signs of life; it writes into the pulse what it does."""
        pulse = Pulse()
        with every(_BEAT, lambda: self._call("beat", rank, pulse.doing)):
            yield pulse

    def is_stopping(self) -> bool:
        """Whether the learners were told to stop when this one last put something."""
        return self._answer is not None and bool(self._wait(self._answer))

    def get(self) -> Progress:
        found: Progress = self._wait(self._call("get"))
        return found

    def stop(self) -> None:
        """Have the learners stop once their step is done."""
        self._call("stop")


@contextlib.contextmanager
def every(seconds: float, do: Callable[[], object]) -> Iterator[None]:
    """Within the block a thread does it again and again, so many seconds apart, and once more at the end."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            do()

    thread = threading.Thread(target=run, daemon=True, name="every")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        do()


@contextlib.contextmanager
def sigterm_noted() -> Iterator[threading.Event]:
    """Within the block SIGTERM sets the event, and ends no process by itself."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach no other
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
