import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from jest_core.selection import Embeddings, select
from jest_core.selection.arguments import uid_words
from tests.core.selection.draws import model, uids


def with_image(image: torch.Tensor) -> dict[str, Embeddings]:
    return {"learner": Embeddings(image, torch.ones(40, 8), 10.0, 0.0)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_chunks": 5}, "sub_batch_size 16 is not a positive multiple of n_chunks 5"),
        (
            {"criterion": "easy", "learner": model(10, 8, 0)},
            "learner and reference embeddings differ in number: 10 and 40",
        ),
        ({"criterion": "easy", "gain": 1e308, "draw": "top_k"}, "fewer than 16 examples have a finite score left"),
        ({"learner": None, "reference": None}, "neither the learner's nor the reference's embeddings are given"),
        ({"n_chunks": 0}, "sub_batch_size 16 is not a positive multiple of n_chunks 0"),
        ({"sub_batch_size": 0}, "sub_batch_size 0 is not a positive multiple of n_chunks 4"),
        ({"sub_batch_size": -4}, "sub_batch_size -4 is not a positive multiple of n_chunks 4"),
        ({"sub_batch_size": 44}, "sub_batch_size 44 exceeds the 40 valid examples of the super-batch"),
        ({"sub_batch_size": 40, "valid": torch.arange(40) < 30}, "sub_batch_size 40 exceeds the 30 valid examples"),
        ({"learner": None}, "criterion 'learnability' needs the learner's embeddings, which are None"),
        ({"reference": None}, "criterion 'learnability' needs the reference's embeddings, which are None"),
        ({"reference": None, "criterion": "easy"}, "criterion 'easy' needs the reference's embeddings"),
        ({"learner": None, "criterion": "hard"}, "criterion 'hard' needs the learner's embeddings"),
        ({"reference": model(39, 8, 1)}, "learner and reference embeddings differ in number: 40 and 39"),
        ({"uids": uids(39)}, r"40 embeddings, 39 uids, \(39,\) occurrences and \(39,\) valid flags: one of each per"),
        ({"uids": ["abc"] * 40}, "uid 'abc' does not have 32 hex digits"),
        ({"uids": ["g" * 32] * 40}, "invalid literal"),
        ({"uids": torch.zeros(40, dtype=torch.int64)}, r"uids have shape \(40,\), not \(B, 2\)"),
        (
            {"occurrences": torch.zeros(7, dtype=torch.int64)},
            r"40 uids, \(7,\) occurrences and \(40,\) valid",
        ),
        (
            {"valid": torch.ones(41, dtype=torch.bool)},
            r"40 uids, \(40,\) occurrences and \(41,\) valid",
        ),
        ({"gain": math.nan}, "gain nan is not a finite number of at least 0"),
        ({"gain": -1.0}, "gain -1.0 is not a finite number of at least 0"),
        ({"tile": 0}, "tile 0 is not a positive number of rows"),
        (with_image(torch.full((40, 8), torch.nan)), "40 examples have NaN or infinite embeddings"),
        (with_image(torch.ones(40, 8).index_fill(0, torch.tensor([3]), torch.inf)), "1 examples have NaN or infinite"),
        (with_image(torch.ones(40, 8, dtype=torch.int64)), "torch.int64 and torch.float32, not floating point of 16"),
        (with_image(torch.ones(40, 8, dtype=torch.float64)), "torch.float64 and torch.float32, not floating point"),
        (with_image(torch.ones(40, 7)), r"image \(40, 7\) and text \(40, 8\) embeddings are not both \(B, D\)"),
        (with_image(torch.ones(40, 8, 1)), "embeddings are not both"),
        (with_image(torch.ones(40, 8, device="meta")), "embeddings are on meta, meta and cpu: put them on one device"),
    ],
)
def test_impossible_selections_are_refused_with_the_reason(settings: dict, message: str):
    arguments = {
        "learner": model(40, 8, 0), "reference": model(40, 8, 1), "sub_batch_size": 16, "n_chunks": 4,
        "uids": uids(40), "seed": 0, "step": 0,
    } | settings  # fmt: skip
    with pytest.raises(ValueError, match=message):
        select(arguments.pop("learner"), arguments.pop("reference"), **arguments)


OPTIONS = """
import torch
from jest_core.selection import Embeddings, select
m = Embeddings(torch.ones(8, 2), torch.ones(8, 2), 10.0, 0.0)
fixed = {"sub_batch_size": 4, "n_chunks": 2, "uids": ["0" * 32] * 8, "seed": 0, "step": 0}
wrong = {"method": "uniform", "valid": torch.ones(8), "occurrences": torch.ones(8), "n_chunks": 2.0}
for name in ("method", "criterion", "loss", "draw", "precision", "valid", "occurrences", "n_chunks"):
    value = wrong.get(name, "wrong")
    try:
        select(m, m, **fixed | {name: value})
    except ValueError as error:
        print(error)
try:
    select(m, m, **fixed, valid=torch.ones(8, 1, dtype=torch.bool))
except ValueError as error:
    print(error)
"""


def test_unknown_options_are_refused():
    """In a separate process, since the shape checks that `make test` turns on would raise before `select` does."""
    ran = subprocess.run([sys.executable, "-c", OPTIONS], capture_output=True, text=True)
    assert ran.stdout.splitlines() == [
        "method 'uniform' is none of joint, independent; uniform batches need no selection",
        "criterion 'wrong' is none of learnability, hard, easy",
        "loss 'wrong' is none of sigmoid, softmax",
        "draw 'wrong' is none of sample, top_k",
        "precision 'wrong' is none of exact, fast",
        "occurrences are torch.int64 and valid is torch.float32, not integers and booleans",
        "occurrences are torch.float32 and valid is torch.bool, not integers and booleans",
        "sub_batch_size 4 and n_chunks 2.0 are not both whole numbers",
        "8 embeddings, 8 uids, (8,) occurrences and (8, 1) valid flags: one of each per example",
    ], ran.stderr


def test_uid_forms_agree():
    hexes = ["0123456789abcdef" * 2, "f" * 32]
    words = uid_words(hexes)
    array = np.array([[0x0123456789ABCDEF] * 2, [2**64 - 1] * 2], dtype=np.uint64)
    assert torch.equal(words, uid_words(array))
    assert torch.equal(words, uid_words(torch.from_numpy(array)))
