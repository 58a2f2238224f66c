"""deploy/skypilot/jest.yaml: SkyPilot reads it, and its commands run a stage on two hosts."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from jest_core import run_file
from tests.conftest import MakeRun
from tests.deploy.ssh_hosts import BIN, SshHosts, ended, refuse_or_skip

FILE = Path(__file__).resolve().parents[2] / "deploy/skypilot/jest.yaml"
RELEASE = "skypilot==0.14.1"  # its requirements are older than those of the lock: in an environment of its own
READ = """
import sys, sky
for path in sys.argv[1:]:
    task = sky.Task.from_yaml(path)
    task.validate()
    for resources in task.resources:
        print(task.num_nodes, *resources.accelerators.items(), resources.use_spot, resources.job_recovery)
"""
# SkyPilot downloads the list of all clouds' accelerators; these are lines of it
ACCELERATORS = 'AcceleratorName,Clouds\nA100,"[AWS, GCP]"\nA100-80GB,"[AWS, GCP]"\nH100,"[AWS, GCP]"\n'


@pytest.mark.long
def test_skypilot_reads_its_file(tmp_path: Path):
    python = tmp_path / "sky/bin/python"
    for words in (
        ("venv", "--python", sys.executable, tmp_path / "sky"),
        ("pip", "install", "--python", python, RELEASE),
    ):
        subprocess.run([BIN / "uv", "--quiet", *words], check=True, capture_output=True)
    catalog = tmp_path / ".sky/catalogs/v8/common/accelerators.csv"
    catalog.parent.mkdir(parents=True)
    catalog.write_text(ACCELERATORS)
    (tmp_path / "run.yaml").touch()  # of file_mounts
    (tmp_path / "unknown.yaml").write_text(FILE.read_text() + "spot: true\n")

    def read(path: Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "HOME": str(tmp_path),
            "RAY_AUTH_TOKEN": "a",
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        }
        command = [python, "-c", READ, path]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = read(FILE)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("2 ")]
    assert len(lines) == 3, done.stdout
    assert all(" 8) True {'max_restarts_on_errors': 2" in line for line in lines), lines
    refused = read(tmp_path / "unknown.yaml")
    assert refused.returncode, refused.stdout
    assert "spot" in refused.stderr


@pytest.mark.long
def test_the_commands_of_skypilots_file_run_a_stage_on_two_hosts_and_end(make_run: MakeRun):
    run = make_run("sky")
    with tempfile.TemporaryDirectory(prefix="up", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        path = folder / "run.yaml"
        path.write_text(run_file.dump(run))
        commands = yaml.safe_load(FILE.read_text())["run"].replace("/tmp/run.yaml", str(path))
        with refuse_or_skip(), SshHosts(folder, 2, f"export PATH={BIN}:$PATH\n") as hosts:
            given = {"RAY_AUTH_TOKEN": "0" * 64, "STAGES": "catalogue", "RAY_USAGE_STATS_ENABLED": "0"}
            given["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "1"  # the second host has no head left to ask
            given["SKYPILOT_NODE_IPS"] = f"{hosts.address(0)}\n{hosts.address(1)}"
            ran = []
            for rank in (1, 0):
                set_up = "".join(f"export {k}='{v}'\n" for k, v in (given | {"SKYPILOT_NODE_RANK": str(rank)}).items())
                ran.append(hosts.start(rank, f". ~/.bashrc\n{set_up}{commands}"))
            for each in reversed(ran):
                output, _ = each.communicate(timeout=400)
                assert each.returncode == 0, output
            assert list(Path(run.path("catalogue")).glob("*.parquet"))
            assert ended(hosts, 0)
            assert ended(hosts, 1)
