"""Ray's autoscaler starts nodes of its provider for tests, real raylets on this machine, for tasks that wait.

In namespaces of the network and of processes: the provider's nodes join port 6379 only, and all end together.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_NODES = """
cluster_name: jest-fake
max_workers: 8
upscaling_speed: 1.0
idle_timeout_minutes: 5
provider:
  type: fake_multinode
  use_node_id_as_ip: true
  disable_node_updaters: true
  disable_launch_config_check: true
  launch_multiple: true
  head_node_id: fffffffffffffffffffffffffffffffffffffffffffffffffff00000
auth: {}
head_node_type: ray.head.default
available_node_types:
  ray.head.default: {resources: {CPU: 0}, node_config: {}, max_workers: 0}
  data: {resources: {CPU: 2, object_store_memory: 80000000}, node_config: {}, max_workers: 2}
  learners: {resources: {CPU: 2, GPU: 2, object_store_memory: 80000000}, node_config: {}, max_workers: 1}
file_mounts: {}
cluster_synced_files: []
file_mounts_sync_continuously: false
rsync_exclude: []
rsync_filter: []
initialization_commands: []
setup_commands: []
head_setup_commands: []
worker_setup_commands: []
head_start_ray_commands: []
worker_start_ray_commands: []
"""
_DRIVER = """
import json, time
import ray
from pipelines.base import cluster, in_parallel

cluster.connect()
assert cluster.grows()

@ray.remote(num_cpus=1)
def work(i):
    time.sleep(2)

def sizes():
    there = ray.cluster_resources()
    return there.get("CPU", 0), there.get("GPU", 0)

seen = [sizes()]
for n in (lambda: 4, cluster.n_tasks()):
    for _ in in_parallel.ray_tasks(work.remote, [(i,) for i in range(10)], n):
        pass
    seen.append(sizes())
print("SEEN", json.dumps([*seen, n()]))
cluster.disconnect()
"""


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix" or os.geteuid() or not shutil.which("unshare"), reason="needs namespaces")
def test_tasks_that_wait_start_nodes_and_none_with_gpus_up_to_the_number_that_is_set(tmp_path: Path):
    (tmp_path / "nodes.yaml").write_text(_NODES)
    (tmp_path / "driver.py").write_text(_DRIVER)
    ray = Path(sys.executable).parent / "ray"
    temporary = f"/tmp/jest-grow-{os.getpid()}"
    script = (
        f"ip link set lo up; {ray} start --head --num-cpus=0 --port=6379 --autoscaling-config={tmp_path}/nodes.yaml "
        f"--temp-dir={temporary} --object-store-memory=100000000 --include-dashboard=false && "
        f"RAY_ADDRESS=127.0.0.1:6379 {sys.executable} {tmp_path}/driver.py"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    environment |= {"RAY_AUTH_MODE": "disabled", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", script]
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    before, bounded, overflown, at_once = json.loads(ran.stdout.partition("SEEN ")[2].splitlines()[0])
    assert before == [0, 0]
    assert bounded == [4, 0]  # as many tasks as CPUs of the nodes without GPUs: both of those, and no other
    assert overflown[0] >= 4
    assert at_once == 4 if overflown[1] else at_once > 4  # a node with GPUs came: nothing waits for it
