"""Captions -> tokens (B, L) int64, the same as those of open_clip's tokenizers.

CLIP's tokenizer is implemented here: open_clip's imports PyTorch, which processes that only read examples do not need.
"""

import gzip
import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import ftfy
import numpy as np
import regex
from numpy.typing import NDArray

_FILE = "bpe_simple_vocab_16e6.txt.gz"  # in the package open_clip: the merges, most frequent first
_N_MERGES = (
    48_894  # of the file: 49,408 tokens less those of single bytes, alone and at the end of a word, and start and end
)
_START, _END = "<start_of_text>", "<end_of_text>"
_WORD = regex.compile(
    rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)


class _Vocabulary(NamedTuple):
    letters: list[str]  # the letter that stands for each byte
    ranks: dict[tuple[str, str], int]  # of pairs: the pair of the lowest rank is merged first
    numbers: dict[str, int]  # of tokens


@runtime_checkable
class Tokenizer(Protocol):
    """Captions -> tokens; name and context_length identify which tokens."""

    @property
    def name(self) -> str: ...

    @property
    def context_length(self) -> int: ...

    def __call__(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Tokens (B, context_length)."""
        ...


@dataclass(frozen=True)
class ClipTokenizer:
    """CLIP's byte-pair encoding in lower case (Radford et al. 2021; open_clip's SimpleTokenizer)."""

    context_length: int = 77
    name: str = "SimpleTokenizer"

    def __call__(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Tokens (B, context_length): start, caption, end, then zeros; a caption that is too long is cut."""
        captions = [captions] if isinstance(captions, str) else captions
        numbers = _vocabulary().numbers
        out = np.zeros((len(captions), self.context_length), np.int64)
        for row, caption in zip(out, captions, strict=True):
            tokens = [numbers[_START], *_tokens(caption)][: self.context_length - 1]
            row[: len(tokens) + 1] = [*tokens, numbers[_END]]
        return out


def _tokens(caption: str) -> list[int]:
    vocabulary, out = _vocabulary(), list[int]()
    for word in _WORD.findall(_clean(caption)):
        out += _word_tokens("".join(vocabulary.letters[byte] for byte in word.encode()))
    return out


def _clean(caption: str) -> str:
    """With broken encodings and HTML entities repaired, one space between words, in lower case."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(repaired.split()).lower()


@lru_cache(maxsize=1 << 17)
def _word_tokens(word: str) -> tuple[int, ...]:
    """Byte-pair encoding of a word: the pair of the lowest rank is merged everywhere, until no pair has a rank."""
    _, ranks, numbers = _vocabulary()
    if word in (_START, _END):
        return (numbers[word],)
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: ranks.get(pair, inf))
        if best not in ranks:
            break
        merged: list[str] = []
        for part in parts:
            if merged and (merged[-1], part) == best:
                merged[-1] += part
            else:
                merged.append(part)
        parts = merged
    return tuple(numbers[part] for part in parts)


@lru_cache(maxsize=1)
def _vocabulary() -> _Vocabulary:
    spec = find_spec("open_clip")  # found, not imported
    assert spec is not None
    assert spec.origin is not None
    lines = gzip.decompress((Path(spec.origin).parent / _FILE).read_bytes()).decode().split("\n")
    first, second = zip(*(line.split() for line in lines[1 : _N_MERGES + 1]), strict=True)
    pairs = list(zip(first, second, strict=True))
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]  # their letters follow Latin-1's
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    singles = [letters[byte] for byte in (*printable, *others)]
    words = [*singles, *(f"{letter}</w>" for letter in singles), *map("".join, pairs), _START, _END]
    return _Vocabulary(
        [letters[byte] for byte in range(256)],
        {pair: rank for rank, pair in enumerate(pairs)},
        {word: number for number, word in enumerate(words)},
    )
