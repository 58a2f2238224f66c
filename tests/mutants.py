"""The faults of mutants.yaml, one after the other: `make mutants`, or python -m tests.mutants [NAME...].

A copy of the tree gets the fault, and the tests that are named run in it; one of them has to fail (a fault that keeps
the tests from being collected is not caught). Before that they have to pass without the fault. --fast: only the faults
that a fast test catches.
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
_PASSED, _FAILED = 0, 1  # of pytest's exit statuses


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    line: str  # once in the file; indentation does not count
    fault: str
    tests: tuple[str, ...]  # below tests/
    fast: bool = True  # whether they are


def _read() -> Iterator[Mutant]:
    for group in yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text()):
        for name, change in group["faults"].items():
            tests = tuple(group["tests"])
            yield Mutant(name, group["file"], change["line"], change["fault"], tests, group.get("fast", True))


MUTANTS = list(_read())


def copy(root: str | Path, folder: str) -> None:
    """The tree, as far as tests need it."""
    for name in _COPIED:
        source, target = Path(root, name), f"{folder}/{name}"
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    for name in _LINKED:
        os.symlink(ROOT / name, f"{folder}/{name}")


def place_of(mutant: Mutant, root: str | Path = ROOT) -> tuple[list[str], int]:
    """The lines of its file, and which of them is meant. Raises ValueError where there is not just one."""
    lines = Path(root, mutant.file).read_text().splitlines()
    found = [i for i, line in enumerate(lines) if line.strip() == mutant.line]
    if len(found) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.file} has {len(found)} lines `{mutant.line}`; correct tests/mutants.yaml"
        )
    return lines, found[0]


def apply(mutant: Mutant, folder: str) -> None:
    lines, i = place_of(mutant, folder)
    indent = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
    lines[i] = indent + mutant.fault
    Path(folder, mutant.file).write_text("\n".join(lines) + "\n")


def run_tests(folder: str, tests: Iterable[str], fast: bool) -> int:
    """Run tests of a copy in this process, whose standard output is a file then; pytest's exit status.

    This is for a process that was forked for it: it forgets the modules that it has of another copy.
    """
    for name in [name for name in sys.modules if name.split(".")[0] in _COPIED + _LINKED]:
        del sys.modules[name]
    with open(f"{folder}/output", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path[0] = os.environ["PYTHONPATH"] = folder  # the second is for processes that tests start
    import pytest

    marks = ["-m", "fast"] if fast else []
    chosen = [f"tests/{test}" for test in sorted(set(tests))]
    status = int(pytest.main(["-x", "-q", "-rf", "-p", "no:cacheprovider", *marks, *chosen]))
    sys.stdout.flush()
    os._exit(status)  # of a test's threads and handlers none is waited for


def start(folder: str, tests: Iterable[str], fast: bool) -> Any:
    process = get_context("fork").Process(target=run_tests, args=(folder, list(tests), fast))
    process.start()
    return process


def by_what(status: int, folder: str) -> tuple[bool, str]:
    """Whether a fault was caught, and by which test."""
    output = Path(folder, "output").read_text(errors="replace")
    if status == _FAILED:
        found = re.search(r"^FAILED tests/(.*?)(?: - |$)", output, re.MULTILINE)
        return found is not None, found[1] if found else f"no test, but what it needs: {output[-2000:]}"
    return False, "nothing" if status == _PASSED else f"pytest ended with {status}: {output[-2000:]}"


def try_all(mutants: Sequence[Mutant], root: str, at_once: int) -> Iterator[tuple[Mutant, bool, str]]:
    """Each with what `by_what` says of it, as they end."""
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
    for name in _HEAVY:  # what takes most of a test's time is imported once, here, and forked
        import_module(name)
    survivors = []
    with tempfile.TemporaryDirectory() as root:  # what is edited meanwhile is of the next time
        copy(ROOT, root)
        for at_once, fast in ((len(os.sched_getaffinity(0)), True), (1, False)):
            some = [mutant for mutant in chosen if mutant.fast is fast]
            if not some:
                continue
            process = start(root, [test for mutant in some for test in mutant.tests], fast)
            process.join()
            if process.exitcode != _PASSED:
                print("the tests do not pass without a fault:", Path(root, "output").read_text()[-5000:], sep="\n")
                return 1
            for mutant, caught, by in try_all(some, root, at_once):
                told = ("caught, fast" if fast else "caught") if caught else "SURVIVES"
                print(f"{mutant.name:40}  {told:12}  {by}", flush=True)
                survivors += [] if caught else [mutant.name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults are caught" + ": not " * bool(survivors), end="")
    print(", ".join(survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
