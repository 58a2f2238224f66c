"""Whether a cluster has an autoscaler, which starts nodes for what waits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import free_port

HEAD_ID = "f" * 51 + "00000"
ASK = """
import os, time, ray
from pipelines.base import demand
from ray.experimental.internal_kv import _internal_kv_get
ray.init(os.environ["CLUSTER"], log_to_driver=False, logging_level="ERROR")
v2 = "RAY_enable_autoscaler_v2" in os.environ  # of which the key stays empty
while not v2 and b"node_type_mapping\\": {" not in (_internal_kv_get("__autoscaling_status") or b""):  # each 5 s
    time.sleep(0.5)
print(demand.autoscales())
"""
FAKE = {
    "cluster_name": "fake",
    "max_workers": 2,
    "provider": {"type": "fake_multinode", "head_node_id": HEAD_ID, "launch_multiple": True},
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpus": {"resources": {"CPU": 2, "GPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    },
    **{key: {} for key in ("auth", "docker", "file_mounts")},
    **{key: [] for key in ("initialization_commands", "setup_commands", "cluster_synced_files", "rsync_exclude")},
    **{key: [] for key in ("rsync_filter", "head_setup_commands", "worker_setup_commands")},
    **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands")},
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "file_mounts_sync_continuously": False,
}


# What KubeRay and `ray up` set, which run the autoscaler's version 2
VERSION_2 = {
    "RAY_enable_autoscaler_v2": "1",
    "RAY_NODE_TYPE_NAME": "head",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("scales", "version"), [(True, {}), (True, VERSION_2), (False, {})], ids=["version 1", "version 2", "none"]
)
def test_a_cluster_grows_if_it_has_an_autoscaler(tmp_path: Path, scales: bool, version: dict[str, str]):
    """Ray's own autoscaler with its provider of made-up nodes, and a cluster of `ray start` alone."""
    port, ray = free_port(), str(Path(sys.executable).parent / "ray")
    (tmp_path / "fake.json").write_text(json.dumps(FAKE))
    command = [ray, "start", "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false", "--block"]
    command += [f"--autoscaling-config={tmp_path / 'fake.json'}"] * scales
    more = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "CLUSTER": f"127.0.0.1:{port}"}
    environment = os.environ | more | version | {"RAY_TMPDIR": "/tmp"}
    environment.pop("RAY_ADDRESS", None)
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not psutil.Process(head.pid).children():
            assert head.poll() is None
        for _ in range(3):  # until its server listens
            asked = subprocess.run(
                [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=90
            )
            if asked.returncode == 0:
                break
        assert asked.stdout == f"{scales}\n", asked.stderr
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            process.kill()
        head.wait()
