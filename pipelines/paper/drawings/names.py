"""Names of drawings as words, slugs and hashes."""

import hashlib
import re
import unicodedata


def stable_hash(*keys: object) -> int:
    """64 bits that depend on the keys alone, so every choice can be repeated on any machine and in any order."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=8).digest(), "big")


def uniform(*keys: object) -> float:
    """A number in [0, 1) that depends on the keys alone."""
    return stable_hash(*keys) / 2**64


def as_words(name: str) -> str:
    return re.sub(r"[-_/]+", " ", name).strip()


def as_slug(label: str) -> str:
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_label.replace("&", "and").replace("'", "")).strip("-")
