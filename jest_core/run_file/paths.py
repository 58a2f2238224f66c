"""Paths of a run file: which are absolute, which are below its root, and several sources in one."""

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
