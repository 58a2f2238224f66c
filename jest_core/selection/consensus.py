"""All learners refuse together: no learner waits in a collective for one that has raised an error."""

import hashlib
import json
from typing import TypeAlias

import torch

from jest_core.collectives import Learners

Statement: TypeAlias = dict[str, str | int | float | list[str | int | float] | None]  # what has to be alike, by name


def refuse_together(learners: Learners, raised: Exception | None, settings: Statement, n: int) -> list[int]:
    """Raises ValueError on all learners where one of them has raised an error, or where settings differ.

    An error other than ValueError is raised as it is on the learner where it happened. Returns the n of each learner.
    One collective, and one read by the host, where nothing is wrong.
    """
    problem = ""
    if raised is not None:
        name = type(raised).__name__
        problem = (str(raised) or name) if isinstance(raised, ValueError) else f"{name}: {raised}"
    message = json.dumps([problem, settings], default=repr).encode()
    digest = int.from_bytes(hashlib.blake2b(message, digest_size=7).digest(), "big")
    mine = torch.tensor([[raised is not None, digest, n]], dtype=torch.int64)
    flags, digests, counts = zip(*learners.gather_equal(mine).tolist(), strict=True)
    if not any(flags) and len(set(digests)) == 1:
        return list(counts)
    if raised is not None and (learners.size == 1 or not isinstance(raised, ValueError)):
        if learners.size > 1:
            learners.exchange([message] * learners.size)
        raise raised
    messages = [json.loads(data) for data in learners.exchange([message] * learners.size)]
    for rank, (theirs_problem, theirs) in enumerate(messages):
        if theirs_problem:
            raise ValueError(f"learner {rank}: {theirs_problem}") from raised
        for name, value in theirs.items():
            if value != (first := messages[0][1][name]):
                raise ValueError(f"{name} is {first!r} on learner 0 and {value!r} on learner {rank}")
    return list(counts)  # they are equal, though written differently: 1 and 1.0
