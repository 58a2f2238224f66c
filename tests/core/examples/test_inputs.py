import pickle
import subprocess
import sys

import pytest

from jest_core.models import configurations


def test_a_pretrained_tag_decides_the_preprocessing():
    openai = configurations.inputs("ViT-B-32", "openai")
    assert openai.mean[0] == pytest.approx(0.48145466)
    assert "Resize" in repr(openai.view)
    custom = configurations.inputs("ViT-B-32", "openai", (0.5, 0.5, 0.5), None, "bilinear", "squash")
    assert custom.mean == (0.5, 0.5, 0.5)
    assert custom.std == openai.std
    assert not custom.prepares_as(openai)
    assert configurations.inputs("ViT-B-32", "laion2b_s34b_b79k").prepares_as(configurations.inputs("ViT-B-32"))
    with pytest.raises(ValueError, match=r"'webli' is no tag of ViT-B-32, which has openai, .*reference\.checkpoint"):
        configurations.inputs("ViT-B-32", "webli")


def test_the_fingerprint_of_inputs_is_that_of_earlier_versions():
    """The fingerprint is saved in a score cache's manifest: another text would invalidate every existing cache."""
    assert configurations.inputs("jest-drawings").fingerprint == (
        "Resize(size=64, interpolation=bicubic, max_size=None, antialias=True); CenterCrop(size=(64, 64)); "
        "MaybeConvertMode(); mean (0.5, 0.5, 0.5); std (0.5, 0.5, 0.5); SimpleTokenizer 16"
    )


def test_the_decoder_is_a_part_of_what_prepares_examples_where_it_is_not_pillow():
    name = "jest-drawings"
    ours, other = configurations.inputs(name), configurations.inputs(name, decoder="simplejpeg")
    assert ours == configurations.inputs(name, decoder="pillow")
    assert other.fingerprint == f"Decoder(simplejpeg); {ours.fingerprint}"
    assert not ours.prepares_as(other)
    assert other.view.smaller(32).decoder == "simplejpeg"


def test_inputs_pickle_to_less_than_1000_bytes():
    inputs = configurations.inputs("ViT-B-32", "openai")
    pickled = pickle.dumps(inputs)
    assert pickle.loads(pickled) == inputs
    assert len(pickled) < 1000


def test_readers_import_neither_pytorch_nor_open_clip():
    """Importing them would be most of a reader's start-up time; test_super_batches.py checks a whole task."""
    code = (
        "import sys, pipelines.stream.windows, pipelines.training.replay, pipelines.scores.score_cache;"
        "from jest_core.examples.tokenizer import ClipTokenizer;"
        "ClipTokenizer()(['a b']); print({'torch', 'open_clip', 'torchvision'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"
