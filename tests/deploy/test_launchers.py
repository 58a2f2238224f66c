"""The files of deploy/launcher are valid for the tools that read them."""

import copy
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_launcher_files_pass_rays_schema(name: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "deploy/launcher" / name).read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["head_node_type"] in config["available_node_types"]
    assert not [c for c in config["head_start_ray_commands"] if "dashboard-host" in c]
    wrong = config | {"idle_timeout": 1}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(wrong))
