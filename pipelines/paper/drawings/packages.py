"""The published packages that the drawings come from: which, for which tier, and fetched.

Icon sets, emoji and clip art travel through package registries, which many closed networks can reach when they cannot
reach image hosts. `fetch` takes a tier's packages with the registries' ordinary clients.
"""

import json
import shutil
import subprocess
import tarfile
from importlib.resources import files
from pathlib import Path
from typing import TypedDict

SOURCES_FILE = files("jest_deploy") / "data" / "sources.json"


class Package(TypedDict):
    """A pinned package; of a Debian package the release decides the version."""

    kind: str  # npm or deb
    name: str
    version: str
    dir: str  # below the raw directory
    tiers: list[str]


class Roles(TypedDict):
    """Icon sets, by prefix, and what they serve for."""

    curated_emoji: list[str]
    pool_emoji: list[str]
    i18n_emoji: list[str]
    curated_flags: list[str]
    evaluation: dict[str, str]  # prefix -> evaluation set
    never_train_prefixes: list[str]
    brand_sets: list[str]


class Plan(TypedDict):
    """A tier: which rows it has, and how they are stored."""

    licences: list[str] | None  # SPDX; None: all that allow commercial use
    brands: bool
    skin_tones: bool
    webp_method: int
    webp_quality: int
    rows_per_shard: int
    rows_per_group: int
    rows: dict[str, int]  # by kind, or by evaluation split


class Sources(TypedDict):
    """deploy/data/sources.json."""

    packages: list[Package]
    roles: Roles
    tiers: dict[str, Plan]


def load_sources() -> Sources:
    """The pinned packages, the role of each icon set and the tiers."""
    if not SOURCES_FILE.is_file():
        raise FileNotFoundError(f"{SOURCES_FILE} is missing; build drawings from a checkout of the repository")
    sources: Sources = json.loads(SOURCES_FILE.read_text(encoding="utf-8"))
    return sources


def fetch(tier: str, raw: Path) -> dict[str, str]:
    """Unpack the packages of a tier under `raw`; return package name -> version of those that are there.

    Safe to run again: a package already unpacked is left alone. Debian packages are optional, since their client
    exists on Debian only; without them the tier has less clip art and fewer sentences.
    """
    raw.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in load_sources()["packages"]:
        if tier not in package["tiers"]:
            continue
        done = raw / package["dir"] / ".done"
        if not done.exists():
            if package["kind"] == "deb" and not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
                print(f"{package['name']}: left out, it needs apt-get and dpkg-deb (Debian, Ubuntu)")
                continue
            try:
                _fetch_package(package, raw)
            except (RuntimeError, OSError) as error:
                if package["kind"] != "deb":
                    raise
                print(f"{package['name']}: left out, {error}")
                continue
        versions[package["name"]] = done.read_text(encoding="utf-8").strip()
    return versions


def _fetch_package(package: Package, raw: Path) -> None:
    target, partial = raw / package["dir"], raw / f"{package['dir']}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if package["kind"] == "npm":
        if shutil.which("npm") is None:
            raise FileNotFoundError(
                f"npm is not on PATH and {target} is not unpacked yet; install Node.js (npm comes with it), or copy "
                "the raw directory of a machine that has it"
            )
        version = package["version"]
        # pack only downloads: no install script of the package runs
        archive = partial / _run(["npm", "pack", "--silent", f"{package['name']}@{version}"], partial).split()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    elif package["kind"] == "deb":
        _run(["apt-get", "download", "-qq", package["name"]], partial)
        archive = next(partial.glob("*.deb"))
        version = _run(["dpkg-deb", "-f", str(archive), "Version"], partial).strip()
        _run(["dpkg-deb", "-x", str(archive), str(partial)], partial)
    else:
        raise ValueError(f"{SOURCES_FILE}: kind {package['kind']!r} of {package['name']} is neither npm nor deb")
    archive.unlink()
    (partial / ".done").write_text(version, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _run(command: list[str], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` ended with {result.returncode}: {result.stderr.strip()[-500:]}")
    return result.stdout
