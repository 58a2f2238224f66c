"""Pack what a machine with PyTorch lacks to run jest: python -m deploy.gpu.bundle build/gpu/site.tar.xz

The releases that deploy/locks/run.txt names and deploy/gpu/machine.txt does not bring, as wheels for Python 3.12 on
Linux, without what jest never imports, in one archive. check.sh unpacks it. Words after the archive go to pip.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAX_BYTES = 44 << 20
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]

# Names in the lock that the packages of machine.txt bring; "*" ends a prefix
_MACHINE = """
    torch torchvision triton nvidia-* cuda-* setuptools sympy mpmath networkx jinja2
    markupsafe fsspec pillow timm pyyaml huggingface-hub hf-xet safetensors tqdm packaging httpcore2 httpx2 h11 anyio
    truststore numpy pyarrow pandas python-dateutil pytz tzdata six typer click shellingham annotated-doc
    rich markdown-it-py mdurl pygments
"""
_NOT_NEEDED = "resvg"  # draws the demonstration's pictures, which are in the tree

# Of what is packed, by path: Ray Train imports ray.tune when a run starts, and jest's pages hold plotly.min.js
_STRIPPED = """
    ray/jars/* ray/cpp/* ray/dashboard/client/* ray/rllib/* ray/serve/* ray/llm/*
    plotly/labextension/* plotly/package_data/datasets/*
    open_clip_train/* share/* etc/* bin/* */tests/* */__pycache__/* *.pyi *.pxd *.pyx *.c *.h *.hpp *.map
    *.dist-info/RECORD *.dist-info/sboms/*
"""
_BOTOCORE = {"s3", "sts", "endpoints.json", "partitions.json", "sdk-default-configuration.json", "_retry.json"}


def requirements() -> str:
    """The entries of the lock, with their hashes, that the machine lacks."""
    lock = (HERE.parent / "locks" / "run.txt").read_text()
    entries = re.split(r"(?m)^(?=[a-z0-9])", lock)[1:]
    absent = [entry for entry in entries if not _is_there(re.split(r"[=\[ ]", entry, maxsplit=1)[0])]
    return "".join(absent)


def _is_there(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in (_MACHINE + _NOT_NEEDED).split())


def is_packed(path: str) -> bool:
    """Of a path within the site directory."""
    if path.startswith("botocore/data/"):
        return path.split("/")[2] in _BOTOCORE
    return not any(fnmatch(path, pattern) for pattern in _STRIPPED.split())


def install(site: Path, more: list[str]) -> None:
    """The packages, as pip installs them for a Python that need not be this one."""
    asked = site.parent / "requirements.txt"
    asked.write_text(requirements())
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    of = ["--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "abi3", "--abi", "none"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-compile", "--only-binary=:all:", "--require-hashes", "--target", str(site), "-r", str(asked)]
    subprocess.run([*command, *of, *platforms, *more], check=True)


def pack(site: Path, archive: Path) -> None:
    """Alike files next to each other: xz finds what they have in common."""
    paths = sorted((p for p in site.rglob("*") if p.is_file()), key=lambda p: (p.suffix, p.name, str(p)))
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:xz", preset=9) as tar:
        for path in paths:
            name = str(path.relative_to(site))
            if is_packed(name):
                tar.add(path, name)
    partial.rename(archive)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack what a machine with PyTorch lacks to run jest.")
    parser.add_argument("archive", type=Path)
    arguments, more = parser.parse_known_args()
    work = Path(tempfile.mkdtemp(prefix="jest-gpu-bundle-"))
    try:
        install(work / "site", more)
        pack(work / "site", arguments.archive)
    finally:
        shutil.rmtree(work)
    size = arguments.archive.stat().st_size
    print(f"{arguments.archive}: {size / 2**20:.1f} MiB")
    if size > MAX_BYTES:
        raise SystemExit(f"the archive is larger than {MAX_BYTES / 2**20:.0f} MiB: strip more of it")


if __name__ == "__main__":
    main()
