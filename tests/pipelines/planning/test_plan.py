"""`jest plan`: the cost of a run and the checks before it, without starting it."""

from importlib.resources import files

import pytest

from jest_core import flops, run_file
from pipelines.base import manifests, storage
from pipelines.data import catalogue
from pipelines.planning import calibrate as machines
from pipelines.planning import plan, preflight, sizes
from pipelines.training import metrics_line, train
from tests.conftest import MakeRun
from tests.pipelines.test_main import jest

LAION = files("jest_deploy") / "runs" / "laion2b"


def test_the_laion_run_file_has_the_papers_cost_ratios():
    """Paper section 7: 4.0 and 2.33 with the scoring forward reused, 2.67 without, 1.10 for FlexiJEST."""
    alternatives = plan.alternatives(run_file.load((LAION / "flexi.yaml").read_text()))
    uniform = alternatives["uniform"].total
    assert alternatives["JEST, reference online"].total_with_reuse / uniform == pytest.approx(4.0, abs=0.01)
    assert alternatives["JEST, reference cached"].total_with_reuse / uniform == pytest.approx(2.33, abs=0.01)
    assert alternatives["JEST, reference cached"].total / uniform == pytest.approx(2.67, abs=0.01)
    assert alternatives["FlexiJEST, reference cached"].total / uniform == pytest.approx(1.10, abs=0.03)


@pytest.mark.parametrize("size", ["", "-l"])
@pytest.mark.parametrize("data", ["laion2b", "webli"])
def test_run_files_have_the_costs_of_table_1(data, size):
    """Per iteration 233 % (scoring reused) and 110 %, and 23 % and 11 % of the 40 billion examples' total."""

    def load(name):
        return run_file.load((LAION.parent / data / f"{name}{size}.yaml").read_text())

    siglip, joint, flexi = (load(name) for name in ("siglip", "joint", "flexi"))
    uniform, ours, cheap = (flops.step_flops(run) for run in (siglip, joint, flexi))
    assert ours.total_with_reuse / uniform.total == pytest.approx(2.33, abs=0.02)
    assert cheap.total / uniform.total == pytest.approx(1.10, abs=0.04)
    whole = siglip.n_steps * uniform.total
    assert joint.n_steps * ours.total_with_reuse / whole == pytest.approx(0.23, abs=0.01)
    assert flexi.n_steps * cheap.total / whole == pytest.approx(0.11, abs=0.01)


def test_a_plan_needs_no_storage_and_no_cluster():
    out = jest("plan", str(LAION / "flexi.yaml"), "--flops-per-second", "4e14")
    assert out.returncode == 0, out.stderr
    for words in (
        "Unable to locate credentials",
        "163,840",
        "16 draws of 2,048",
        "patches of 32",
        "hours on 64 learner",
    ):
        assert words in out.stdout


def test_what_is_assumed_between_machines_needs_machines():
    out = jest("plan", str(LAION / "flexi.yaml"), "--assume", "learner_gbits=10")
    assert out.returncode == 2
    assert "--assume learner_gbits is of what goes between machines: --cluster FILE" in " ".join(out.stderr.split())


def test_a_plan_uses_the_sizes_of_a_finished_catalogue(make_run: MakeRun, ray_session, capsys):
    run = make_run("joint")
    catalogue.run_stage(run)
    capsys.readouterr()
    plan.print_plan(run)
    printed = capsys.readouterr().out
    assert "epochs seen" in printed
    assert "reference scores, once" in printed
    assert "by the catalogue" in printed


def test_a_uniform_run_costs_one_uniform_step_and_convolutional_towers_have_no_patches(make_run: MakeRun):
    run = make_run("x", "selection.method=uniform", "reference=null", "model.name=jest-drawings")
    alternatives = plan.alternatives(run)
    assert "FlexiJEST, reference cached" not in alternatives
    assert alternatives["JEST, reference online"].reference > 0
    low = make_run("x", "model.name=jest-drawings", "training.low_resolution={image_size: 32}")
    assert "FlexiJEST, reference cached" in plan.alternatives(low)


def failing(run) -> dict[str, str]:
    return {check.name: check.detail for check in preflight.run_checks(run, sizes.pairs(run)) if check.ok is False}


def test_checks_of_a_run_whose_stages_have_run(make_scored_run: MakeRun):
    run = make_scored_run("joint")
    checks = {check.name: check for check in preflight.run_checks(run, sizes.pairs(run))}
    assert list(checks) == ["storage", "shards", "catalogue", "reference", "score cache", "run directory", "cluster"]
    assert all(check.ok for check in checks.values())
    assert "4 Parquet files; the rules keep" in checks["shards"].detail
    assert "slots an epoch" in checks["catalogue"].detail


def test_checks_of_a_run_whose_stages_have_not_run(make_run: MakeRun):
    run = make_run("joint")
    checks = {check.name: check for check in preflight.run_checks(run, sizes.pairs(run))}
    later = {name for name, check in checks.items() if check.ok is None}
    assert later == {"catalogue", "reference", "score cache"}
    assert checks["catalogue"].detail.endswith("run `jest catalogue` first")


