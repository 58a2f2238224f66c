"""More data than memory is streamed without spilling it."""

import json
import sys

import pytest

from tests.commands import finish


@pytest.mark.endurance
@pytest.mark.timeout(1200)
def test_ten_times_the_object_store_streams_from_s3_to_2_and_to_8_consumers(s3, tmp_path):
    command = [sys.executable, "-m", "tests.streaming", f"{s3}/{tmp_path.name}", str(tmp_path / "results.json")]
    finish(*command)
    results = json.loads((tmp_path / "results.json").read_text())
    print(json.dumps(results, indent=1))
    assert results["shard_bytes"] >= 10 * results["store_bytes"]
    two, eight = results["runs"]
    assert two["hash"] == eight["hash"]
    assert len(set(two["hash"])) == 60
    for run in (two, eight):
        assert run["bytes"] >= 10 * results["store_bytes"]
        assert run["late_bytes"] < 1.15 * run["early_bytes"]
        assert run["spilled_bytes"] < results["store_bytes"]
