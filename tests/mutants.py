"""Checks that tests catch the faults of mutants.yaml: `make mutants`, or python -m tests.mutants [NAME...].

For each fault, the tests it lists run in a copy of the tree with that fault, and one of them has to fail. (A fault with
which the tests cannot be collected does not count as caught.) Before, they have to pass without any fault. --fast: only
the faults that a fast test catches.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
_COPIED = ("jest_core", "pipelines", "tests", "pyproject.toml", "README.md", "Makefile")
_LINKED = ("deploy", "docker")
_HEAVY = ("torch", "torchvision", "open_clip", "timm", "pyarrow.parquet", "ray.data", "pandas", "scipy.stats")
_PASSED, _FAILED = 0, 1  # exit statuses of pytest


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    line: str  # occurs exactly once in the file; indentation is ignored
    fault: str
    tests: tuple[str, ...]  # below tests/
    fast: bool = True  # whether the tests are


def _read() -> Iterator[Mutant]:
    for group in yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text()):
        for name, change in group["faults"].items():
            tests = tuple(group["tests"])
            yield Mutant(name, group["file"], change["line"], change["fault"], tests, group.get("fast", True))


MUTANTS = list(_read())


def copy(root: str | Path, folder: str) -> None:
    """Copy the parts of the tree that tests need."""
    for name in _COPIED:
        source, target = Path(root, name), f"{folder}/{name}"
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    for name in _LINKED:
        os.symlink(ROOT / name, f"{folder}/{name}")


def place_of(mutant: Mutant, root: str | Path = ROOT) -> tuple[list[str], int]:
    """The lines of the mutant's file, and the index of its line. Raises ValueError if not exactly one line matches."""
    lines = Path(root, mutant.file).read_text().splitlines()
    matches = [i for i, line in enumerate(lines) if line.strip() == mutant.line]
    if len(matches) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.file} has {len(matches)} lines `{mutant.line}`; correct tests/mutants.yaml"
        )
    return lines, matches[0]


def apply(mutant: Mutant, folder: str) -> None:
    lines, i = place_of(mutant, folder)
    indent = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
    lines[i] = indent + mutant.fault
    Path(folder, mutant.file).write_text("\n".join(lines) + "\n")


def run_tests(folder: str, tests: Iterable[str], fast: bool) -> int:
    """Run the tests of a copy of the tree and exit with pytest's status; the output goes to a file in the copy.

    For a process forked for this purpose: it drops the modules that it has imported from another copy.
    """
    for name in [name for name in sys.modules if name.split(".")[0] in _COPIED + _LINKED]:
        del sys.modules[name]
    with open(f"{folder}/output", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path[0] = os.environ["PYTHONPATH"] = folder  # PYTHONPATH is for subprocesses of the tests
    import pytest

    marks = ["-m", "fast"] if fast else []
    chosen = [f"tests/{test}" for test in sorted(set(tests))]
    status = int(pytest.main(["-x", "-q", "-rf", "-p", "no:cacheprovider", *marks, *chosen]))
    sys.stdout.flush()
    os._exit(status)  # without waiting for threads or exit handlers of a test


def start(folder: str, tests: Iterable[str], fast: bool) -> Any:
    process = get_context("fork").Process(target=run_tests, args=(folder, list(tests), fast))
    process.start()
    return process


def by_what(status: int, folder: str) -> tuple[bool, str]:
    """Whether a fault was caught, and by which test."""
    output = Path(folder, "output").read_text(errors="replace")
    if status == _FAILED:
        match = re.search(r"^FAILED tests/(.*?)(?: - |$)", output, re.MULTILINE)
        return match is not None, match[1] if match else f"no test, but what it needs: {output[-2000:]}"
    return False, "nothing" if status == _PASSED else f"pytest ended with {status}: {output[-2000:]}"


def try_all(mutants: Sequence[Mutant], root: str, at_once: int) -> Iterator[tuple[Mutant, bool, str]]:
    """Each mutant with the result of `by_what`, in the order in which they finish."""
    waiting, running = list(mutants), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            mutant, folder = waiting.pop(0), tempfile.mkdtemp()
            copy(root, folder)
            apply(mutant, folder)
            process = start(folder, mutant.tests, mutant.fast)
            running[process.sentinel] = mutant, folder, process
        for sentinel in wait(list(running)):
            mutant, folder, process = running.pop(sentinel)
            process.join()
            yield mutant, *by_what(process.exitcode, folder)
            shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults; all, where none is given")
    parser.add_argument("--fast", action="store_true", help="only those that fast tests catch")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutant {', '.join(sorted(unknown))}; there are {' '.join(m.name for m in MUTANTS)}")
    chosen = [m for m in MUTANTS if (not given.names or m.name in given.names) and (m.fast or not given.fast)]

    os.environ["OMP_NUM_THREADS"] = "1"
    for name in _HEAVY:  # these imports take most of a test's time: import once here, then fork
        import_module(name)
    survivors = []
    with tempfile.TemporaryDirectory() as root:  # a copy, so that edits in the meantime do not matter
        copy(ROOT, root)
        for at_once, fast in ((len(os.sched_getaffinity(0)), True), (1, False)):
            group = [mutant for mutant in chosen if mutant.fast is fast]
            if not group:
                continue
            process = start(root, [test for mutant in group for test in mutant.tests], fast)
            process.join()
            if process.exitcode != _PASSED:
                print("the tests do not pass without a fault:", Path(root, "output").read_text()[-5000:], sep="\n")
                return 1
            for mutant, caught, by in try_all(group, root, at_once):
                outcome = ("caught, fast" if fast else "caught") if caught else "SURVIVES"
                print(f"{mutant.name:40}  {outcome:12}  {by}", flush=True)
                survivors += [] if caught else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults are caught" + ": not " * bool(survivors), end="")
    print(", ".join(survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
