"""Captions -> tokens (B, L) int64, the same as those of open_clip's tokenizers.

CLIP's tokenizer is implemented here: open_clip's imports PyTorch, which processes that only read examples do not need.
"""

import gzip
import hashlib
import html
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from importlib.util import find_spec
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
MAX_CHARACTERS = 1 << 15  # of a caption that are read, by any tokenizer: repairing some texts takes 30 us a character
_CACHED_LETTERS = 64  # of a word whose tokens are kept; longer ones are rarely words, and 131,072 of them fill a memory
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
    """Captions -> tokens.

    name and context_length say which, to people. identity: equal only where all tokens are; None where that is unknown.
    """

    @property
    def name(self) -> str: ...

    @property
    def context_length(self) -> int: ...

    @property
    def identity(self) -> str | None: ...

    def __call__(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Tokens (B, context_length), of the first MAX_CHARACTERS of each caption."""
        ...


@dataclass(frozen=True)
class ClipTokenizer:
    """CLIP's byte-pair encoding in lower case (Radford et al. 2021; open_clip's SimpleTokenizer)."""

    context_length: int = 77
    name: str = "SimpleTokenizer"

    @property
    def identity(self) -> str:
        return f"{self.name} {self.context_length} {_digest()}"

    def __call__(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """Tokens (B, context_length): start, caption, end, then zeros; a caption that is too long is cut."""
        captions = [captions] if isinstance(captions, str) else captions
        numbers = vocabulary().numbers
        start, end = numbers[_START], numbers[_END]
        every, lengths, most = list[int](), list[int](), self.context_length - 1
        for caption in captions:
            tokens = [start]
            for word in _WORD.findall(_clean(caption[:MAX_CHARACTERS])):
                tokens += _cached_tokens(word) if len(word) <= _CACHED_LETTERS else _word_tokens(word)
                if len(tokens) >= most:
                    break
            every += [*tokens[:most], end]
            lengths.append(min(len(tokens), most) + 1)
        out = np.zeros((len(lengths), self.context_length), np.int64)
        out[np.arange(self.context_length) < np.array(lengths, np.int64)[:, None]] = every
        return out


def _clean(caption: str) -> str:
    """With broken encodings and HTML entities repaired, one space between words, in lower case."""
    if caption.isascii() and caption.isprintable() and "&" not in caption:  # most captions: nothing to repair
        return " ".join(caption.split()).lower()
    repaired = ftfy.fix_text(caption)
    with suppress(ValueError):  # of &#999...; with more digits than Python reads
        repaired = html.unescape(html.unescape(repaired))
    return " ".join(repaired.split()).lower()


@lru_cache(maxsize=1 << 17)
def _cached_tokens(word: str) -> tuple[int, ...]:
    return _word_tokens(word)


def _word_tokens(word: str) -> tuple[int, ...]:
    letters, _, numbers = vocabulary()
    if word in (_START, _END):
        return (numbers[word],)
    return tuple(numbers[part] for part in parts_of("".join(letters[byte] for byte in word.encode())))


def parts_of(word: str) -> list[str]:
    """Byte-pair encoding of a word: the pair of the lowest rank is merged everywhere, until no pair has a rank."""
    return _Parts(word).merged()


class _Parts:
    """The parts of a word while pairs of them are merged, in n log n steps for n letters: pairs wait by their rank, and
    a merge makes at most two new ones."""

    def __init__(self, word: str) -> None:
        self.ranks = vocabulary().ranks
        self.parts = [*word[:-1], word[-1] + "</w>"]  # one that was merged into the one before it is ""
        self.before, self.after = [*range(-1, len(word) - 1)], [*range(1, len(word) + 1)]  # neighbours of each
        self.waiting, self.places = list[int](), defaultdict[int, list[int]](list)  # ranks; where pairs of each begin
        for i in range(len(word)):
            self.wait(i)

    def rank_at(self, i: int) -> int | None:
        """The rank of the pair that begins with part i."""
        if i < 0 or self.after[i] >= len(self.parts):
            return None
        return self.ranks.get((self.parts[i], self.parts[self.after[i]]))

    def wait(self, i: int) -> None:
        """Let the pair that begins with part i wait, if it has a rank."""
        if (rank := self.rank_at(i)) is not None:
            if rank not in self.places:
                heappush(self.waiting, rank)
            self.places[rank].append(i)

    def merged(self) -> list[str]:
        """The parts once no pair has a rank."""
        parts, before, after = self.parts, self.before, self.after
        while self.waiting:
            rank = heappop(self.waiting)
            for i in sorted(self.places.pop(rank)):
                if self.rank_at(i) != rank:  # one of its parts was merged since
                    continue
                taken = after[i]
                parts[i], parts[taken], after[i] = parts[i] + parts[taken], "", after[taken]
                if after[i] < len(parts):
                    before[after[i]] = i
                self.wait(before[i])
                self.wait(i)
        return [part for part in parts if part]


def _merges() -> bytes:
    """The file of the merges."""
    spec = find_spec("open_clip")  # found, not imported
    assert spec is not None
    assert spec.origin is not None
    return gzip.decompress((Path(spec.origin).parent / _FILE).read_bytes())


@lru_cache(maxsize=1)
def _digest() -> str:
    return hashlib.sha256(_merges()).hexdigest()[:32]


@lru_cache(maxsize=1)
def vocabulary() -> _Vocabulary:
    lines = _merges().decode().split("\n")
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
