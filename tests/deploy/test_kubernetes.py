"""What `kubectl apply -k` sends of deploy/kubernetes passes KubeRay's and Kubernetes' schemas, and pod security."""

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipelines.stages import STAGES

from . import pod_security
from .kuberay import MANIFESTS, ROOT, SIZES, Manifest, cluster_spec, groups, only, pods, ray_container, yours

CRDS = ROOT / "tests" / "crds"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMBINATIONS = [(), ("job",), ("kueue", "job"), ("efa", "job"), ("rdma",)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("manifests")


@pytest.fixture(scope="module")
def job(folder) -> list[Manifest]:
    return yours(folder, "gpus-8", "job")


def _schema(kind: str) -> jsonschema.Draft202012Validator:
    definition = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema: dict[str, Any] = _closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {}
    return jsonschema.Draft202012Validator(schema)


def _closed(schema: Any) -> Any:
    """The OpenAPI schema as a JSON schema in which unknown fields are errors, int-or-string may be either, and what
    Kubernetes checks by rules of its own (CEL, as on managedBy) must not be used, as nothing here could check it."""
    if isinstance(schema, list):
        return [_closed(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    if "x-kubernetes-validations" in schema:
        return False
    out = {key: _closed(value) for key, value in schema.items()}
    if "x-kubernetes-preserve-unknown-fields" not in out and out.get("type") == "object" and "properties" in out:
        out.setdefault("additionalProperties", False)
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    return out


@pytest.fixture(scope="module")
def schemas() -> dict[str, jsonschema.Draft202012Validator]:
    return {kind: _schema(kind) for kind in ("RayCluster", "RayJob")}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("components", COMBINATIONS, ids=lambda names: "+".join(names) or "cluster")
def test_what_is_applied_passes_the_schemas(folder, schemas, size: str, components: tuple[str, ...]):
    manifests = yours(folder, size, *components)
    for manifest in manifests:
        assert manifest["metadata"]["namespace"] == "jest"
        if manifest["kind"] in schemas:
            schemas[manifest["kind"]].validate(manifest)
        else:
            kubernetes_validate.validate(manifest, "1.37", strict=True)
    assert ("RayJob" if "job" in components else "RayCluster") in {manifest["kind"] for manifest in manifests}
    for pod in pods(manifests):
        kubernetes_validate.validate(pod, "1.37", strict=True)
        wrong = ["ray-worker: adds capabilities IPC_LOCK", "wait-gcs-ready: adds capabilities IPC_LOCK"]
        found = pod_security.violations(pod["spec"])
        assert set(found) <= set(wrong if "rdma" in components else [])
        images = [container["image"] for container in pod["spec"]["containers"]]
        assert all(re.fullmatch(rf"registry.example.com/jest-(learner|worker):{VERSION}", image) for image in images)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "backoffLimits"], 1),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"], "1"),
        (["spec", "rayClusterSpec", "managedBy"], "me"),  # which Kubernetes would check by a rule
        (["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "imagee"], "x"),
    ],
)
def test_a_wrong_field_is_found(job, schemas, path: list[Any], value: Any):
    wrong = at = copy.deepcopy(only(job, "RayJob"))
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        schemas["RayJob"].validate(wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"hostNetwork": True},
        {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]},
        {"securityContext": {"runAsNonRoot": True}},
        {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}},
        {"securityContext": {"runAsNonRoot": True, "runAsUser": 0, "seccompProfile": {"type": "RuntimeDefault"}}},
        {"securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "Unconfined"}}},
        {"containers": [{"name": "c"}]},
        {"containers": [{"name": "c", "securityContext": {"allowPrivilegeEscalation": False}}]},
    ],
)
def test_what_restricted_forbids_is_found(job, change: dict[str, Any]):
    head = next(pods(job))
    assert pod_security.violations(head["spec"]) == []
    assert pod_security.violations(head["spec"] | change)


def test_kuberay_probes_over_http_and_every_part_has_the_token(job):
    lock = (ROOT / "deploy/locks/nodes.txt").read_text()
    (ray,) = re.findall(r"^ray==(\S+)", lock, re.MULTILINE)
    spec = cluster_spec(job)
    assert spec["rayVersion"] == ray  # without it, KubeRay probes with wget, and refuses tokens
    assert spec["authOptions"] == {"mode": "token"}
    assert not [c for c in map(ray_container, groups(spec).values()) if "readinessProbe" in c or "livenessProbe" in c]
    for pod in pods(job):
        for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]:
            assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


