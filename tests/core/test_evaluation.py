import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from jest_core.evaluation import (
    ClassNames,
    FewShot,
    FewShotClassifier,
    ZeroShot,
    class_embeddings,
    draw_shots,
    image_embeddings,
    ranks,
    represent,
    retrieval,
    text_embeddings,
)
from jest_core.models import configurations, towers


def zero_shot(image, classes, labels):
    task = ZeroShot(classes)
    task.add(image, labels)
    return task.result()


def test_zero_shot_on_a_hand_made_matrix():
    classes = torch.eye(6)
    image = torch.tensor(
        [[1, 0.01, 0, 0, 0, 0], [0.9, 1, 0, 0, 0, 0], [1, 0.5, 0, 0, 0, 0], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]]
    )
    metrics = zero_shot(image, classes, torch.tensor([0, 1, 1, 5]))
    assert metrics["acc1"] == pytest.approx(2 / 4)
    assert metrics["acc5"] == pytest.approx(3 / 4)
    assert metrics["mean_per_class_recall"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_zero_shot_is_the_same_in_batches_and_agrees_with_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(20, 8, generator=generator), dim=1)
    labels = torch.randint(0, 20, (300,), generator=generator)
    image = F.normalize(classes[labels] + torch.randn(300, 8, generator=generator), dim=1)
    task = ZeroShot(classes)
    for rows in torch.arange(300).split(37):
        task.add(image[rows], labels[rows])
    metrics, scores = task.result(), (image @ classes.T).numpy()
    for k in (1, 5):
        assert metrics[f"acc{k}"] == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=np.arange(20)))
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_collapsed_or_diverged_model_scores_zero(value):
    same = F.normalize(torch.full((8, 4), value), dim=1)
    groups = torch.arange(8)
    assert zero_shot(same, same, groups)["acc5"] == 0
    metrics = retrieval(same, groups, same, groups, ks=(1, 5))
    assert metrics["text_retrieval_recall@5"] == metrics["image_retrieval_recall@5"] == 0


def test_zero_shot_without_images_is_refused():
    with pytest.raises(ValueError, match="no image"):
        ZeroShot(torch.eye(2)).result()


@pytest.mark.parametrize(("n_shots", "width"), [(3, 40), (20, 6)])  # the smaller system is N x N, then D x D
def test_few_shot_equals_scikit_learns_ridge(n_shots, width):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(5).repeat_interleave(n_shots)
    centres = torch.randn(5, width, generator=generator)
    features = centres[labels] + torch.randn(len(labels), width, generator=generator)
    test_labels = torch.arange(5).repeat_interleave(40)
    test = centres[test_labels] + 2 * torch.randn(200, width, generator=generator)
    classifier = FewShotClassifier.fit(features, labels, 5, 1024.0)

    mean, deviation = features.double().numpy().mean(0), features.double().numpy().std(0) + 1e-5

    def with_bias(x):
        return np.concatenate([(x.double().numpy() - mean) / deviation, np.full((len(x), 1), 100.0)], 1)

    ridge = Ridge(alpha=1024.0, fit_intercept=False).fit(with_bias(features), 2 * np.eye(5)[labels.numpy()] - 1)
    np.testing.assert_allclose(classifier.scores(test).numpy(), ridge.predict(with_bias(test)), rtol=1e-8, atol=1e-10)

    task = FewShot([classifier, classifier])
    for rows in torch.arange(200).split(33):
        task.add(test[rows], test_labels[rows])
    expected = (ridge.predict(with_bias(test)).argmax(1) == test_labels.numpy()).mean()
    assert task.result() == pytest.approx({"acc1": expected, "acc1_seed0": expected, "acc1_seed1": expected})


def test_shots_are_drawn_by_class():
    labels = [0, 1, 1, 0, -1, 1, 0, 2]
    drawn = draw_shots(labels, 3, 2, seed=0)
    assert sorted(labels[i] for i in drawn) == [0, 0, 1, 1, 2]  # the third class has one example; -1 is no class
    assert drawn == draw_shots(labels, 3, 2, seed=0)
    assert len({tuple(draw_shots(labels, 3, 2, seed)) for seed in range(20)}) > 1


