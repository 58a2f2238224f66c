import pickle
import subprocess
import sys

import pytest

from jest_core.models import configurations


def test_a_pretrained_tag_says_how_pictures_are_shown():
    openai = configurations.inputs("ViT-B-32", "openai")
    assert openai.mean[0] == pytest.approx(0.48145466)
    assert "Resize" in repr(openai.view)
    own = configurations.inputs("ViT-B-32", "openai", (0.5, 0.5, 0.5), None, "bilinear", "squash")
    assert own.mean == (0.5, 0.5, 0.5)
    assert own.std == openai.std
    assert not own.prepares_as(openai)
    assert configurations.inputs("ViT-B-32", "laion2b_s34b_b79k").prepares_as(configurations.inputs("ViT-B-32"))
    with pytest.raises(ValueError, match=r"'webli' is no tag of ViT-B-32, which has openai, .*reference\.checkpoint"):
        configurations.inputs("ViT-B-32", "webli")


def test_score_caches_of_an_earlier_version_are_known_by_the_same_words():
    """The fingerprint is part of what a cache was made with: another text would ask for every cache anew."""
    assert configurations.inputs("jest-drawings").fingerprint == (
        "Resize(size=64, interpolation=bicubic, max_size=None, antialias=True); CenterCrop(size=(64, 64)); "
        "MaybeConvertMode(); mean (0.5, 0.5, 0.5); std (0.5, 0.5, 0.5); SimpleTokenizer 16"
    )


def test_they_travel_to_readers_in_a_few_bytes():
    takes = configurations.inputs("ViT-B-32", "openai")
    held = pickle.dumps(takes)
    assert pickle.loads(held) == takes
    assert len(held) < 1000


def test_readers_import_neither_pytorch_nor_open_clip():
    """By what they import, which takes most of their start; test_super_batches.py runs a task."""
    ask = (
        "import sys, pipelines.stream.windows, pipelines.training.replay, pipelines.scores.score_cache;"
        "from jest_core.examples.tokenizer import ClipTokenizer;"
        "ClipTokenizer()(['a b']); print({'torch', 'open_clip', 'torchvision'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"
