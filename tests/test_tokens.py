"""Real Ray clusters with token authentication and without, reached with the right token, another one and none."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.heads import Head, started

pytestmark = pytest.mark.long
TOKEN = "0123456789abcdef0123456789abcdef"
_SCORER = """
import numpy as np

def create():
    return lambda batch: np.array([len(caption) for caption in batch.captions], dtype=np.float32)
"""
_JOIN = """
import ray, ray.data
from pipelines import errors
from pipelines.base import cluster
with cluster.cleared_up():
    try:
        cluster.connect()
        cluster.data_context()
        print("rows", ray.data.range(10).map_batches(lambda batch: batch).count())
    except Exception as error:
        raise SystemExit(errors.report(error))
"""


@pytest.fixture(scope="module")
def closed(tmp_path_factory) -> Iterator[Head]:
    with started(tmp_path_factory.mktemp("closed"), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as head:
        yield head


@pytest.fixture(scope="module")
def open_to_all(tmp_path_factory) -> Iterator[Head]:
    with started(tmp_path_factory.mktemp("open"), RAY_AUTH_MODE="disabled") as head:
        yield head


def _run(home: Path, *words: str, **environment: str) -> tuple[int, str]:
    """The exit status and output of a command with an empty home directory, and no variable of Ray's authentication."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_A")}
    command = [sys.executable, *words]
    ran = subprocess.run(
        command, env=kept | {"HOME": str(home)} | environment, capture_output=True, text=True, check=False, timeout=120
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_a_process_joins_a_cluster_with_its_token_and_is_refused_without(closed: Head, tmp_path):
    joined = _run(tmp_path, "-c", _JOIN, RAY_ADDRESS=closed.address, RAY_AUTH_TOKEN=TOKEN)
    assert (joined[0], "rows 10" in joined[1]) == (0, True), joined[1]
    status, out = _run(tmp_path, "-c", _JOIN, RAY_ADDRESS=closed.address)
    assert status == 2, out
    assert re.search(r"jest: the Ray cluster at \S+ asks for a token, and there is none here: set RAY_AUTH_TOKEN", out)


def test_the_token_is_read_from_each_place_that_ray_knows(closed: Head, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    named = {"RAY_ADDRESS": closed.address, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert _run(tmp_path, "-c", _JOIN, **named)[0] == 0
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    assert _run(tmp_path, "-c", _JOIN, RAY_ADDRESS=closed.address)[0] == 0


def test_another_clusters_token_is_named_and_not_shown(closed: Head, tmp_path):
    other = "another-token-0123456789"
    status, out = _run(tmp_path, "-c", _JOIN, RAY_ADDRESS=closed.address, RAY_AUTH_TOKEN=other)
    assert status == 2, out
    assert "refuses the token of the variable RAY_AUTH_TOKEN" in out
    assert other not in out


@pytest.mark.parametrize("token", [{}, {"RAY_AUTH_TOKEN": TOKEN}, {"RAY_AUTH_MODE": "token"}])
def test_a_cluster_without_tokens_is_joined_whatever_is_set(open_to_all: Head, tmp_path, token):
    """With a token of its own, Ray Data's tasks could not report to this process, which would wait for ever."""
    status, out = _run(tmp_path, "-c", _JOIN, RAY_ADDRESS=open_to_all.address, **token)
    assert (status, "rows 10" in out) == (0, True), out


def test_jobs_of_both_are_asked_for_likewise(closed: Head, open_to_all: Head, tmp_path):
    ask = ("-m", "pipelines", "submit", "--status", "nobody", "--address")
    status, out = _run(tmp_path, *ask, closed.dashboard)
    assert status == 2, out
    assert re.search(
        r"jest: the Ray dashboard at \S+ asks for a token, and there is none here: set RAY_AUTH_TOKEN", out
    )
    for head, token in (
        (closed, {"RAY_AUTH_TOKEN": TOKEN}),
        (open_to_all, {"RAY_AUTH_MODE": "token"}),
        (open_to_all, {}),
    ):
        assert "Job nobody does not exist" in _run(tmp_path, *ask, head.dashboard, **token)[1]


def test_stages_are_submitted_with_a_token_and_so_are_scorers(closed: Head, make_run, tmp_path, monkeypatch):
    """The job catalogues, and scores with a module of the user that only this machine's working directory has."""
    from jest_core import run_file
    from jest_core.models import towers
    from pipelines.base import checkpoints

    run = make_run("joint", "reference.scorers=[{name: length, scorer: my_scorer:create}]", "reference.n_actors=1")
    model = towers.create("jest-tiny", seed=5).model
    checkpoints.write(run.path("reference"), 1, {"epoch": 1, "state_dict": model.state_dict(), "jest": {"step": 1}})
    (tmp_path / "run.yaml").write_text(run_file.dump(run))
    (tmp_path / "my_scorer.py").write_text(_SCORER)
    monkeypatch.chdir(tmp_path)
    words = ("submit", "catalogue", "reference-scores", "run.yaml", "--address", closed.dashboard)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    status, out = _run(tmp_path, "-m", "pipelines", *words, RAY_AUTH_TOKEN=TOKEN, PYTHONPATH=path)
    assert status == 0, out
    assert "sends the module my_scorer along" in out
    assert "599 pairs scored" in out
    assert TOKEN not in out


def test_no_cluster_at_an_address_is_said(tmp_path):
    status, out = _run(tmp_path, "-c", _JOIN, RAY_ADDRESS=f"127.0.0.1:{free_port()}")
    assert status == 1
    assert re.search(
        r"jest: no Ray cluster answers at \S+ within 20 s: correct RAY_ADDRESS, or start the head node", out
    )


def test_a_local_ray_has_a_token_of_its_own_and_leaves_none_behind(tmp_path):
    """Otherwise `ray start --head` would ask for it from then on."""
    code = (
        "import os; from pipelines.base import cluster; cluster.connect(); from ray import _raylet;"
        "assert _raylet.get_authentication_mode() == _raylet.AuthenticationMode.TOKEN;"
        "print(len(os.environ['RAY_AUTH_TOKEN'])); cluster.disconnect();"
        "print([name for name in os.environ if name.startswith('RAY_AUTH')])"
    )
    status, out = _run(tmp_path, "-c", code)
    assert status == 0, out
    assert "64\n" in out
    assert out.rstrip().endswith("[]")
    assert not (tmp_path / ".ray").exists()