def test_the_job_is_the_cluster_and_has_real_stages(folder, job):
    assert cluster_spec(job) == cluster_spec(yours(folder, "gpus-8"))
    spec = only(job, "RayJob")["spec"]
    *command, run = spec["entrypoint"].split()
    assert command[:4] == ["env", "JEST_SUBMISSION=1", "jest", "stages"]
    words = command[4:]
    assert run == "/run/jest/run.yaml"
    assert set(words) < set(STAGES)
    assert spec["backoffLimit"] <= 2  # each is a cluster anew, also for a mistake in the run file
    (mount,) = [m for m in ray_container(spec["rayClusterSpec"]["headGroupSpec"])["volumeMounts"] if m["name"] == "run"]
    assert (only(job, "ConfigMap")["metadata"]["name"], mount["mountPath"]) == ("jest-run", "/run/jest")


def test_storage_is_reached_by_role_or_by_keys_and_no_key_is_in_a_manifest(job):
    account = only(job, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    for name, group in groups(cluster_spec(job)).items():
        pod, container = group["template"]["spec"], ray_container(group)
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert pod["automountServiceAccountToken"] == (name == "headgroup")  # its autoscaler asks Kubernetes
        assert container["envFrom"] == [{"secretRef": {"name": "jest-storage", "optional": True}}]
        assert not [e for e in container.get("env", []) if re.search("KEY|SECRET|TOKEN", e["name"])]


def test_host_names_are_looked_up_once_and_logs_have_a_volume(job):
    for pod in list(pods(job))[:3]:
        assert {"name": "ndots", "value": "1"} in pod["spec"]["dnsConfig"]["options"]
        (volume,) = [v for v in pod["spec"]["volumes"] if v["name"] == "ray-logs"]
        assert volume["emptyDir"].keys() == {"sizeLimit"}
        for container in pod["spec"]["containers"]:  # of the head also the autoscaler, whose logs Ray reads there
            assert {"name": "ray-logs", "mountPath": "/tmp/ray"} in container["volumeMounts"]


def test_the_head_and_the_learners_stay_and_get_the_time_for_a_checkpoint(job):
    budget = only(job, "PodDisruptionBudget")["spec"]
    assert isinstance(budget["minAvailable"], int)  # all that Kubernetes counts for pods of a custom resource
    assert "maxUnavailable" not in budget
    (rule,) = budget["selector"]["matchExpressions"]
    for pod in list(pods(job))[:3]:
        name, spec = pod["metadata"]["name"], pod["spec"]
        stays, keeps = name in rule["values"], pod["metadata"].get("annotations", {})
        assert stays == (name != "data")
        assert (keeps.get("cluster-autoscaler.kubernetes.io/safe-to-evict") == "false") == stays
        assert (keeps.get("karpenter.sh/do-not-disrupt") == "true") == stays
        variables = {e["name"]: e.get("value") for e in spec["containers"][0]["env"]}
        waits = variables.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or variables["RAY_JOB_STOP_WAIT_TIME_S"]
        assert 0.7 * spec["terminationGracePeriodSeconds"] < int(waits) < spec["terminationGracePeriodSeconds"]


def test_labels_by_which_pods_are_found_are_kuberays(folder):
    manifests = yours(folder, "small", "monitoring", "job")
    (monitor, policy) = (only(manifests, kind)["spec"] for kind in ("PodMonitor", "NetworkPolicy"))
    (endpoint,) = monitor["podMetricsEndpoints"]
    (key,) = {e["key"] for e in policy["podSelector"]["matchExpressions"]}
    (scraped,) = [rule["ports"] for rule in policy["ingress"] if "ports" in rule]
    assert scraped == [{"port": endpoint["port"]}]
    for pod in list(pods(manifests))[:3]:
        assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert key in pod["metadata"]["labels"]
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert ports[endpoint["port"]] == 8080  # the port on which KubeRay has Ray serve its metrics


def test_a_queue_gets_a_job_of_fixed_size(folder):
    manifests = yours(folder, "gpus-64", "kueue", "job")
    assert only(manifests, "RayJob")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "jest"
    spec = cluster_spec(manifests)
    assert spec["enableInTreeAutoscaling"] is False
    for group in spec["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_every_folder_of_manifests_is_used_and_on_the_page():
    named = {"base", "mine", "monitoring", *SIZES, *(name for names in COMBINATIONS for name in names)}
    assert {path.name for path in MANIFESTS.iterdir() if path.is_dir()} == named
    page = (ROOT / "deploy/docs/kubernetes.md").read_text()
    assert not [name for name in named - {"base", "mine"} if f"| `{name}` |" not in page]
