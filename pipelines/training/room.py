"""Room in the cluster for the learners of a run whose number follows it (training.n_learners with min and max).

It is asked for with placement groups, one for the learners from each number that the run may have to the next: Ray says
of each whether it has room, an autoscaler sees those that have none, and nobody else takes the room of the others.
"""

import time
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

from ..base import demand, progress

_LOOK_SECONDS = 0.5  # between two looks at the groups
CPUS = 2  # of a learner: its own, and one that reads for it


class Room:
    """numbers: of learners that the run may have, ascending; gpus: of each learner."""

    def __init__(self, numbers: Sequence[int], gpus: float) -> None:
        self._numbers = numbers
        self._bundle = {"CPU": float(CPUS), **({"GPU": gpus} if gpus else {})}
        self._groups: dict[int, Any] = {}  # number of learners up to which it is for -> placement group
        self._running = 0

    def ask(self, running: int, nodes: Collection[str] = ()) -> None:
        """Ask for the learners beyond those that run on these nodes, in place of what was asked for before."""
        from ray.util import placement_group

        self.leave()
        self._running = running
        beyond = [running, *(n for n in self._numbers if n > running)]
        for low, high in pairwise(beyond):
            where: dict[str, str] = {}
            if nodes and "GPU" not in self._bundle:  # CPUs that are free there are those of the learners' readers
                where = {"ray.io/node-id": f"!in({','.join(sorted(nodes))})"}
            size = high - low
            group = placement_group([self._bundle] * size, bundle_label_selector=[where] * size)
            self._groups[high] = group
            if low:  # there is room for fewer learners, or they run
                demand.optional.add(group.id.hex())

    def fits(self) -> int:
        """The largest number of learners for which there is room, those that run included."""
        from ray.util import placement_group_table

        room, low = self._running, self._running
        for high, group in self._groups.items():
            room += (high - low) * (placement_group_table(group)["state"] == "CREATED")
            low = high
        return max([self._running, *(n for n in self._numbers if n <= room)])

    def wait(self, enough: int, seconds: float, over: Callable[[], bool], tell: Callable[[str], None]) -> int:
        """The number of learners to start: at least `enough`, or after so many seconds what there is room for, once
        that is the smallest number. 0 where over() says that none are wanted any more."""
        self.ask(0)
        end, said = time.monotonic() + seconds, False
        while (n := self.fits()) < enough and not (n and time.monotonic() >= end):
            if over():
                n = 0
                break
            if time.monotonic() < end:  # within the time that the run may wait, whatever JEST_WAIT_MINUTES is
                progress.mark_moved()
            if not said and time.monotonic() > end - seconds + 2:
                after = f"goes on with fewer after {seconds / 60:g} minutes, down to {self._numbers[0]}"
                tell(f"waits for room for {enough} learners in the cluster, which has room for {n}: {after}")
                said = True
            time.sleep(_LOOK_SECONDS)
        self.leave()
        return n

    def leave(self) -> None:
        """Leave the room to others."""
        groups, self._groups, self._running = self._groups, {}, 0
        if groups:
            from ray.util import remove_placement_group

            for group in groups.values():
                remove_placement_group(group)
