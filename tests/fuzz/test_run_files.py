"""Text of a run file -> Run, or a ValueError that begins with the file's name, soon."""

from copy import deepcopy
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from numpy.random import Generator

from jest_core import run_file
from tests.fuzz.harness import fuzz, mutated, one_of

WORDS = (
    r"1e999 . / .. :: a::b a[1]b {0..99999999}.parquet { </script> s3:// s3://b/x http://[ joint jest-tiny 2026-01-01"
)
SCALARS = [
    *(None, True, 0, -1, 1, 3, 2**31, 2**64, 10**400, 0.0, 0.5, 1e-300, 1e308, float("inf"), float("nan")),
    *("", " ", "\0", "\ud800", "ü" * 300, [], {}, [[]], [{}], *WORDS.split()),
]
ALIASES = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]" for i in range(1, 12)), "data: *a11"])
TEXTS = [
    *("a: &a [*a]", "&a [*a]", "- a", "? [a]\n: b", "a: 2026-13-45", "a: 0x", "\t", "a: b\n---\nc: d", "<<: 1"),
    *(f"a: !!{tag} x" for tag in ("int", "bool", "timestamp", "binary", "set", "omap", "python/object:os.system")),
    *("a: " + "9" * 5000, "[" * 3000, "a: " + "{b: " * 2000, "%YAML 9.9\n---\na: b", "\ufeffa: 1", ALIASES),
]


@cache
def sources() -> list[str]:
    return [path.read_text() for path in sorted(Path(str(files("jest_deploy") / "runs")).rglob("*.yaml"))]


def make(rng: Generator) -> str:
    text = one_of(sources(), rng)
    match int(rng.integers(10)):
        case 0 | 1 | 2:
            return mutated(text.encode(), rng, one_of(sources(), rng).encode()).decode("utf-8", "replace")
        case 3:
            lines = text.splitlines()
            lines.insert(int(rng.integers(len(lines))), one_of(TEXTS, rng))
            return one_of([text + "\n" + one_of(TEXTS, rng), one_of(TEXTS, rng), "\n".join(lines)], rng)
        case _:
            values = yaml.safe_load(text)
            for _ in range(int(rng.integers(1, 4))):
                change(values, rng)
            return yaml.dump(values)


def change(values: Any, rng: Generator) -> None:
    """Replace, remove, add or move one value, anywhere in the tree."""
    places = list(branches(values))
    inside, key = one_of(places, rng)
    other, other_key = one_of(places, rng)
    match int(rng.integers(5)):
        case 0 | 1:
            inside[key] = one_of(SCALARS, rng)
        case 2:
            del inside[key]
        case 3 if isinstance(inside, dict):
            inside[one_of([f"{key}s", f"{key}"[1:], 1, None, "ü"], rng)] = inside[key]
        case _:
            inside[key] = deepcopy(other[other_key])


def branches(tree: Any) -> Any:
    """Each mapping or list of the tree, with each of its keys."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from branches(value)


def check(text: str) -> None:
    try:
        run = run_file.load(text, source="the-run-file.yaml")
    except ValueError as error:
        message = str(error)
    else:
        assert run_file.load(run_file.dump(run)) == run
        return
    assert message.startswith("the-run-file.yaml")
    assert len(message) < 20_000


def test_run_files():
    fuzz("run_files", 150, make, check, seconds=2)
