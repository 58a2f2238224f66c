import json

import pytest

from jest_core.run_file import Run
from pipelines.base import storage
from pipelines.paper import charts, figures, records, reproduce
from pipelines.stages import Chain

EXPERIMENTS = reproduce.experiments()


def test_every_run_is_a_complete_run_file_and_every_figure_has_its_runs():
    for name in EXPERIMENTS["runs"]:
        for smoke in (False, True):
            run = reproduce.load_run(name, 3, "somewhere", smoke=smoke)
            assert isinstance(run, Run)
            assert run.run_dir == f"runs/{name}-seed3"
    for spec in EXPERIMENTS["figures"].values():
        for name in [*records.runs_of(spec), *([spec["of"]] if "of" in spec else [])]:
            assert name in EXPERIMENTS["runs"]


def test_the_readme_matches_the_published_results():
    results = reproduce.read_results(str(reproduce.FOLDER / "results.json"))
    assert results["runs"], "no results are published"
    assert (reproduce.FOLDER / "README.md").read_text() == reproduce.readme(results)


def test_the_published_results_are_of_the_published_experiments():
    results = reproduce.read_results(str(reproduce.FOLDER / "results.json"))
    assert results["runs"], "no results are published"
    for name, seeds in results["runs"].items():
        for seed, record in seeds.items():
            run = reproduce.load_run(name, int(seed), "runs/reproduction")
            assert record["identity"] == reproduce._identity(run), f"{name}, seed {seed}, was run otherwise"
            assert record["examples_trained"] == run.training.examples_trained


def record(value, step=2):
    scores = {" ".join(where): value for where in EXPERIMENTS["scores"].values()}
    return {
        "identity": "x",
        "checkpoints": [{"step": 1, "scores": scores}, {"step": step, "scores": {k: 2 * v for k, v in scores.items()}}],
        "steps": step,
        "examples_trained": 1000,
        "examples_seen": 5000,
        "teraflops": 1.5,
        "teraflops_with_reuse": 1.25,
        "seconds": 3.0,
        "filter_ratio": 0.8,
        "sub_batch_size": 256,
    }


def test_a_table_has_the_mean_and_the_range_of_the_last_checkpoint():
    spec = {"runs": ["uniform", "joint"], "seeds": [0, 1], "title": "A figure", "plot": "curves"}
    results = {"runs": {"uniform": {"0": record(0.01), "1": record(0.02), "100": record(0.9)}}, "studies": {}}
    header, uniform, joint = figures.table(spec, results, EXPERIMENTS["scores"])
    assert header[:3] == ["run", "seeds", "mean of four"]
    assert uniform[:3] == ["uniform", "2", "3.0 (2.0 to 4.0)"]  # without the seed that settings were tuned on
    assert uniform[-5:] == ["1,000", "5,000", "1.5", "1.2", "3"]
    assert joint[:2] == ["joint", "not run yet"]
    chart = charts.chart(spec, results, EXPERIMENTS["scores"], figure="x")
    assert list(chart.data[0].y) == pytest.approx([1.5, 3.0])
    assert list(chart.data[1].x) == pytest.approx([0.75, 1.5])
    text = figures.render("{{ value('uniform') }} {{ picture('f') }}", {"f": spec}, results, EXPERIMENTS["scores"])
    assert text == "3.0 (2.0 to 4.0) ![A figure](pictures/f.svg)"


def test_the_lead_of_a_method_is_computed_seed_by_seed():
    spec = {
        "against": "training.sub_batch_size",
        "seeds": [0, 1, 2],
        "series": {"joint": ["joint-64", "joint"], "independent": ["independent-64", "independent"]},
        "ahead": {"a learner": ["joint", "independent"]},
        "title": "Ahead",
    }
    runs = {
        "joint": {"0": record(0.02), "1": record(0.03), "2": record(0.5)},
        "independent": {"0": record(0.01), "1": record(0.005)},  # its third seed is not run yet
        "joint-64": {"0": record(0.01)},
    }
    results = {"runs": runs, "studies": {}}
    text = figures.render("{{ ahead('f') }}", {"f": spec}, results, EXPERIMENTS["scores"]).splitlines()
    assert text[0] == "|  | sub-batch size | seeds | mean of four | naming @5 |"
    assert text[2:] == ["| a learner | 256 | 2 | +3.5 (+2.0 to +5.0) | +3.5 (+2.0 to +5.0) |"]
    line = charts.chart(spec, results, EXPERIMENTS["scores"], figure="f").data[-1]
    assert (list(line.x), list(line.y)) == ([256], pytest.approx([3.5]))
    assert list(line.error_y.arrayminus) == pytest.approx([1.5])


def test_an_unknown_figure_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"no figure fig99; there are fig1"):
        reproduce.reproduce(["fig99"], root=str(tmp_path), seeds=None, smoke=True, publish="")
    assert not list(tmp_path.iterdir())


def test_a_smoke_reproduction_runs_each_kind_once():
    runs_by_figure = reproduce.first_of_each_kind(EXPERIMENTS["figures"])
    names = [name for runs in runs_by_figure.values() for name, _ in runs]
    assert len(names) == len(set(names)) <= 14
    ran: set[str] = set()
    for name in names:
        ran |= set(reproduce._settings(reproduce.load_run(name, 0, "x").model_dump(exclude_defaults=True)))
    words = {"selection.criterion=easy", "selection.criterion=hard"}
    words |= {f"selection.method={method}" for method in ("uniform", "independent", "joint")}
    words |= {"data.rules.rule=score", "data.rules.rule=language", "data.refines", "training.initial_checkpoint"}
    words |= {"training.low_resolution.image_size", "selection.score_image_size", "training.micro_batch_size"}
    assert words <= ran


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_smoke_reproduction_resumes_where_it_stopped(tmp_path, ray_session, capsys):
    options = {"root": str(tmp_path), "seeds": None, "smoke": True, "publish": ""}
    reproduce.reproduce(["fig2", "table3"], **options)
    results = storage.read_json(f"{tmp_path}/results.json")
    assert set(results["runs"]) == {"uniform", "uniform-filtered", "joint-plus"}  # joint-filtered is no new kind
    filtered = json.loads((tmp_path / "catalogue/aligned/manifest.json").read_text())["counts"]["kept"]
    whole = json.loads((tmp_path / "catalogue/pool/manifest.json").read_text())["counts"]["kept"]
    assert filtered == pytest.approx(0.3 * whole, abs=2)  # the rule read the scores that joint-plus made first
    assert set(results["studies"]["fig2"]["chunks"]) == {"1", "2", "4", "8", "16"}
    page = (tmp_path / "reproduction.html").read_text()
    assert "uniform-filtered" in page
    assert "Figure 2" in page
    capsys.readouterr()
    reproduce.reproduce(["fig2", "table3"], **options)
    assert "steps of" not in capsys.readouterr().out  # nothing trains again
    runs = {name: reproduce.load_run(name, 0, str(tmp_path), smoke=True) for name in EXPERIMENTS["runs"]}
    joint = storage.read_json(f"{Chain(runs.values()).finish(runs['joint-filtered'])}/manifest.json")
    assert joint["complete"]  # it uses the scores of the whole pool, which its catalogue refines
    assert not (tmp_path / "scores/aligned").exists()
