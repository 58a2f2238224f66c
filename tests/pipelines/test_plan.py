"""What a run will cost, as a user is told before anything is rented."""

from importlib.resources import files

import pytest

from jest_core import config, flops
from pipelines import catalogue, plan
from tests.conftest import MakeRun
from tests.pipelines.test_main import jest

LAION = files("deploy") / "runs" / "laion2b"


def test_the_papers_ratios_come_out_of_the_laion_run_file():
    """Paper section 7: 4.0 and 2.33 with the scoring forward reused, 2.67 without, 1.10 for FlexiJEST."""
    found = plan.alternatives(config.load((LAION / "flexi.yaml").read_text()))
    uniform = found["uniform"].total
    assert found["JEST, reference online"].total_with_reuse / uniform == pytest.approx(4.0, abs=0.01)
    assert found["JEST, reference cached"].total_with_reuse / uniform == pytest.approx(2.33, abs=0.01)
    assert found["JEST, reference cached"].total / uniform == pytest.approx(2.67, abs=0.01)
    assert found["FlexiJEST, reference cached"].total / uniform == pytest.approx(1.10, abs=0.03)


@pytest.mark.parametrize("size", ["", "-l"])
@pytest.mark.parametrize("data", ["laion2b", "webli"])
def test_run_files_have_the_costs_of_table_1(data, size):
    """Per iteration 233 % (scoring reused) and 110 %, and 23 % and 11 % of the 40 billion examples' total."""

    def load(name):
        return config.load((LAION.parent / data / f"{name}{size}.yaml").read_text())

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


def test_a_plan_takes_sizes_from_the_catalogue_where_it_is_made(make_run: MakeRun, ray_session, capsys):
    run = make_run("joint")
    catalogue.run_stage(run)
    capsys.readouterr()
    plan.run_stage(run)
    told = capsys.readouterr().out
    assert "epochs seen" in told
    assert "reference scores, once" in told
    assert "by the catalogue" in told


def test_a_uniform_run_costs_one_uniform_step_and_convolutional_towers_have_no_patches(make_run: MakeRun):
    run = make_run("x", "selection.method=uniform", "reference=null", "model.name=jest-drawings")
    found = plan.alternatives(run)
    assert "FlexiJEST, reference cached" not in found
    assert found["JEST, reference online"].reference > 0
    low = make_run("x", "model.name=jest-drawings", "training.low_resolution={image_size: 32}")
    assert "FlexiJEST, reference cached" in plan.alternatives(low)
