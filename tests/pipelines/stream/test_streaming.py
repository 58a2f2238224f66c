"""More data than memory: Ray does the work."""

import json
import sys

import pytest

from tests.commands import finish


@pytest.mark.endurance
@pytest.mark.timeout(1200)
def test_ten_times_the_object_store_flows_from_s3_to_2_and_to_8_consumers(s3, tmp_path):
    command = [sys.executable, "-m", "tests.streaming", f"{s3}/{tmp_path.name}", str(tmp_path / "found.json")]
    finish(*command)
    found = json.loads((tmp_path / "found.json").read_text())
    print(json.dumps(found, indent=1))
    assert found["shard_bytes"] >= 10 * found["store_bytes"]
    two, eight = found["runs"]
    assert two["hash"] == eight["hash"]
    assert len(set(two["hash"])) == 60
    for run in (two, eight):
        assert run["bytes"] >= 10 * found["store_bytes"]
        assert run["late_bytes"] < 1.15 * run["early_bytes"]
        assert run["spilled_bytes"] < found["store_bytes"]
