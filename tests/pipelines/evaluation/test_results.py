"""eval_results.jsonl and the result files for other tools have each step and task once."""

import json
from concurrent.futures import ThreadPoolExecutor

from pipelines.base import storage
from pipelines.evaluation import results


def lines_of(step: int, value: float) -> list[results.Line]:
    metrics = {"acc1": value, "acc5": value, "main_metric": value}
    counts = {"step": step, "samples_seen": 10 * step, "samples_trained": 5 * step}
    return [
        {"key": f"own/{task}", "dataset": "own", "metrics": metrics, **counts, "protocol": "x"}
        for task in ("zero_shot", "few_shot")
    ]


def files_of(directory: str) -> dict[str, list[int]]:
    """The steps in each of the files."""
    of_open_clip = storage.read_bytes(f"{directory}/checkpoints/results.jsonl").decode().splitlines()
    return {
        "jest": [line["step"] for line in results.read(directory)],
        "open_clip": [json.loads(line)["epoch"] for line in of_open_clip],
        "CLIP_benchmark": [int(name.split("_step_")[1][:8]) for name in storage.names(f"{directory}/evaluation")],
    }


def test_new_results_replace_only_those_of_the_same_step(make_run):
    run = make_run("joint")
    for step, value in ((4, 0.1), (2, 0.2), (4, 0.3)):
        results.replace(run, lines_of(step, value))
    lines = results.read(run.path("joint"))
    assert [(line["step"], line["metrics"]["acc1"]) for line in lines] == [(2, 0.2), (2, 0.2), (4, 0.3), (4, 0.3)]
    assert files_of(run.path("joint"))["open_clip"] == [2, 4]


def test_writers_at_the_same_time_lose_no_results(make_run):
    run = make_run("joint")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda step: results.replace(run, lines_of(step, 0.1)), range(1, 7)))
    assert files_of(run.path("joint"))["jest"] == [step for step in range(1, 7) for _ in range(2)]
    assert files_of(run.path("joint"))["open_clip"] == list(range(1, 7))


def test_results_of_repeated_steps_are_removed_from_every_file(make_run):
    run = make_run("joint")
    directory = run.path("joint")
    results.remove_after(directory, 0)  # before anything was evaluated
    for step in (2, 4, 6):
        results.replace(run, lines_of(step, 0.1))
    results.remove_after(directory, 4)
    assert files_of(directory) == {"jest": [2, 2, 4, 4], "open_clip": [2, 4], "CLIP_benchmark": [2, 2, 4, 4]}
    before = storage.read_bytes(f"{directory}/{results.FILE}")
    results.remove_after(directory, 4)
    assert storage.read_bytes(f"{directory}/{results.FILE}") == before


def test_damaged_lines_are_left_out_and_said(make_run, capsys):
    run = make_run("joint")
    path = f"{run.path('joint')}/eval_results.jsonl"
    for step in (2, 4):
        results.replace(run, lines_of(step, 0.5))
    whole, data = results.read(run.path("joint")), storage.read_bytes(path)
    for damaged in (data[:-9], data + b"\xff\xfe\n", b"[]\n" + data, data.replace(b'"step": 4', b'"step: 4', 1)):
        storage.write_bytes(path, damaged)
        capsys.readouterr()
        left = results.read(run.path("joint"))
        assert [line for line in whole if line in left] == left
        assert len(left) >= len(whole) - 1
        said = f"eval_results.jsonl: 1 of {len(damaged.splitlines())} lines are damaged, and left out"
        assert said in capsys.readouterr().out
    results.replace(run, lines_of(4, 0.5))  # as evaluating the step again
    assert results.read(run.path("joint")) == whole
