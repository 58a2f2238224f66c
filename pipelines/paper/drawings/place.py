"""A tier of the drawings -> its shards below a root: the small one comes with the package, the others are built."""

import tempfile
from importlib.resources import files
from pathlib import Path

from ...base import manifests, progress, storage

TIERS = ("small", "medium")


def place(tier: str, root: str) -> None:
    """Put the tier at root/data/TIER, where it is not there yet; a copy that was cut short is done again."""
    target = f"{root}/data/{tier}"
    if manifests.exists(target):
        return
    if tier == "small":
        _copy_tree(Path(str(files("jest_deploy") / "data" / "small")), target)
        return
    from .build import build

    progress.say("drawings", f"builds the {tier} tier from npm packages: about 300 MB to fetch, 2 to 5 minutes")
    with tempfile.TemporaryDirectory() as scratch:
        build(tier, Path(scratch) / tier, raw=Path(scratch) / "raw")
        _copy_tree(Path(scratch) / tier, target)


def _copy_tree(source: Path, target: str) -> None:
    """The manifest goes last."""
    paths = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.name == manifests.NAME)
    for path in paths:
        storage.write_bytes(f"{target}/{path.relative_to(source).as_posix()}", path.read_bytes())
