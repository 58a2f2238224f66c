"""The benchmarks run; what they measure is for `make bench`."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("selection", "--smaller 32", ["best dense", "of the floor", "20 draws", "Time against B", "Gibbs"]),
        ("loss", "--smaller 32", ["SigLipLoss"]),
        ("training", "--model jest-tiny --steps 6 --repeats 1 --parts loop", ["open_clip's loop", "peak MB"]),
        ("cached", "--width 64 --rows 64 --repeats 1", ["fixed-size binary", "the object store"]),
        ("flexi", "--model jest-tiny --repeats 1", ["FlexiJEST, scoring in bf16", "time / FLOPs"]),
    ],
)
def test_a_benchmark_runs_at_a_small_size(name: str, options: str, words: list[str]):
    command = [sys.executable, "-m", f"tests.benchmarks.bench_{name}", *options.split()]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert not [word for word in words if word not in ran.stdout], ran.stdout
