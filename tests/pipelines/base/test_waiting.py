"""What is said of a real Ray that has no room, and how a stage ends that has waited long enough."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jest_core import run_file
from pipelines.base import progress, waiting
from pipelines.base.demand import Cluster, Demand
from pipelines.base.own_work import OwnWork
from tests.heads import started

READER = Demand(((("CPU", 1.0),),), 2)
LEARNER = Demand(((("CPU", 1.0), ("GPU", 1.0)),), 1)
# The waits of this file are shorter than those of a user
_PATIENT = {"RAY_raylet_start_wait_time_s": "300"}  # on a machine that other tests load
_SHORT = "from pipelines.base import waiting; waiting._LOOK_SECONDS, waiting._PATIENCE = 0.5, 2.0;"


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", ""])
def test_a_wrong_number_of_minutes_is_refused(monkeypatch, text):
    monkeypatch.setenv(waiting.VARIABLE, text)
    with pytest.raises(ValueError, match=r"JEST_WAIT_MINUTES=.* is no number of minutes above 0"):
        waiting.minutes()


def test_progress_is_movement_and_so_is_that_nothing_waits(monkeypatch):
    watch = waiting.Watch.__new__(waiting.Watch)
    watch._last, watch._clear = 0.0, 0

    def moves(*demands: Demand) -> bool:
        return watch._moves(Cluster(total=[{"CPU": 2}], free=[{"CPU": 0}], waiting=demands, coming=None))

    monkeypatch.setattr(progress, "_moved", 0.0)
    assert not moves(READER)
    assert [moves(), moves(), moves()] == [False, False, True]  # Ray Train asks anew, with a pause between
    monkeypatch.setattr(progress, "_moved", 1.0)
    assert moves(LEARNER)


def test_tasks_that_wait_are_this_jobs_where_it_has_some_and_groups_always():
    watch = waiting.Watch.__new__(waiting.Watch)
    group = dataclasses.replace(LEARNER, group=True)
    cluster = Cluster(total=[], free=[], waiting=[READER, group], coming=None)
    for alone, work, waits in (
        (False, OwnWork(runs=False, waits=2), [READER, group]),
        (False, OwnWork(runs=False, waits=0), [group]),
        (False, None, [group]),
        (True, None, [READER, group]),
    ):
        watch._alone = alone
        assert watch._own(cluster, work).waiting == waits


@pytest.mark.slow
def test_a_local_ray_without_room_is_refused_at_once_and_says_what_is_asked(tmp_path):
    """Room that a run can do without is not refused, and work under way is not taken for work that waits."""
    code = (
        f"{_SHORT} import os, time, ray; from pipelines import errors; from pipelines.base import cluster, own_work\n"
        "from pipelines.training.room import Room\n"
        "@cluster.cleared_up()\n"
        "def stage():\n"
        "    cluster.connect()\n"
        "    print('ROOM', Room([1, 1000], 0).wait(1000, 6.0, lambda: False, print))\n"
        "    while own_work.look() != own_work.OwnWork(False, 0): time.sleep(0.1)\n"
        "    def work():\n"
        f"        while not os.path.exists('{tmp_path}/over'): time.sleep(0.1)\n"
        "    n = int(ray.cluster_resources()['CPU'])\n"
        "    tasks = [ray.remote(work).remote() for _ in range(n + 3)]\n"
        "    while own_work.look() != own_work.OwnWork(True, 3): time.sleep(0.1)\n"
        f"    open('{tmp_path}/over', 'w').close()\n"
        "    ray.get(tasks)\n"
        "    ray.get(ray.remote(num_gpus=3)(lambda: 1).remote())\n"
        "try:\n"
        "    stage()\n"
        "except Exception as error: raise SystemExit(errors.report(error))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | _PATIENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "ROOM 1\n" in ran.stdout
    assert "nothing has moved" not in ran.stdout
    assert "Ray waits for room for 1 x (1 CPU, 3 GPUs); there are 1 node(s) with" in ran.stderr
    assert "no other machine joins a Ray that jest starts" in ran.stderr


@pytest.mark.long
def test_a_stage_whose_tasks_run_and_one_beside_which_others_wait_go_on(tmp_path):
    """Two jobs: one has more tasks than the cluster has CPUs, the other an actor that holds none."""
    start = f"{_SHORT} import time, ray; from pipelines.base import cluster; cluster.connect(); "
    many = start + "ray.get([ray.remote(lambda: time.sleep(15)).remote() for _ in range(3)])"
    calm = start + "ray.get(ray.remote(num_cpus=0)(type('A', (), {'f': lambda _: time.sleep(45)})).remote().f.remote())"
    with started(tmp_path, n_cpus=1, RAY_AUTH_MODE="disabled", **_PATIENT) as head:
        environment = os.environ | {"RAY_ADDRESS": head.address, waiting.VARIABLE: "0.5"}
        jobs = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment,
                cwd=Path(__file__).parents[3],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for code in (many, calm)
        ]
        for job in jobs:
            output = job.communicate(timeout=400)[0]
            assert job.returncode == 0, output


@pytest.mark.long
def test_learners_without_room_end_after_the_time_that_is_set(make_scored_run, tmp_path):
    """GPUs that no node has; then CPUs that learners hold, so that nothing can read for them. The process ends with its
    exit status, although a thread waited for Ray Train."""
    run = make_scored_run("joint", "training.n_learners=2")
    (tmp_path / "run.yaml").write_text(run_file.dump(run))
    start = f"{_SHORT} import sys; from pipelines.__main__ import main; sys.argv[0] = 'jest'; main()"
    with started(tmp_path, n_cpus=2, RAY_AUTH_MODE="disabled", **_PATIENT) as head:
        environment = os.environ | {"RAY_ADDRESS": head.address, waiting.VARIABLE: "0.1"}
        for overrides, asked in (
            (["run_dir=gpus", "training.gpus_per_learner=1"], r"2 x (1 CPU, 1 GPU) all at once; there are 1 node(s)"),
            (["run_dir=cpus"], "x (1 CPU); there are 1 node(s) with 2 CPUs, 0 GPUs in all, of which 0 CPUs"),
        ):
            words = ["train", str(tmp_path / "run.yaml"), *(w for each in overrides for w in ("--set", each))]
            ran = subprocess.run(
                [sys.executable, "-c", start, *words],
                env=environment,
                cwd=Path(__file__).parents[3],
                capture_output=True,
                text=True,
                check=False,
                timeout=400,
            )
            assert ran.returncode == 1, ran.stdout + ran.stderr
            assert asked in ran.stderr
            assert "may be tried again" in ran.stderr
