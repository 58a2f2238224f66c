"""Paths of a run file: which are absolute, which are below its root, and several sources in one."""

import posixpath
from pathlib import Path


def sources(shards: str | list[str]) -> list[str]:
    """Patterns of shards, one by one: several in one string are joined by `::`, as in open_clip."""
    return shards.split("::") if isinstance(shards, str) else list(shards)


def join(root: str, value: str) -> str:
    """`value` where it is absolute or a URL, else below root; a local result is absolute."""
    if "://" in value or value.startswith("/"):
        return value
    if "://" in root:
        return root.rstrip("/") + "/" + value
    return str(Path(root).absolute() / value)


def holds(directory: str, path: str) -> bool:
    """Whether a path or URL is a directory, or below it, with `.` and `..` resolved."""
    host, inner = _normal(directory)
    other, below = _normal(path)
    return host == other and f"{below}/".startswith(f"{inner}/".replace("//", "/"))


def _normal(path: str) -> tuple[str, str]:
    """The protocol of a path or URL, and what follows it in its shortest form."""
    protocol, separator, inner = path.rpartition("://")
    return protocol if separator and protocol != "file" else "", posixpath.normpath(inner.rstrip("/") or "/")
