"""Folders of models, as open_clip and Hugging Face have them: what is read of them, and how they are wrong."""

import json
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jest_core import run_file
from jest_core.models import configurations, folders, outlines, towers
from tests.conftest import RUN

COLOURS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def folder_of(path, preprocessing: dict | None = None, **model) -> str:
    """A folder as open_clip's push_to_hf_hub writes it, without weights; the model's name."""
    path.mkdir(exist_ok=True)
    config = {"model_cfg": configurations.configuration("jest-tiny") | model}
    if preprocessing is not None:
        config["preprocess_cfg"] = preprocessing
    (path / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{path}"


def test_a_folder_says_how_a_model_sees_pictures(tmp_path):
    name = folder_of(tmp_path / "model", {"size": 32, "interpolation": "bilinear", "resize_mode": "squash", **COLOURS})
    inputs = configurations.inputs(name)
    assert (inputs.mean, inputs.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (inputs.view.image_size, inputs.view.interpolation, inputs.view.resize_mode) == (32, "bilinear", "squash")
    assert configurations.inputs(name, mean=(0.5, 0.5, 0.5)).mean == (0.5, 0.5, 0.5)
    assert configurations.inputs(folder_of(tmp_path / "plain")).mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    seeds = [towers.weights_hash(towers.create(each, seed=1).model) for each in (name, "jest-tiny")]
    assert seeds[0] == seeds[1]  # fresh weights: a checkpoint may name the folder too


def test_a_folder_is_below_the_root_of_a_run_file(tmp_path):
    overrides = ["model.name=local-dir:weights/a", "reference.model.name=local-dir:/elsewhere/b"]
    run = run_file.load(RUN.format(root=tmp_path, name="x", shards="x"), overrides)
    assert run.model.name == f"local-dir:{tmp_path}/weights/a"
    assert run.reference is not None
    assert run.reference.model.name == "local-dir:/elsewhere/b"
    assert run_file.load(run_file.dump(run)).model.name == run.model.name


def test_a_folder_on_object_storage_is_copied_once_without_its_weights(tmp_path, monkeypatch):
    """fsspec's file system in memory stands for a bucket; tests/test_laion.py has one on S3."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders._cache.cache_clear()
    bucket = fsspec.filesystem("memory")
    folder_of(tmp_path / "model", {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"})
    bucket.pipe("/models/a/open_clip_config.json", (tmp_path / "model/open_clip_config.json").read_bytes())
    bucket.pipe("/models/a/open_clip_model.safetensors", b"x" * 1000)
    name = "local-dir:memory://models/a"
    assert configurations.inputs(name).view.resize_mode == "squash"
    copy = Path(folders.on_disk(name).removeprefix("local-dir:"))
    assert [path.name for path in copy.iterdir()] == ["open_clip_config.json"]
    assert copy.is_relative_to(tmp_path / "cache")
    pair = towers.create(name, seed=1)
    assert pair.name == name
    assert towers.weights_hash(pair.model) == towers.weights_hash(towers.create("jest-tiny", seed=1).model)
    folders._copied.cache_clear()  # as in a new process
    assert folders.on_disk(name) == f"local-dir:{copy}"

    folder_of(tmp_path / "model", embed_dim=48)
    bucket.pipe("/models/a/open_clip_config.json", (tmp_path / "model/open_clip_config.json").read_bytes())
    folders._copied.cache_clear()
    assert configurations.width(name) == 48  # another content is another copy
    monkeypatch.setattr(folders, "_MOST_BYTES", 10)
    bucket.pipe("/models/b/vocabulary.txt", b"x" * 11)
    with pytest.raises(ValueError, match=r"memory://models/b/vocabulary\.txt has 11 bytes, and is neither weights"):
        configurations.configuration("local-dir:memory://models/b")
    folders._cache.cache_clear()


def test_cached_facts_follow_a_folder_that_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = folder_of(tmp_path / "model")
    assert outlines.width(name) == 32
    folder_of(tmp_path / "model", embed_dim=48)
    outlines.width.cache_clear()  # as in a new process
    assert outlines.width(name) == 48


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    wrong = {
        "there is no .*missing/open_clip_config.json. Name a folder that `jest export` wrote": None,
        "open_clip_config.json is not JSON": "{",
        "has no model_cfg with embed_dim, vision_cfg, text_cfg": '{"architectures": ["CLIPModel"]}',
        "no model_cfg": "[]",
        "asks to run code": json.dumps(
            {
                "model_cfg": {
                    "embed_dim": 1,
                    "vision_cfg": {},
                    "text_cfg": {"tokenizer_kwargs": {"trust_remote_code": 1}},
                }
            }
        ),
    }
    for message, text in wrong.items():
        folder = tmp_path / "missing"
        if text is not None:
            folder = tmp_path / "there"
            folder.mkdir(exist_ok=True)
            (folder / folders.FILE).write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            configurations.configuration(f"local-dir:{folder}")
    with pytest.raises(FileNotFoundError, match=r"there is no memory://nowhere/open_clip_config\.json\. Name a folder"):
        configurations.configuration("local-dir:memory://nowhere")
    with pytest.raises(ValueError, match="hf download timm/vit --local-dir FOLDER"):
        configurations.configuration("hf-hub:timm/vit")


def test_an_image_tower_that_timm_lacks_is_one_of_jest():
    assert configurations.needs_jest("jest-drawings")
    assert not any(configurations.needs_jest(name) for name in ("jest-tiny", "jest-b-16-256", "ViTamin-S"))


def test_a_tokenizer_of_hugging_face_comes_with_its_folder_from_object_storage(tmp_path, monkeypatch):
    """As SigLIP's: cut to 64 tokens, without punctuation; the same tokens as a stock open_clip's, offline."""
    transformers = pytest.importorskip("transformers")  # of `pip install jest[tokenizers]`
    import open_clip
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders._cache.cache_clear()
    vocabulary = Tokenizer(models.Unigram())
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"special_tokens": ["</s>", "<unk>"], "unk_token": "<unk>"}
    texts = ["a cat on a mat", "two dogs in a park", "a drawing of a house"]
    vocabulary.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=60, **special))
    names = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, **names).save_pretrained(tmp_path / "model")
    text = configurations.configuration("jest-tiny")["text_cfg"] | {"context_length": 64, "vocab_size": 100}
    siglip = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"}}
    stock = folder_of(tmp_path / "model", text_cfg=text | siglip)
    for path in (tmp_path / "model").iterdir():
        fsspec.filesystem("memory").pipe(f"/models/siglip/{path.name}", path.read_bytes())

    inputs = pickle.loads(pickle.dumps(configurations.inputs("local-dir:memory://models/siglip")))
    captions = ["A Cat, on a MAT!!", "two dogs " * 40, ""]
    tokens = inputs.tokenizer(captions)
    assert tokens.shape == (3, 64)
    assert np.array_equal(tokens, open_clip.get_tokenizer(stock)(captions).numpy())

    again = configurations.inputs(stock).tokenizer  # by another name
    assert again.identity == inputs.tokenizer.identity is not None
    again(captions)
    assert configurations._identity(configurations.open_clip_tokenizer(stock, 64)) == again.identity  # after use too
    assert configurations.inputs(stock, context_length=32).tokenizer.identity != again.identity
    other = folder_of(tmp_path / "other", text_cfg=text | siglip | {"tokenizer_kwargs": {"clean": "whitespace"}})
    for path in (tmp_path / "model").glob("*token*"):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    assert configurations.inputs(other).tokenizer.identity not in (again.identity, None)
    folders._cache.cache_clear()
