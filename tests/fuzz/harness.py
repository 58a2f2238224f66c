"""Cases of a fuzzed target: the same ones in the suite, others with `make fuzz`; a failing input is kept in build/fuzz.

A case is a pure function of (seed, target, number of the case), so that a failure can be repeated.
"""

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.random import Generator

SEED = int(os.environ.get("JEST_FUZZ_SEED") or 0)  # `make fuzz` sets it, to a new one if SEED does not say which
CASES = os.environ.get("JEST_FUZZ_CASES")  # of each target: a number, or first:end
FOLDER = Path(__file__).resolve().parents[2] / "build" / "fuzz"
SIZES = [0, 1, 2, 127, 128, 255, 256, 65535, 65536, *(2**n + i for n in (31, 32, 63) for i in (-1, 0)), 2**64 - 1]

T = TypeVar("T")


def fuzz(
    target: str, n_cases: int, make: Callable[[Generator], Any], check: Callable[[Any], None], seconds: float = 10
):
    """Check many inputs; fails with one of each kind of failure.

    target: a part of the test's name, by which pytest can select it; after a dot, what tells apart several in one test.
    n_cases: in the suite. seconds: the most that one check may take of this thread's CPU, which does not depend on
    other processes; a check that never ends is for pytest-timeout.
    """
    first, _, end = (CASES or str(n_cases)).rpartition(":")
    cases = range(int(first or 0), int(end))
    failures: dict[str, list[str]] = {}
    for case in cases:
        value = make(np.random.default_rng([SEED, case, *target.encode()]))
        running = _keep(target, case, value) if CASES else None  # before it runs: it may end this process
        started = time.thread_time()
        try:
            check(value)
            took = time.thread_time() - started
            assert took <= seconds, f"{took:.1f} CPU seconds"
        except Exception as error:
            path = running or _keep(target, case, value)
            again = f'make fuzz SEED={SEED} CASES={case}:{case + 1} ARGS="-k {target.partition(".")[0]}"'
            where = str([(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)])
            text = "".join(traceback.format_exception(error, limit=-9))
            failures.setdefault(f"{type(error)} {where}", []).append(f"{text}input: {path}\nagain: {again}\n")
        else:
            if running:
                running.unlink()
    if failures:
        texts = [f"\n{len(each)} of {len(cases)} cases of {target}\n{each[0]}" for each in failures.values()]
        pytest.fail(f"{len(failures)} kinds of failure\n{''.join(texts)}", pytrace=False)


def _keep(target: str, case: int, value: Any) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{target}-{SEED}-{case}"
    path.write_bytes(value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace"))
    return path


def one_of(items: list[T], rng: Generator) -> T:
    return items[int(rng.integers(len(items)))]


def mutated(data: bytes, rng: Generator, other: bytes = b"") -> bytes:
    """Other bytes: often one flipped bit, else up to three mutations. other: what parts are taken from."""
    out = bytearray(data)
    if rng.random() < 0.3:
        out[_place(out, rng)] ^= 1 << int(rng.integers(8))
        return bytes(out)
    for _ in range(int(rng.integers(1, 4))):
        at, n = _place(out, rng), int(2 ** rng.uniform(0, 11))
        match int(rng.integers(8)):
            case 0:
                out[at : at + 1] = rng.bytes(1)
            case 1:
                out[at : at + n] = b""
            case 2:
                out[at:] = b""
            case 3:
                out[at:at] = rng.bytes(n)
            case 4:
                out[at:at] = out[at : at + n]
            case 5:
                out[at : at + n] = bytes(n)
            case 6:
                start = _place(other, rng)
                out[at : at + n] = other[start : start + n]
            case 7:
                width = one_of([1, 2, 4, 8], rng)
                size = one_of(SIZES, rng) % 256**width
                out[at : at + width] = size.to_bytes(width, one_of(["little", "big"], rng))
    return bytes(out)


def _place(data: bytes | bytearray, rng: Generator) -> int:
    """Anywhere, or, as formats have their headers there, near the beginning or the end."""
    n = max(1, len(data))
    near = int(rng.integers(min(n, 128)))
    return one_of([near, n - 1 - near, int(rng.integers(n)), int(rng.integers(n))], rng) if data else 0


def read_or_refused(path: Path, read: Callable[[], T]) -> T | None:
    """What is read; None where an error that another try cannot help names the file."""
    try:
        return read()
    except (ValueError, FileNotFoundError) as error:
        if str(path) not in str(error):
            raise AssertionError("the error does not name the file") from error
        return None


def same_or_refused(target: str, path: Path, read: Callable[[], Any], n_cases: int = 80) -> None:
    """Whatever becomes of the file's bytes, `read` gives what it gave before, or an error that names the file."""
    whole, written = path.read_bytes(), read()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = read_or_refused(path, read)
        assert found is None or equal(found, written), "other values are read than were written"

    fuzz(target, n_cases, lambda rng: mutated(whole, rng, whole), check)
    path.write_bytes(whole)
    assert equal(read(), written)


def equal(a: Any, b: Any) -> bool:
    """Of anything that files are read as; a table's metadata count too."""
    match a:
        case torch.Tensor():
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        case pa.Table():
            return isinstance(b, pa.Table) and bool(a.equals(b, check_metadata=True))
        case dict():
            return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        case list() | tuple():
            return isinstance(b, type(a)) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)
