"""The board: the learners write their progress to it, and read from it whether they have to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from . import draining

if TYPE_CHECKING:
    from .hardware import Hardware

EVALUATES = "evaluates"  # which has no time limit
WAITS = "waits for the data"  # of which its readers need room in the cluster
_BEAT = 2.0  # seconds between two heartbeats of a learner
_STILL = 10.0  # seconds without anything new after which learners that wait for data count as waiting


class Order(IntEnum):
    """What the learners are to do; each counts for more than those before it."""

    go_on = 0
    restart_at_checkpoint = 1  # end after the next checkpoint that is due, to be started again
    restart = 2  # end after the step that they are in, and a checkpoint, to be started again
    stop = 3  # the same, for good


@dataclass
class Progress:
    step: int = 0
    note: str = ""
    messages: list[str] = field(default_factory=list)  # for the user, in order
    failure: str = ""  # an error that ends the run, as a restart would meet it again
    nodes: dict[int, str] = field(default_factory=dict)  # by rank: id of each learner's node
    doing: dict[int, str] = field(default_factory=dict)  # by rank: each learner's last heartbeat
    silent: dict[int, float] = field(default_factory=dict)  # by rank: seconds since then
    still: float = 0.0  # seconds since a heartbeat said something new
    hardware: Hardware | None = None  # of the first learner; None where none has begun

    @property
    def moves(self) -> bool:
        """Whether the learners work, or have just moved: those that wait for their data may wait for room."""
        waits = any(doing.startswith(WAITS) for doing in self.doing.values())
        return bool(self.doing) and (self.still < _STILL or not waits)

    def hang(self, minutes: float) -> str:
        """What each learner does, where none has moved for so many minutes; empty where one has, or none has begun."""
        if not self.doing or self.still < 60 * minutes or EVALUATES in self.doing.values():
            return ""
        learners = []
        for rank, doing in sorted(self.doing.items()):
            silent = self.silent[rank]
            learners.append(f"learner {rank} {doing}" + (f", silent for {silent:.0f} s" if silent > 5 * _BEAT else ""))
        return f"no learner has moved for {self.still / 60:.1f} minutes (training.hang_minutes): {'; '.join(learners)}"


@dataclass
class Pulse:
    doing: str = "starts"


class _Board:
    def __init__(self) -> None:
        self.progress, self.ordered = Progress(), Order.go_on
        self.last_beat: dict[int, float] = {}
        self.moved = time.monotonic()

    def put(self, step: int, note: str) -> Order:
        self.progress.step, self.progress.note = step, note
        return self.ordered

    def tell(self, text: str) -> None:
        self.progress.messages.append(text)

    def describe(self, hardware: Hardware) -> None:
        self.progress.hardware = hardware

    def fail(self, reason: str) -> None:
        self.progress.failure = self.progress.failure or reason

    def beat(self, rank: int, doing: str, node: str) -> None:
        self.progress.nodes[rank] = node
        self.last_beat[rank] = time.monotonic()
        if self.progress.doing.get(rank) != doing:
            self.progress.doing[rank] = doing
            self.moved = time.monotonic()

    def get(self) -> Progress:
        now = time.monotonic()
        self.progress.silent = {rank: now - beat for rank, beat in self.last_beat.items()}
        self.progress.still = now - self.moved
        return self.progress

    def order(self, order: Order) -> Order:
        self.ordered = max(self.ordered, order)
        return self.ordered

    def begin(self) -> None:
        self.ordered = Order.stop if self.ordered == Order.stop else Order.go_on
        self.progress.doing, self.progress.nodes, self.last_beat = {}, {}, {}
        self.moved = time.monotonic()


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
        """Start a call of the board; `_wait` returns its answer."""
        if self._own is not None:
            return getattr(self._own, name)(*arguments)
        return getattr(self._actor, name).remote(*arguments)

    def _wait(self, answer: Any) -> Any:
        if self._own is not None:
            return answer
        import ray

        return ray.get(answer)

    def put(self, step: int, note: str) -> None:
        """Write the number of finished steps, and a note on them; does not wait."""
        self._answer = self._call("put", step, note)

    def tell(self, text: str) -> None:
        """Have the driver print a message; does not wait."""
        self._call("tell", text)

    def describe(self, hardware: Hardware) -> None:
        """Say what the first learner computes on; does not wait."""
        self._call("describe", hardware)

    def fail(self, reason: str) -> None:
        """End the run with this reason, unless another learner gave one first; returns once the board has it."""
        self._wait(self._call("fail", reason))

    @contextlib.contextmanager
    def pulse(self, rank: int) -> Iterator[Pulse]:
        """Within the block heartbeats go to the board; the learner writes into the pulse what it does."""
        pulse, node = Pulse(), draining.here() if self._own is None else ""
        self._call("beat", rank, pulse.doing, node)
        with every(_BEAT, lambda: self._call("beat", rank, pulse.doing, node)):
            yield pulse

    def ordered(self) -> Order:
        """What the learners had to do when this one last wrote its progress."""
        return Order.go_on if self._answer is None else Order(self._wait(self._answer))

    def get(self) -> Progress:
        found: Progress = self._wait(self._call("get"))
        return found

    def order(self, order: Order) -> Order:
        """Have the learners do this, unless they are to do more already; returns what they are to do."""
        return Order(self._wait(self._call("order", order)))

    def begin(self) -> None:
        """Forget the learners of before, and what they were to do, unless that is to stop for good."""
        self._wait(self._call("begin"))


@contextlib.contextmanager
def every(seconds: float, do: Callable[[], object]) -> Iterator[None]:
    """Within the block a thread calls `do` again and again, so many seconds apart, and once more at the end."""
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
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # no other thread receives signals
        yield stopping
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)
