import json
import pickle
import time
from pathlib import Path

import open_clip
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jest_core.examples import tokenizer
from jest_core.examples.tokenizer import ClipTokenizer
from jest_core.models import configurations
from jest_core.models.configurations import OpenClipTokenizer

SHARDS = Path(__file__).parents[3] / "deploy/data/small/pool"

OPEN_CLIP = open_clip.get_tokenizer("ViT-B-32")
HARD = [
    "",
    "   ",
    "A photo of a dog's  bowl,\tit'll be 2024's best!!! £5 &amp;amp; &lt;b&gt;",
    "<start_of_text> within <END_OF_TEXT> a caption, and <|endoftext|>",
    "schÃ¶n — naïve café 😀👩‍👩‍👧 日本語の説明 العربية हिन्दी",
    "ŉ ﬁne İstanbul ſ's ǆ ß",
    "x" * 500,
    "zq" * 300,
    "123 4567 a1b2",
    "don't DON'T don’t",
    "\x00\x1f\u200b\ufeff",
    "word " * 200,
]


def test_hard_captions_are_tokenised_as_open_clip_does():
    assert ClipTokenizer()(HARD).tolist() == OPEN_CLIP(HARD).tolist()
    assert ClipTokenizer()("one caption").tolist() == OPEN_CLIP("one caption").tolist()
    assert ClipTokenizer(8)(HARD).tolist() == OPEN_CLIP(HARD, context_length=8).tolist()


def test_real_captions_are_tokenised_as_open_clip_does():
    captions = [text for path in SHARDS.glob("*.parquet") for text in pq.read_table(path)["caption"].to_pylist()]
    assert len(captions) > 1000
    assert ClipTokenizer()(captions).tolist() == OPEN_CLIP(captions).tolist()


@given(st.lists(st.text(max_size=80), max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_text_is_tokenised_as_open_clip_does(captions: list[str]):
    captions = [text.encode("utf-8", "ignore").decode() for text in captions]
    assert ClipTokenizer()(captions).tolist() == OPEN_CLIP(captions).tolist()


@given(st.text([chr(i) for i in range(32, 127)], max_size=200))
@settings(max_examples=300, deadline=None)
def test_printable_ascii_is_tokenised_as_open_clip_does(caption: str):
    """Such text is not repaired, unless it has an entity."""
    assert ClipTokenizer()([caption]).tolist() == OPEN_CLIP([caption]).tolist()


@given(
    st.text("abcdefghijklmnopqrstuvwxyzé<", min_size=30, max_size=400),
    st.sampled_from(["th", "er", "ing", "aa", "photo"]),
)
@settings(max_examples=100, deadline=None)
def test_any_long_word_is_tokenised_as_open_clip_does(word: str, often: str):
    captions = [word, word.replace("e", often), often * (len(word) // 2), f"{often}{word} " * 3]
    assert ClipTokenizer(400)(captions).tolist() == OPEN_CLIP(captions, context_length=400).tolist()


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_short_context_is_cut_as_open_clip_does(tokens: int):
    assert ClipTokenizer(tokens)(HARD).tolist() == OPEN_CLIP(HARD, context_length=tokens).tolist()


LARGE = {
    "a word": "zq" * 15_000,
    "megabytes of a word": "photograph" * 1_000_000,
    "megabytes of words": "a dog " * 1_000_000,
    "four bytes a letter": "😀" * 30_000,
    "repaired line by line": "Ã¶\n" * 1_000_000,
    "a character of many digits": f"a &#{'9' * 5_000}; b",
    "the same, twice escaped, in parts": f"&amp;#{'9' * 3_000}\x00{'9' * 3_000};",
    "half a character": "a \ud800 b",
}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", LARGE)
def test_a_large_caption_takes_a_second_at_most(kind: str, own: bool):
    ours = ClipTokenizer() if own else OpenClipTokenizer("ViT-B-32", 77, "SimpleTokenizer")
    tokenizer._cached_tokens("a")  # the vocabulary is read
    before = time.process_time()
    tokens = ours(["a dog", LARGE[kind]])
    assert time.process_time() - before < 5  # 1 on a machine that has nothing else to do
    assert tokens[0].tolist() == OPEN_CLIP("a dog")[0].tolist()
    assert tokens[1, 0] == tokens[0, 0]
    assert tokens[1, -1] in (0, 49_407)


def test_what_follows_the_first_characters_of_a_caption_is_not_read():
    padding = " " * (tokenizer.MAX_CHARACTERS - 5)
    assert ClipTokenizer()([f"{padding}a dog and a cat"]).tolist() == OPEN_CLIP(["a dog"]).tolist()


def test_the_vocabulary_equals_that_of_open_clip():
    _, ranks, numbers = tokenizer.vocabulary()
    assert numbers == OPEN_CLIP.encoder
    assert ranks == OPEN_CLIP.bpe_ranks


def test_a_model_with_another_tokenizer_uses_that_of_open_clip(tmp_path: Path):
    assert configurations.inputs("ViT-B-32").tokenizer == ClipTokenizer(77, type(OPEN_CLIP).__name__)
    config = open_clip.get_model_config("ViT-B-32")
    config["text_cfg"] |= {"tokenizer_kwargs": {"clean": "canonicalize"}, "context_length": 12}
    (tmp_path / "canonical-B-32.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    custom = configurations.inputs("canonical-B-32").tokenizer
    assert custom == OpenClipTokenizer("canonical-B-32", 12, "SimpleTokenizer")
    expected = open_clip.get_tokenizer("canonical-B-32")
    assert custom(HARD).tolist() == expected(HARD).tolist() != ClipTokenizer(12)(HARD).tolist()
    assert pickle.loads(pickle.dumps(custom)) == custom
    assert custom("one caption").tolist() == custom(["one caption"]).tolist()
    with pytest.raises(ValueError, match="has a SimpleTokenizer here, and a HFTokenizer where the run started"):
        OpenClipTokenizer("canonical-B-32", 12, "HFTokenizer")(HARD)
    with pytest.raises(ValueError, match="'only-there' is no open_clip model"):
        OpenClipTokenizer("only-there", 12, "SimpleTokenizer")(HARD)
