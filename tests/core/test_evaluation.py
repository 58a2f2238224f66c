import pytest
import torch

from jest_core import towers
from jest_core.evaluation import ClassNames, class_embeddings, retrieval, zero_shot


def test_zero_shot_on_a_hand_made_matrix():
    classes = torch.eye(6)
    image = torch.tensor(
        [[1, 0, 0, 0, 0, 0.0], [0.9, 1, 0, 0, 0, 0], [1, 0.5, 0, 0, 0, 0.0], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]]
    )
    found = zero_shot(image, classes, torch.tensor([0, 1, 1, 5]))
    assert found["acc1"] == pytest.approx(2 / 4)
    assert found["acc5"] == pytest.approx(3 / 4)
    assert found["mean_per_class_recall"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_retrieval_with_shared_captions():
    image = torch.eye(3)
    text = torch.tensor([[0.9, 0.1, 0], [1.0, 0, 0], [0, 0.8, 0.9]])
    matches = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    found = retrieval(image, text, matches, ks=(1, 3))
    assert found["text_retrieval_recall@1"] == pytest.approx(2 / 3)  # image 1 is nearest to text 2
    assert found["image_retrieval_recall@1"] == pytest.approx(1.0)
    assert found["text_retrieval_recall@3"] == 1.0


def test_class_embeddings_average_names_and_templates():
    pair = towers.create("jest-tiny", seed=0)
    classes = ClassNames(["a", "b"], [["cat", "kitten"], ["dog"]], ["{}", "a drawing of a {}"])
    found = class_embeddings(pair, classes, batch_size=4)
    prompts = ["cat", "a drawing of a cat", "kitten", "a drawing of a kitten"]
    with torch.no_grad():
        expected = pair.model.eval().encode_text(pair.tokens(prompts), normalize=True).mean(0)
    torch.testing.assert_close(found[0], expected / expected.norm())
