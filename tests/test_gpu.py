"""The script for a machine with a GPU, on the CPU at small sizes: what it writes, and what does not stop it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.gpu import bundle, check, page, results
from deploy.gpu.check import Piece
from deploy.gpu.results import Results

ROOT = Path(__file__).resolve().parent.parent
MAX_FILES = 8  # in OUT
NAMES = [piece.name for piece in check.PIECES]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_all_pieces_run_on_the_cpu(tmp_path):
    """What needs CUDA is written down as skipped."""
    command = ["bash", str(ROOT / "deploy/gpu/check.sh"), str(tmp_path), "--device", "cpu", "--small"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-5000:]
    rows = page.last_runs(results.read(tmp_path / "results.jsonl"))
    assert list(rows) == ["machine", *NAMES]
    for name in NAMES:
        assert page.state(rows[name]) == "passed"
        assert [row for row in rows[name] if "what" in row and "skipped" not in row], name
    text = (tmp_path / "page.md").read_text()
    assert all(f"## {name}: passed" in text for name in NAMES)
    assert re.search(r"kernel, 37 x 21, D = 40, float32 \| passed yes", text)
    for needs in ("selection on the device against the CPU's", "nvJPEG", "Ray Train with NCCL", "steps, compiled"):
        assert re.search(rf"{needs}.* skipped needs CUDA", text), needs
    assert len(list(tmp_path.iterdir())) <= MAX_FILES


PIECES = {
    "raises": "def run(results):\n    results.row('before', value=1)\n    raise ValueError('broken on purpose')\n",
    "part": "def run(results):\n    with results.attempt('half'):\n        1 / 0\n    results.row('rest', value=2)\n",
    "hangs": "import time\ndef run(results):\n    results.row('before', value=3)\n    time.sleep(600)\n",
    "crashes": "import os, signal\ndef run(results):\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
    "wrong": "def run(results):\n    results.check('sum', 1 + 1 == 3, found=2)\n",
    "sound": "def run(results):\n    results.check('sum', 1 + 1 == 2, found=2)\n",
}


@pytest.mark.slow
def test_a_piece_that_fails_or_hangs_is_written_down_and_does_not_stop_the_next(tmp_path, monkeypatch):
    package, out = tmp_path / "given", tmp_path / "out"
    package.mkdir()
    for name, text in PIECES.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    pieces = [Piece(f"given.{name}", 6.0 if name == "hangs" else 100.0) for name in PIECES]
    assert not check.run_pieces(out, pieces, device="cpu", small=True, minutes=6)
    rows = page.last_runs(results.read(out / "results.jsonl"))
    states = {name: page.state(rows[name]) for name in PIECES}
    assert states == {
        "raises": "failed",
        "part": "failed",
        "hangs": "stopped at its limit of 6 s",
        "crashes": "failed: its process ended with status -11",
        "wrong": "failed",
        "sound": "passed",
    }
    text = (out / "page.md").read_text()
    for traceback in ("ValueError: broken on purpose", "ZeroDivisionError: division by zero", "Fatal Python error"):
        assert traceback in text
    assert all(f"| {what} | value {value} |" in text for what, value in (("before", 1), ("before", 3), ("rest", 2)))
    assert len(list(out.iterdir())) <= MAX_FILES


def test_a_piece_is_not_started_when_the_time_is_over(tmp_path):
    assert not check.run_pieces(tmp_path, [Piece("given.never", 100.0)], device="cpu", small=True, minutes=0.0)
    rows = page.last_runs(results.read(tmp_path / "results.jsonl"))
    assert page.state(rows["never"]) == "not started: no time is left"


def test_the_page_shows_the_last_run_of_a_piece_and_one_that_was_cut_off():
    started = {"state": "started"}
    rows = [
        {"piece": "one"} | started,
        {"piece": "one", "what": "old", "value": 1},
        {"piece": "one", "state": "failed", "seconds": 1.0},
        {"piece": "two"} | started,
        {"piece": "two", "what": "half", "value": 2},
        {"piece": "one"} | started,
        {"piece": "one", "what": "new", "met": True, "value": 1234},
        {"piece": "one", "state": "passed", "seconds": 2.0},
    ]
    text = page.page(rows)
    assert "| one | passed | 2.0 |" in text
    assert "| new | met yes, value 1,234 |" in text
    assert "old" not in text
    assert "## two: cut off" in text


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "results.jsonl"
    Results("piece", path, tmp_path).row("what", value=0.123456)
    with path.open("a") as file:
        file.write('{"piece": "pi')
    assert results.read(path) == [{"piece": "piece", "what": "what", "value": 0.1235}]


def test_the_bundle_has_what_the_lock_names_and_the_machine_lacks():
    names = re.findall(r"(?m)^([a-z0-9-]+)==", bundle.requirements())
    assert {"ray", "pydantic", "pydantic-core", "open-clip-torch", "ftfy", "plotly", "psutil", "s3fs"} <= set(names)
    assert not {"torch", "torchvision", "triton", "nvidia-cublas", "numpy", "pyarrow", "resvg"} & set(names)
    lock = (ROOT / "deploy/locks/run.txt").read_text()
    there = set(re.findall(r"(?m)^([a-z0-9-]+)==", lock)) - set(names)
    described = (ROOT / "deploy/gpu/machine.txt").read_text() + bundle._MACHINE + bundle._NOT_NEEDED
    assert all(name in described or name.startswith(("nvidia-", "cuda-")) for name in there)


@pytest.mark.parametrize(
    ("path", "packed"),
    [
        ("ray/_raylet.so", True),
        ("ray/core/src/ray/raylet/raylet", True),
        ("ray/tune/__init__.py", True),
        ("ray-2.60.0.dist-info/METADATA", True),
        ("plotly/package_data/plotly.min.js", True),
        ("plotly/package_data/templates/plotly.json", True),
        ("botocore/data/endpoints.json", True),
        ("ray/jars/ray_dist.jar", False),
        ("ray/rllib/__init__.py", False),
        ("ray/dashboard/client/build/index.html", False),
        ("botocore/data/ec2/2016-11-15/service-2.json", False),
    ],
)
def test_what_is_packed(path: str, packed: bool):
    assert bundle.is_packed(path) == packed
