"""The table and the verdict of a comparison, for runs with given results."""

import io
import json

import pytest
from rich.console import Console

from pipelines.reports import comparison
from pipelines.reports.comparison import Finished


def finished(make_run, name: str, score: float, teraflops: float, *overrides: str) -> Finished:
    manifest = {
        "steps": 10,
        "examples_trained": 320,
        "examples_seen": 640,
        "flops_step": teraflops * 1e11,
        "flops_step_with_reuse": teraflops * 0.9e11,
        "seconds": 5.0,
    }
    results = [
        {"key": "a/zero_shot", "step": step, "metrics": {"acc1": value, "main_metric": value}}
        for step, value in ((5, 0.1), (10, score))
    ]
    run = Finished(f"runs/{name}", make_run(name, *overrides), manifest, results)
    run.__dict__["metrics"] = [{"jest/seconds": 0.5 * (i + 1)} for i in range(10)]
    return run


def test_the_table_has_final_scores_and_costs_averaged_over_seeds(make_run):
    runs = [
        finished(make_run, "uniform", 0.5, 3.0, "selection.method=uniform"),
        finished(make_run, "joint-seed0", 0.6, 7.0),
        finished(make_run, "joint-seed1", 0.7, 7.0),
    ]
    table = comparison.compare(runs)
    assert table.columns == ["uniform", "joint, 2 seeds"]
    rows = dict(table.rows)
    assert rows["a/zero_shot @1"] == ["50.0", "65.0 (60.0 to 70.0)"]
    assert rows["examples trained"] == ["320", "320"]
    assert rows["examples seen"] == ["640", "640"]
    assert rows["TFLOPs"] == ["3.00", "7.00"]
    assert rows["TFLOPs, scoring reused"] == ["2.70", "6.30"]
    assert rows["TFLOPs, with the reference's"] == [
        "3.00",
        "its run is not here",
    ]  # none of these runs trained the reference
    assert rows["wall-clock of the steps, s"] == ["5", "5"]
    assert runs[0].teraflops == pytest.approx(3.0)

    (verdict,) = comparison.verdict(runs)
    assert verdict.startswith("joint reached a mean score of 65.0 % with 320 examples trained, 7.0 TFLOPs")
    assert "Against uniform, at equal examples: +15.0 points, for 2.33 times the FLOPs, 1.00 times the exa" in verdict
    assert "at equal FLOPs" not in verdict  # no checkpoints have nearly equal FLOPs


@pytest.mark.parametrize(
    "name", ["a|b", "a`b", "</script>", "<b>x", "[red]x", "a\nb", "a\\", "*a*", "[x](javascript:1)"]
)
def test_a_name_stays_in_its_cell(make_run, name: str):
    run = finished(make_run, "plain", 0.5, 3.0)
    table = comparison.compare([Finished(f"runs/{name}", run.run, run.manifest, run.results)])
    head, line, *rows = comparison.markdown(table).splitlines()
    assert line == "| --- | ---: |"
    for row in (head, *rows):
        assert row.replace("\\\\", "").replace("\\|", "").count("|") == 3
        assert "<" not in row
    assert head.endswith(f"| {comparison._in_a_cell(name.rpartition('/')[2])} |")
    shown = io.StringIO()
    Console(file=shown, width=200).print(comparison.terminal(table))
    for part in name.rpartition("/")[2].split():
        assert part in shown.getvalue()


def test_what_guessing_gives_stands_beside_a_score(make_run, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"zero_shot": {"classes": [{"id": str(i)} for i in range(5)]}}))
    sets = "sets: [{name: a, shards: s, tasks: [zero_shot]}]"
    run = finished(make_run, "uniform", 0.2, 3.0, f"evaluation={{classes: {tmp_path}/classes.json, {sets}}}")
    assert "a/zero_shot @1 (guessing 20)" in dict(comparison.compare([run]).rows)
    (tmp_path / "classes.json").unlink()
    gone = Finished(run.directory, run.run, run.manifest, run.results)
    assert "a/zero_shot @1" in dict(comparison.compare([gone]).rows)


def test_the_cost_of_a_small_run_is_not_nought(make_run):
    runs = [
        finished(make_run, "uniform", 0.5, 0.0009, "selection.method=uniform"),
        finished(make_run, "joint", 0.6, 0.0023),
    ]
    assert dict(comparison.compare(runs).rows)["TFLOPs"] == ["0.0009", "0.0023"]
    (verdict,) = comparison.verdict(runs)
    assert "2.3 GFLOPs and" in verdict
