"""The files of deploy/launcher are valid for Ray, and leave nothing to Ray's defaults that would not work."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import googleapiclient
import jsonschema
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
COMMANDS += ["head_start_ray_commands", "worker_start_ray_commands"]


def _load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy/launcher" / name).read_text())


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_launcher_files_pass_rays_schema(name: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = _load(name)
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert config["head_node_type"] in config["available_node_types"]
    assert not [c for c in config["head_start_ray_commands"] if "dashboard-host" in c]
    # Ray's defaults, which it takes for what a file leaves out, install wheels of a Ray that is not ours
    assert not [c for key in COMMANDS for c in prepared[key] if "pip install" in c]
    wrong = config | {"idle_timeout": 1}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(wrong))


def test_both_clouds_start_ray_by_the_same_commands_and_with_a_token():
    aws, gcp = _load("aws.yaml"), _load("gcp.yaml")
    for key in (*COMMANDS, "file_mounts", "docker"):
        assert aws[key] == gcp[key], key
    assert aws["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "--env RAY_AUTH_MODE=token" in aws["docker"]["run_options"]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_gpus_start_when_they_are_asked_for_and_only_their_containers_see_any(name: str):
    types = _load(name)["available_node_types"]
    assert {type_["min_workers"] for type_ in types.values() if "min_workers" in type_} == {0}
    for type_ in types.values():
        options = type_.get("docker", {}).get("worker_run_options", [])
        assert ("--gpus all" in options) == ("GPU" in type_["resources"])


def test_every_machine_of_aws_has_an_image_with_a_driver_and_rights_of_its_own():
    """Ray's own default is an image of 2022; and the rights to start machines are the head's alone."""
    types = _load("aws.yaml")["available_node_types"]
    for name, type_ in types.items():
        node = type_["node_config"]
        assert re.fullmatch(r"resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-.*/ami-id", node["ImageId"])
        assert node["IamInstanceProfile"] == {"Name": "jest-head" if name == "head" else "jest-worker"}


def test_every_machine_of_google_has_an_image_with_a_driver_of_cuda_13_and_workers_reach_the_bucket():
    types = _load("gcp.yaml")["available_node_types"]
    for name, type_ in types.items():
        (disk,) = type_["node_config"]["disks"]
        driver = re.search(r"/common-cu\d+-ubuntu-2\d04-nvidia-(\d+)$", disk["initializeParams"]["sourceImage"])
        assert int(driver[1]) >= 580
        assert name == "head" or type_["node_config"]["serviceAccounts"]


def test_amazons_api_knows_what_the_machines_of_aws_are_made_with():
    """By the description of the API that Amazon's client checks a call with."""
    call = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, type_ in _load("aws.yaml")["available_node_types"].items():
        node = type_["node_config"] | {"MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(node, call)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
    assert ParamValidator().validate(node | {"ImageID": "a"}, call).has_errors()


def _unknown(value: Any, schema: dict[str, Any], schemas: dict[str, Any], path: str) -> list[str]:
    """The paths of a value that a schema of Google's API does not have, and enumerated values that it does not list."""
    schema = schemas.get(schema.get("$ref", ""), schema)
    if isinstance(value, list):
        return [p for each in value for p in _unknown(each, schema.get("items", {}), schemas, path)]
    if not isinstance(value, dict):
        return [f"{path}={value}"] if value not in schema.get("enum", [value]) else []
    known = schema.get("properties", {})
    found = [f"{path}.{key}" for key in value if key not in known]
    return found + [p for k in value if k in known for p in _unknown(value[k], known[k], schemas, f"{path}.{k}")]


def test_googles_api_knows_what_the_machines_of_gcp_are_made_with():
    """By the description of the API that Google's client comes with."""
    documents = Path(googleapiclient.__file__).parent / "discovery_cache/documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]
    for name, type_ in _load("gcp.yaml")["available_node_types"].items():
        assert not _unknown(type_["node_config"], schemas["Instance"], schemas, name)
    assert _unknown({"scheduling": {"preemptable": True}}, schemas["Instance"], schemas, "") == [
        ".scheduling.preemptable"
    ]