def test_retrieval_with_several_captions_on_a_hand_made_matrix():
    image = torch.eye(3)
    #                    of image 0     of image 0    of image 1      of image 2    of image 2
    text = torch.tensor([[0.9, 0.1, 0], [0.1, 0.2, 0], [0.95, 0.5, 0], [0, 0.8, 0.9], [0, 0, 0.1]])
    image_group, text_group = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1, 2, 2])
    # image 0: its best caption scores 0.9, after the 0.95 of image 1's; image 1: its caption scores 0.5, after 0.8;
    # image 2: its best caption is first
    assert ranks(image, image_group, text, text_group).tolist() == [1, 1, 0]
    # captions: their image is first, second (0.2 before 0.1), second (0.95 before 0.5), first, first
    assert ranks(text, text_group, image, image_group).tolist() == [0, 1, 1, 0, 0]
    metrics = retrieval(image, image_group, text, text_group, ks=(1, 2))
    assert metrics["text_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert metrics["text_retrieval_recall@2"] == 1
    assert metrics["image_retrieval_recall@1"] == pytest.approx(3 / 5)
    assert (metrics["image_retrieval_mean_rank"], metrics["image_retrieval_median_rank"]) == pytest.approx((1.4, 1))


def test_retrieval_ranks_equal_the_double_loop_whatever_the_tile():
    generator = torch.Generator().manual_seed(2)
    query, key = torch.randn(40, 6, generator=generator), torch.randn(90, 6, generator=generator)
    query_group = torch.randint(0, 30, (40,), generator=generator)
    key_group = torch.randint(0, 30, (90,), generator=generator)
    expected = []
    for q, group in zip(query, query_group, strict=True):
        same = [float(q @ k) for k, g in zip(key, key_group, strict=True) if g == group]
        other = [float(q @ k) for k, g in zip(key, key_group, strict=True) if g != group]
        expected.append(sum(score >= max(same) for score in other) if same else 90)
    for tile in (7, 40):
        assert ranks(query, query_group, key, key_group, tile).tolist() == expected


def test_class_embeddings_average_names_and_templates():
    pair = towers.create("jest-tiny", seed=0)
    classes = ClassNames(["a", "b"], [["cat", "kitten"], ["dog"]], ["{}", "a drawing of a {}"])
    embeddings = class_embeddings(pair, classes, batch_size=4)
    prompts = ["cat", "a drawing of a cat", "kitten", "a drawing of a kitten"]
    expected = text_embeddings(pair, prompts).mean(0)
    torch.testing.assert_close(embeddings[0], expected / expected.norm())


def test_canonical_prompts_match_big_vision():
    classes = ClassNames(["a"], [["Black_footed, Ferret"]], ["a photo of the {}!"], canonical=True)
    assert classes.prompts() == [(0, "a photo of the black footed ferret")]


@pytest.mark.parametrize("name", ["jest-tiny", "jest-drawings", "ViT-S-32-alt"])
def test_a_representation_is_the_input_of_the_projection(name):
    if name.startswith("ViT"):
        model = open_clip.create_model(name, load_weights=False, output_dict=True).eval()
        pair = towers.Towers(model, name, configurations.inputs(name))
    else:
        pair = towers.create(name, seed=0)
    size = pair.view.image_size
    pixels = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    before = image_embeddings(pair, pixels)
    features = represent(pair, pixels)
    visual = pair.model.visual
    with torch.no_grad():
        projected = visual.head(features) if hasattr(visual, "trunk") else features @ visual.proj
    torch.testing.assert_close(F.normalize(projected, dim=1), before)
    torch.testing.assert_close(image_embeddings(pair, pixels), before)  # and the projection is restored
    assert pair.model.training is (not name.startswith("ViT"))
