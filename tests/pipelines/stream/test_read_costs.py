"""What reading takes of the CPUs, beside others that want them."""

import os
import subprocess
import sys
import time

import pytest

from pipelines.stream import read_costs


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts it")
def test_waiting_for_a_cpu_is_no_time_of_the_clock():
    """Two processes want one CPU: half of the time this one waits for it."""
    pinned = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}])\n"
    code = """
import time
from pipelines.stream import read_costs
cpu, began, clock = time.process_time(), time.perf_counter(), read_costs._clock()
while time.process_time() < cpu + 0.5: pass
print(time.perf_counter() - began, read_costs._clock() - clock)
"""
    other = subprocess.Popen([sys.executable, "-c", f"{pinned}while True: pass"])
    try:
        command = [sys.executable, "-c", pinned + code]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        other.kill()
        other.wait()
    passed, counted = map(float, out.split())
    assert passed > 0.8
    assert 0.45 < counted < 0.75 * passed


def test_waiting_for_anything_else_is():
    began = read_costs._clock()
    time.sleep(0.2)
    assert read_costs._clock() - began > 0.19
