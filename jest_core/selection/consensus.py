"""All learners refuse together: no learner waits in a collective for one that has raised an error."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from jest_core.collectives import Learners

Settings: TypeAlias = dict[str, str | int | float | list[str | int | float] | None]


@contextmanager
def same_on_all(learners: Learners, settings: Settings) -> Iterator[None]:
    """Raises ValueError on all learners where the block raises an error on one of them, or where settings differ.

    Settings are compared after the block, which may add to them. An error other than ValueError is raised as it is on
    the learner where it happened.
    """
    raised, problem = None, ""
    try:
        yield
    except Exception as error:
        raised, problem = error, str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    message = json.dumps([problem, settings], default=repr).encode()
    messages = [json.loads(data) for data in learners.exchange([message] * learners.size)]
    if raised is not None and (learners.size == 1 or not isinstance(raised, ValueError)):
        raise raised
    for rank, (problem, theirs) in enumerate(messages):
        if problem:
            raise ValueError(f"learner {rank}: {problem}") from raised
        for name, value in theirs.items():
            if value != (first := messages[0][1][name]):
                raise ValueError(f"{name} is {first!r} on learner 0 and {value!r} on learner {rank}")
