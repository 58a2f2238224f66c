"""The manifests of deploy/kuberay are valid for Kubernetes and for KubeRay."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipelines.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"


def manifest(name: str) -> dict[str, Any]:
    # dumped without aliases, so that anchored parts are copies
    return yaml.safe_load(yaml.dump(yaml.safe_load((KUBERAY / name).read_text()), Dumper=_NoAliases))


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def cluster_spec(name: str) -> dict[str, Any]:
    spec = manifest(name)["spec"]
    return spec["rayClusterSpec"] if name == "job.yaml" else spec


def pods(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": t["spec"]} for t in templates]


@pytest.mark.parametrize("name", ["cluster.yaml", "job.yaml"])
def test_pods_pass_kubernetes_schema_and_run_without_privileges(name: str):
    for pod in pods(name):
        kubernetes_validate.validate(pod, "1.37", strict=True)
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["envFrom"] == [{"secretRef": {"name": "jest-storage"}}]
        assert not [e for e in container.get("env", []) if re.search("KEY|SECRET|TOKEN", e["name"])]
        (shm,) = [v for v in pod["spec"]["volumes"] if v["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_a_misspelt_field_is_found():
    (pod, *_) = pods("job.yaml")
    pod["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, "1.37", strict=True)


def test_object_stores_fit_into_their_memory():
    for group in cluster_spec("job.yaml")["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (shm,) = [v for v in pod["volumes"] if v["name"] == "shm"]
        limit = pod["containers"][0]["resources"]["limits"]["memory"]
        store = int(group["rayStartParams"]["object-store-memory"]) / 2**30
        assert store < float(shm["emptyDir"]["sizeLimit"].removesuffix("Gi")) < float(limit.removesuffix("Gi")) / 2


def test_the_job_has_the_clusters_nodes_and_real_stages():
    assert cluster_spec("job.yaml") == cluster_spec("cluster.yaml")
    command, stages, *words = manifest("job.yaml")["spec"]["entrypoint"].split()
    assert (command, stages) == ("jest", "stages")
    assert set(words[:-1]) < set(STAGES)


def test_the_network_policy_passes_kubernetes_schema():
    kubernetes_validate.validate(manifest("network.yaml"), "1.37", strict=True)


def test_every_node_has_the_port_that_prometheus_asks():
    (endpoint,) = manifest("monitoring.yaml")["spec"]["podMetricsEndpoints"]
    (policy,) = [rule["ports"] for rule in manifest("network.yaml")["spec"]["ingress"] if "ports" in rule]
    assert policy == [{"port": endpoint["port"]}]
    for pod in pods("cluster.yaml"):
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert ports[endpoint["port"]] == 8080  # the port on which KubeRay has Ray serve its metrics


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS: a folder with KubeRay's published CRDs")
@pytest.mark.parametrize(("name", "crd"), [("cluster.yaml", "rayclusters"), ("job.yaml", "rayjobs")])
def test_manifests_pass_kuberays_schema(name: str, crd: str):
    definition = yaml.safe_load(Path(os.environ["KUBERAY_CRDS"], f"ray.io_{crd}.yaml").read_text())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = _closed(version["schema"]["openAPIV3Schema"])
    del schema["properties"]["metadata"]
    schema["properties"]["metadata"] = {}
    jsonschema.validate(manifest(name), schema)
    wrong = manifest(name)
    wrong["spec"]["backoffLimits"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def _closed(schema: Any) -> Any:
    """The OpenAPI schema as a JSON schema in which unknown fields are errors, and int-or-string may be either."""
    schema = copy.deepcopy(schema)
    if isinstance(schema, list):
        return [_closed(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _closed(value) for key, value in schema.items()}
    if (
        isinstance(out.get("properties"), dict)
        and out.get("type") == "object"
        and "x-kubernetes-preserve-unknown-fields" not in out
    ):
        out.setdefault("additionalProperties", False)
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    return out
