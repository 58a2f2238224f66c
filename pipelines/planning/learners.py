"""Whether a run's learners find room in a cluster, and how many of them, where their number follows it."""

from collections.abc import Callable, Mapping

from jest_core.run_file import Run
from jest_core.run_file.training import LearnerRange

from ..training import room


def place(run: Run) -> dict[str, float]:
    """What each learner asks of its node, by Ray's names of resources; those whose number follows the cluster bring a
    CPU to read with."""
    cpus = room.CPUS if isinstance(run.training.n_learners, LearnerRange) else 1
    return {"GPU": run.training.gpus_per_learner, "CPU": cpus}


def short(run: Run, learners: int, have: Mapping[str, float]) -> str:
    """Of which resources a cluster has too few for so many learners; empty where it has enough."""
    each = place(run)
    cpus = learners * each["CPU"] + (each["CPU"] < room.CPUS)  # one to read with, at least
    wanted = {"GPU": learners * each["GPU"], "CPU": cpus}
    return "; ".join(
        f"{name} {n:,.0f}, and has {have.get(name, 0):,.0f}" for name, n in wanted.items() if n > have.get(name, 0)
    )


def most(run: Run, refusal: Callable[[int], str]) -> int:
    """The largest of the run's numbers of learners that is not refused; ValueError with the refusal of the smallest."""
    refused = ""
    for n in reversed(run.learner_numbers):
        if not (refused := refusal(n)):
            return n
    raise ValueError(refused)


def in_words(run: Run, learners: int) -> str:
    """What a cluster has that has room for so many."""
    numbers = run.learner_numbers
    if learners == numbers[-1]:
        return "what the learners ask for"
    return f"room for {learners} learners, of {numbers[0]} to {numbers[-1]}"
