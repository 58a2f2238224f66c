"""What a machine lacks, asked of a real compiler, and of a library in place of the NVIDIA driver's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.base import node_checks

_DRIVER = "int cuDriverGetVersion(int *version) { *version = %d; return 0; }"


def _lacks(gpus: bool, compiled: bool, **environment: str) -> str:
    """As another process with these variables says."""
    code = f"from pipelines.base import node_checks; print(node_checks.lacks(gpus={gpus}, compiled={compiled}))"
    words = [sys.executable, "-c", code]
    ran = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.fixture
def driver(tmp_path: Path):
    """driver(13000): a folder for LD_LIBRARY_PATH with a libcuda.so.1 of that version."""

    def build(version: int) -> str:
        (tmp_path / "driver.c").write_text(_DRIVER % version)
        words = ["gcc", "-shared", "-fPIC", "-o", f"{tmp_path}/libcuda.so.1", f"{tmp_path}/driver.c"]
        subprocess.run(words, check=True)
        return str(tmp_path)

    return build


@pytest.mark.skipif(node_checks._cuda_of_pytorch() is None, reason="PyTorch without CUDA")
def test_an_older_driver_is_refused_with_the_release_that_is_needed(driver):
    needed = node_checks._cuda_of_pytorch()
    major = int(needed.partition(".")[0])
    old = _lacks(gpus=True, compiled=False, LD_LIBRARY_PATH=driver((major - 1) * 1000 + 80))
    assert f"a driver for CUDA {major - 1}.8, and PyTorch is built for CUDA {needed}" in old.replace("an NVIDIA", "a")
    assert "or newer (nvidia-smi shows it)" in old
    assert _lacks(gpus=True, compiled=True, LD_LIBRARY_PATH=driver(major * 1000)) == ""


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a GPU is here")
def test_no_driver_is_said_before_anything_starts():
    with pytest.raises(ValueError, match=r"has no NVIDIA driver \(libcuda.so.1\): install release \d+ or newer"):
        node_checks.refuse_unfit(gpus=True, compiled=False)


def test_no_compiler_is_said_before_anything_starts(driver, monkeypatch):
    assert "has no C++ compiler (g++ or c++), which torch.compile needs: apt-get install gcc g++" in _lacks(
        gpus=False, compiled=True, PATH="/none"
    )
    major = int((node_checks._cuda_of_pytorch() or "13").partition(".")[0])
    without = _lacks(gpus=True, compiled=False, PATH="/none", LD_LIBRARY_PATH=driver(major * 1000))
    assert "has no C compiler (clang or gcc or cc), which Triton needs" in without
    monkeypatch.setenv("PATH", "/none")
    with pytest.raises(ValueError, match=r"which torch\.compile needs"):
        node_checks.refuse_unfit(gpus=False, compiled=True)


def test_a_compiler_without_headers_is_said(tmp_path):
    """As gcc without libc6-dev."""
    compiler = tmp_path / "bare-g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -nostdinc -nostdinc++ "$@"\n')
    compiler.chmod(0o755)
    assert "has a C++ compiler that lacks headers" in _lacks(gpus=False, compiled=True, CXX=str(compiler))


def test_a_python_without_headers_is_said_with_its_package(tmp_path, monkeypatch):
    """As Debian's own without python3-dev."""
    monkeypatch.setattr(node_checks.sysconfig, "get_path", lambda _: str(tmp_path))
    said = node_checks._compiler("Triton", "CC", ("gcc",), "c", node_checks._C)
    assert "lacks headers" in said
    assert "Python.h" in said
    assert said.endswith("apt-get install python3-dev")


def test_a_run_that_needs_neither_is_not_asked(monkeypatch):
    monkeypatch.setenv("PATH", "/none")
    node_checks.refuse_unfit(gpus=False, compiled=False)
