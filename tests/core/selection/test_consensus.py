import dataclasses
from typing import Any

import torch

from jest_core.selection import Embeddings, select
from tests.core.selection.draws import model, uids
from tests.processes import run_learners


def _error_of(rank: int, size: int, group, case: str) -> str:
    learner, reference = model(20, 8, 0), model(20 - (case == "fewer") * rank, 6, 1)
    settings: dict[str, Any] = {"uids": uids(20), "seed": 5 * rank if case == "seed" else 0}
    if case == "absent" and rank:
        learner, settings = None, settings | {"criterion": "easy"}
    elif case == "absent":
        settings |= {"criterion": "easy"}
    elif case == "zero":
        learner = dataclasses.replace(learner, logit_bias=-0.0 if rank else 0.0)
    elif case == "scale" and rank:
        learner = dataclasses.replace(learner, logit_scale=torch.tensor(50.0))
    elif case == "dtype" and rank:
        learner = Embeddings(learner.image.bfloat16(), learner.text.bfloat16(), 10.0, -8.0)
    elif case == "crash" and rank:
        settings["uids"] = ["-" + "1" * 31] * 20
    try:
        select(learner, reference, sub_batch_size=8, n_chunks=2, step=0, group=group, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "selected"


def test_all_learners_raise_when_one_refuses_its_arguments():
    """No learner waits in a collective for one that has raised, and learners with different arguments do not select."""
    refused = "ValueError: learner 1: learner and reference embeddings differ in number: 20 and 19"
    assert run_learners(_error_of, 2, "fewer") == [refused] * 2
    assert run_learners(_error_of, 2, "seed") == ["ValueError: seed is 0 on learner 0 and 5 on learner 1"] * 2
    kind = ["torch.float32", "torch.float32", 8, 8, 10.0, -8.0]
    others = {
        "absent": None,
        "scale": [*kind[:4], 50.0, -8.0],
        "dtype": ["torch.bfloat16", "torch.bfloat16", *kind[2:]],
    }
    for case, other in others.items():
        message = f"ValueError: learner is {kind!r} on learner 0 and {other!r} on learner 1"
        assert run_learners(_error_of, 2, case) == [message] * 2
    first, second = run_learners(_error_of, 2, "crash")
    assert first.startswith("ValueError: learner 1: OverflowError")
    assert second.startswith("OverflowError")
    assert run_learners(_error_of, 2, "none") == ["selected"] * 2
    assert run_learners(_error_of, 2, "zero") == ["selected"] * 2  # equal, and written differently
