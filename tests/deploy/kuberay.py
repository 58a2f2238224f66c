"""The manifests of deploy/kubernetes as `kubectl apply -k` sends them, and the pods that KubeRay 1.7 makes of them.

There is no Kubernetes here: what its operator adds to a pod is written down from its source, where a test needs it
(controllers/ray/common/pod.go and job.go).
"""

import copy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "deploy" / "kubernetes"
SIZES = ["small", "gpus-8", "gpus-64"]
Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """The objects of a kustomization."""
    command = [str(Path(sys.executable).parent / "kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def yours(folder: Path, size: str, *components: str) -> list[Manifest]:
    """The objects of deploy/kubernetes/mine with this size and these components, rendered in a copy."""
    copied = folder / "kubernetes"
    if not copied.exists():
        shutil.copytree(MANIFESTS, copied)
    mine = yaml.safe_load((MANIFESTS / "mine/kustomization.yaml").read_text())
    mine |= {"resources": [f"../{size}"], "components": [f"../{component}" for component in components]}
    (copied / "mine/kustomization.yaml").write_text(yaml.safe_dump(mine))
    (copied / "mine/run.yaml").write_text("root: s3://bucket/run\n")
    return render(copied / "mine")


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def cluster_spec(manifests: list[Manifest]) -> dict[str, Any]:
    """What the cluster is, be it one that stays or that of a job."""
    (spec,) = [
        manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]
        for manifest in manifests
        if manifest["kind"] in ("RayCluster", "RayJob")
    ]
    return spec


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The groups of nodes by name; the head's is KubeRay's `headgroup`."""
    return {"headgroup": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}


def ray_container(group: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = group["template"]["spec"]["containers"][0]
    return container


def pods(manifests: list[Manifest]) -> Iterator[Manifest]:
    """The pods that the operator makes, a group each, and that which submits a job."""
    spec = cluster_spec(manifests)
    for name, group in groups(spec).items():
        yield _pod(name, group["template"], spec)
    for job in (manifest["spec"] for manifest in manifests if manifest["kind"] == "RayJob"):
        plain = {"spec": {"restartPolicy": "Never", "containers": [{"name": "ray-job-submitter", "image": "x"}]}}
        template = copy.deepcopy(job.get("submitterPodTemplate", plain))
        template["spec"]["containers"][0].setdefault("env", []).extend(_token(spec))
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "submitter"}, "spec": template["spec"]}


def _pod(name: str, template: dict[str, Any], spec: dict[str, Any]) -> Manifest:
    pod = copy.deepcopy(template["spec"])
    ray = pod["containers"][0]
    ray["volumeMounts"] = [*ray.get("volumeMounts", []), {"name": "shared-mem", "mountPath": "/dev/shm"}]
    limit = ray["resources"]["limits"]["memory"]
    pod["volumes"] = [
        *pod.get("volumes", []),
        {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": limit}},
    ]
    if name != "headgroup":
        waits = {"name": "wait-gcs-ready", "image": ray["image"], "securityContext": ray.get("securityContext", {})}
        pod["initContainers"] = [waits | {"env": _token(spec), "volumeMounts": ray["volumeMounts"]}]
    elif spec.get("enableInTreeAutoscaling"):
        options = spec.get("autoscalerOptions", {})
        scaler = {"name": "autoscaler", "image": ray["image"], "env": _token(spec)}
        scaler |= {key: options[key] for key in ("securityContext", "resources") if key in options}
        if any(mount["mountPath"] == "/tmp/ray" for mount in ray["volumeMounts"]):
            scaler["volumeMounts"] = [{"name": "ray-logs", "mountPath": "/tmp/ray"}]  # of that name, whoever made it
        pod["containers"].append(scaler)
    ray.setdefault("env", []).extend(_token(spec))
    labels = {"ray.io/is-ray-node": "yes", "ray.io/cluster": "jest", "ray.io/group": name}
    metadata = {"name": name, "labels": labels, **template.get("metadata", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}


def _token(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec.get("authOptions", {}).get("mode") != "token":
        return []
    secret = {"secretKeyRef": {"name": "jest", "key": "auth_token"}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": secret}]


def start_command(group: dict[str, Any], address: str | None) -> str:
    """What the operator has a pod run. address: of the head, where it is another node."""
    container, parameters = ray_container(group), dict(group["rayStartParams"])
    requests, limits = (container["resources"].get(key, {}) for key in ("requests", "limits"))
    parameters.setdefault("num-cpus", limits.get("cpu", requests.get("cpu")))
    parameters.setdefault("memory", str(size_bytes(limits["memory"])))
    if gpus := limits.get("nvidia.com/gpu"):
        parameters.setdefault("num-gpus", gpus)
    parameters |= {"metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"}
    parameters |= {"address": address} if address else {"dashboard-host": "0.0.0.0", "no-monitor": "true"}
    flags = "".join(f" --{key}={value} " if value != "true" else f" --{key} " for key, value in parameters.items())
    return (
        f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start{' --head' * (address is None)}{flags} --block "
    )


def size_bytes(quantity: str) -> int:
    """Bytes of a quantity such as 54Gi."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1}
    digits = quantity.rstrip("KMGTi")
    return int(float(digits) * units[quantity[len(digits) :]])


def cpus(quantity: str) -> float:
    """CPUs of a quantity such as 500m."""
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)
