"""A model that jest exports is, in a stock open_clip, the same model: pixels, tokens, embeddings, figures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jest_core.evaluation import ClassNames, class_embeddings, image_embeddings, text_embeddings
from jest_core.models import configurations, towers
from pipelines.base import checkpoints
from pipelines.offline import export
from pipelines.scores.embedder import load_reference

NAMES, TEMPLATES = ["cat", "dog", "tree", "house"], ["{}", "a drawing of a {}"]
CAPTIONS = ["a cat on a mat", "two dogs", "a very long caption " * 8, ""]

# What somebody does with the folder who has open_clip and no jest
STOCK = """
import sys, numpy as np, open_clip, torch
from PIL import Image
folder, out, pictures, names, templates, captions = sys.argv[1:3] + [eval(word) for word in sys.argv[3:]]
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
tokenizer = open_clip.get_tokenizer("local-dir:" + folder)
assert not any(name.split(".")[0] in ("jest_core", "jest_pipelines", "pipelines") for name in sys.modules)
pixels = torch.stack([preprocess(Image.open(path)) for path in pictures])
model.eval()
with torch.no_grad():
    image = model.encode_image(pixels, normalize=True)
    text = model.encode_text(tokenizer(captions), normalize=True)
    prompts = [lambda name, template=template: template.format(name) for template in templates]
    classes = open_clip.build_zero_shot_classifier(model, tokenizer, names, prompts)
np.savez(out, pixels=pixels, tokens=tokenizer(captions), image=image, text=text, classes=classes,
         scale=model.logit_scale.detach().exp(), bias=model.logit_bias.detach())
"""


@pytest.fixture
def trained(make_run, tmp_path):
    """A run with preprocessing and context length of its own, and a checkpoint; the towers in it."""
    colours = ["model.image_mean=[0.3, 0.4, 0.6]", "model.image_std=[0.2, 0.3, 0.25]"]
    shown = ["model.interpolation=bilinear", "model.resize_mode=longest", "model.context_length=12"]
    run = make_run("uniform", *colours, *shown)
    pair = towers.build(run.model, seed=7)
    with torch.no_grad():
        pair.model.logit_bias.fill_(-3.5)
    checkpoints.write(run.path(run.run_dir), 4, {"epoch": 4, "state_dict": pair.model.state_dict()})
    return run, pair


def pictures(folder) -> list[str]:
    rng, paths = np.random.default_rng(0), []
    for i, size in enumerate([(50, 40), (32, 32), (33, 90), (200, 64), (20, 20), (64, 63)]):
        noise = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size)
        paths.append(f"{folder}/{i}.png")
        noise.save(paths[-1])
    return paths


def test_a_stock_open_clip_evaluates_an_exported_model_as_jest_does(trained, tmp_path):
    run, pair = trained
    export.export(run, "model", str(tmp_path / "out"))
    paths = pictures(tmp_path)
    options = [str(tmp_path / "out"), str(tmp_path / "stock.npz"), *map(repr, (paths, NAMES, TEMPLATES, CAPTIONS))]
    subprocess.run([sys.executable, "-c", STOCK, *options], cwd=tmp_path, check=True)
    stock = np.load(tmp_path / "stock.npz")

    raw = torch.from_numpy(np.stack([pair.view(Path(path).read_bytes()) for path in paths]))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (pair.inputs.mean, pair.inputs.std))
    assert torch.equal(torch.from_numpy(stock["pixels"]), (raw / 255 - mean) / std)
    assert np.array_equal(stock["tokens"], pair.tokens(CAPTIONS))
    image, text = image_embeddings(pair, raw), text_embeddings(pair, CAPTIONS)
    np.testing.assert_allclose(stock["image"], image, atol=2e-6)
    np.testing.assert_allclose(stock["text"], text, atol=2e-6)
    assert (stock["scale"], stock["bias"]) == pytest.approx(pair.scale_and_bias())
    classes = class_embeddings(pair, ClassNames(NAMES, [[name] for name in NAMES], TEMPLATES))
    np.testing.assert_allclose(stock["classes"].T, classes, atol=2e-6)  # and with them all zero-shot figures


def test_jest_reads_the_folders_of_open_clip(trained, tmp_path, make_run):
    run, pair = trained
    export.export(run, "model", str(tmp_path / "out"))
    again = make_run("b", "reference.model.name=local-dir:out", "reference.checkpoint=out")
    assert again.reference is not None
    reference = load_reference(again, again.reference)
    assert reference.inputs == pair.inputs
    assert towers.weights_hash(reference.model) == towers.weights_hash(pair.model)
    config = json.loads((tmp_path / "out/open_clip_config.json").read_text())
    assert config == configurations.open_clip_config(reference.name, reference.inputs)  # and exports it alike


def test_a_reference_is_refused_that_would_see_other_pictures_than_in_its_training(trained, make_run):
    run, pair = trained
    facts = configurations.open_clip_config(pair.name, pair.inputs)
    content = {"state_dict": pair.model.state_dict(), "jest": {"step": 1, "open_clip_config": facts}}
    checkpoints.write(run.path("reference"), 1, content)
    alike = [f"reference.{key}={json.dumps(getattr(run.model, key.split('.')[1]))}" for key in FIELDS]
    for key in FIELDS:
        other = make_run("b", *(each for each in alike if f"{key}=" not in each), "reference.model.context_length=12")
        message = rf"step_00000001\.pt was trained on pictures with .*: set reference\.{key} to "
        with pytest.raises(ValueError, match=message):
            load_reference(other, other.reference)
    same = make_run("b", *alike, "reference.model.context_length=12")
    assert load_reference(same, same.reference).inputs == pair.inputs


def test_so_is_one_whose_folder_says_that_it_was_trained_on_other_pictures(trained, tmp_path, make_run):
    run, _ = trained
    export.export(run, "model", str(tmp_path / "out"))
    other = make_run("b", "reference.checkpoint=out", "reference.model.context_length=12")
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors was trained on pictures with mean \[0\.3"):
        load_reference(other, other.reference)


FIELDS = ["model.image_mean", "model.image_std", "model.interpolation", "model.resize_mode"]