@pytest.mark.parametrize(
    ("override", "name", "detail"),
    [
        ("data.columns={caption: nonsense}", "shards", "has no column nonsense; it has"),
        ("data.columns={image: nonsense}", "shards", "has no column nonsense; it has"),
        ("data.shards=nowhere/*.parquet", "shards", "no shard at"),
        ("data.rules=[{rule: watermark}]", "shards", "has no column pwatermark"),
        ("data.rules=[{rule: deny, file: list.txt}]", "shards", "list.txt, which is not there"),
        ("data.rules=[{rule: duplicate, by: [aesthetic]}]", "shards", "has no column aesthetic"),
        ("data.rules=[{rule: score, column: taste, at_least: 0}]", "shards", "has no column taste"),
        ("data.catalogue=other", "score cache", "another catalogue"),
        (
            "evaluation={sets: [{name: flowers, format: folder, shards: flowers, tasks: [zero_shot]}]}",
            "evaluation set flowers",
            "flowers",
        ),
        (
            "evaluation={sets: [{name: tulips, shards: 'elsewhere/*.parquet', tasks: [retrieval]}]}",
            "evaluation set tulips",
            "no shard at",
        ),
    ],
)
def test_problems_are_found_before_anything_starts(make_scored_run: MakeRun, override, name, detail):
    run = make_scored_run("joint", override)
    if "catalogue" in override:
        catalogue.run_stage(make_scored_run("joint", override, "data.rules=[]"))
    assert detail in failing(run)[name]


def test_window_memory_is_limited_by_the_examples_of_the_run(make_scored_run: MakeRun):
    run = make_scored_run("joint", "data.window_rows=100000000")
    pairs = sizes.pairs(run)
    assert pairs is not None
    each = sizes.example_bytes(run, pairs.mean_bytes)
    assert sizes.window_bytes(run, pairs) == run.n_steps * run.super_batch_size * each
    assert not failing(run)


def test_sharded_weights_need_less_of_each_device():
    text = (LAION / "joint-l.yaml").read_text()
    whole, sharded = (
        run_file.load(text, ["training.compile=false", f"training.shard_weights={given}"])
        for given in ("false", "true")
    )
    n, per_learner = flops.n_parameters(whole.model), sizes.state_bytes(sharded)
    assert sizes.state_bytes(whole) == 20 * n
    # besides its shard, a learner gathers a few layers and the token embeddings
    assert 16 * n / 256 < per_learner < 2 * n
    with pytest.raises(ValueError, match=r"training\.shard_weights gathers weights layer by layer"):
        run_file.load(text, ["training.compile=true", "training.shard_weights=true"])


def test_a_plan_with_a_failing_check_fails(make_scored_run: MakeRun):
    with pytest.raises(ValueError, match=r"the run would fail: shards: .* has no column nonsense"):
        plan.print_plan(make_scored_run("joint", "data.columns={caption: nonsense}"))


def test_a_run_directory_of_another_run_is_reported(make_scored_run: MakeRun):
    run = make_scored_run("joint")
    manifests.begin(run.path("joint"), "train", run_file.identity(run), dict)
    assert not failing(run)
    assert (
        "training.learning_rate: there 0.001, here 0.5"
        in failing(make_scored_run("joint", "training.learning_rate=0.5"))["run directory"]
    )


@pytest.mark.slow
def test_measured_rates_predict_the_run_and_more_learners_are_faster(make_scored_run: MakeRun):
    run = make_scored_run("joint")
    train.run_stage(run, in_process=True)
    lines = metrics_line.read(run.path("joint"))
    spent = sum(line["train/batch_time"] for line in lines)
    checkpoints = sum(line["jest/checkpoint_time"] for line in lines)
    machine = machines.of_lines(run, lines, whole_seconds=spent + checkpoints + 7.0)
    assert machine.start_seconds == pytest.approx(7.0)
    assert set(machine.flops_per_second) == {"score", "select", "train"}
    one = machines.predict(run, machine)
    assert one.steps_seconds == pytest.approx(spent)
    assert one.total == pytest.approx(spent + 7.0 + 3 * machine.checkpoint_seconds)

    four = machines.predict(make_scored_run("joint", "training.n_learners=4"), machine)
    assert four.step_seconds["score"] == pytest.approx(one.step_seconds["score"] / 4)
    assert one.step_seconds["train"] / 4 < four.step_seconds["train"] < one.step_seconds["train"]
    online = make_scored_run("joint", "reference.online=true")
    with pytest.raises(ValueError, match="has no reference, and this run has: calibrate with it"):
        machines.predict(online, machine)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_calibrated_plan_prints_hours_and_cost(make_scored_run: MakeRun, tmp_path):
    run = make_scored_run("joint")
    (tmp_path / "run.yaml").write_text(run_file.dump(run))
    file = str(tmp_path / "machine.json")
    out = jest("plan", str(tmp_path / "run.yaml"), "--calibrate", file, "--set", "training.n_learners=2")
    assert out.returncode == 0, out.stderr
    assert machines.read(file).model == "jest-tiny"
    assert not storage.exists(run.path("joint"))
    again = jest("plan", str(tmp_path / "run.yaml"), "--machine", file, "--price", "2.5")
    assert again.returncode == 0, again.stderr
    assert "learner-hours" in again.stdout
    assert "at 2.5 each" in again.stdout
