"""Hours and money of each stage, by arithmetic that is written out here once more."""

from dataclasses import dataclass
from importlib.resources import files

import pytest

from jest_core import flops, run_file
from pipelines.planning import assumptions, basis, cost_tables, costs, machines
from pipelines.planning.assumptions import Assumptions
from pipelines.planning.basis import Basis
from pipelines.planning.sizes import Pairs, checkpoint_bytes, written_bytes

LAION = files("jest_deploy") / "runs" / "laion2b"
RUN = run_file.load((LAION / "joint.yaml").read_text(), ["root=memory://nowhere/laion2b"])
PRICES = {"learner_hour": 2.0, "cpu_hour": 0.05, "gb_month": 0.02, "thousand_requests": 0.0004}
GIVEN = Assumptions(urls=1_000_000_000, cpus=1000, flops_per_second=4e14, months=2, **PRICES)


@pytest.fixture(autouse=True)
def _nothing_is_done(monkeypatch):
    """No storage is asked."""
    monkeypatch.setattr(costs, "STAGES", {name: NotDone() for name in costs.STAGES})


class NotDone:
    def is_done(self, run):
        return False


class Done:
    def is_done(self, run):
        return True


def lines(given):
    return {line.stage: line for line in costs.costs(given).lines}


def assuming(**values):
    return GIVEN.model_copy(update=values)


def test_ingest_takes_the_cpu_hours_of_its_urls():
    ingest = lines(Basis(RUN, None, GIVEN))["ingest"]
    cpu_hours = 1e9 / 60 / 3600
    assert ingest.hours == pytest.approx(cpu_hours / 1000)
    assert ingest.money == pytest.approx(cpu_hours * 0.05)


def test_reading_limits_training_where_it_takes_longer_than_the_arithmetic():
    train = lines(Basis(RUN, None, assuming(read_cpu_ms=3.8)))["train"]
    seen = 39_673 * 163_840
    reading = seen * 3.8e-3 / 1000 / 3600  # on all CPUs that read
    computing = RUN.n_steps * flops.step_flops(RUN).total / 4e14 / 64 / 3600
    assert reading > computing
    assert train.hours == pytest.approx(reading)
    assert train.note.startswith(
        f"limited by reading: computing {computing:.2f} h, reading {reading:.2f} h; 64 learners "
    )
    assert "take 320,000 pictures a second and 1,000 CPUs deliver 260,000; " in train.note
    needed = seen / computing / 3600 * 3.8e-3
    assert f"; {needed:,.0f} CPUs would do, {needed / 64:.1f} for each; without what goes between" in train.note
    assert train.money == pytest.approx(reading * (64 * 2.0 + 1000 * 0.05))
    fast = lines(Basis(RUN, None, assuming(read_cpu_ms=0.1)))["train"]
    assert fast.hours == pytest.approx(computing)
    assert fast.note.startswith("limited by computing: ")


def test_without_a_price_of_cpus_the_learners_part_is_there():
    assumed = Assumptions(urls=1_000_000, cpus=96, flops_per_second=4e14, learner_hour=2.0)
    found = costs.costs(Basis(RUN, None, assumed))
    train = next(line for line in found.lines if line.stage == "train")
    assert train.hours is not None
    assert train.money == pytest.approx(train.hours * 64 * 2.0)
    assert train.note.endswith("--assume cpu_hour=P, 0 if the machines' price has them")
    assert found.unpriced == ["the CPUs that read"]
    assert "ingest" in found.without
    assert "train" not in found.without
    (stages,) = [
        table for table in cost_tables.tables(Basis(RUN, None, assumed)) if table.title == "What each stage takes"
    ]
    assert "the money of the CPUs that read in reference-scores, train" in str(stages.caption)
    free = costs.costs(Basis(RUN, None, assumed.model_copy(update={"cpu_hour": 0.0})))
    assert free.unpriced == []
    assert free.money == pytest.approx(found.money)
    assert "ingest" not in free.without


def test_the_metadata_is_opened_once_a_plan(monkeypatch, tmp_path):
    opened = []
    for i in range(70):
        (tmp_path / f"part-{i:05d}.parquet").touch()
    monkeypatch.setattr(basis, "open_shard", lambda path, columns: opened.append(path) or Rows([1000, 24]))
    text = (LAION / "joint.yaml").read_text()
    run = run_file.load(text, [f"root={tmp_path}", "ingest.urls=part-*.parquet"])
    assert lines(Basis(run, None, Assumptions()))["ingest"].work == f"{70 * 1024:,} URLs"
    assert len(opened) == 64


@dataclass
class Rows:
    row_group_sizes: list[int]


def test_scoring_covers_the_pairs_of_the_catalogue_or_those_that_may_be_fetched():
    assumed = lines(Basis(RUN, None, GIVEN))["reference-scores"]
    assert assumed.work == "680,000,000 pairs"
    pairs = Pairs(n_slots=500_000_000, n_rows=600_000_000, n_row_groups=600_000, mean_bytes=10_000)
    known = lines(Basis(RUN, pairs, assuming(read_cpu_ms=3.8)))
    work = 5e8 * flops.forward_flops(RUN.model).total
    reading = 5e8 * 3.8e-3 / 1000 / 3600
    assert known["reference-scores"].hours == pytest.approx(max(work / 4e14 / 64 / 3600, reading))
    n_checkpoints = 3 + RUN.n_steps // 5000
    log = written_bytes(RUN)["selection log"]
    cache = 5e8 * (4 * 768 + 64)
    gb = (6e8 * 10_000 + cache + log + n_checkpoints * checkpoint_bytes(RUN)) / 1e9
    assert known["storage"].money == pytest.approx(gb * 2 * 0.02)
    n_requests = (RUN.n_steps * 163_840 + 5e8) / (5e8 / 6e5) * 6
    assert known["requests"].money == pytest.approx(n_requests / 1000 * 0.0004)


def test_requests_are_those_of_every_reader_of_stages_that_are_not_done(monkeypatch):
    def requests(*overrides):
        run = run_file.load((LAION / "joint.yaml").read_text(), ["root=memory://nowhere/laion2b", *overrides])
        return float(lines(Basis(run, None, GIVEN))["requests"].work.replace(",", ""))

    training, scoring = (n * 6 / 1024 for n in (RUN.n_steps * 163_840, 0.68e9))
    assert requests() == pytest.approx(training + scoring)
    assert requests("data.n_streams=16") == pytest.approx(4 * training + scoring)  # four learners share a stream
    monkeypatch.setitem(costs.STAGES, "reference-scores", Done())
    assert requests() == pytest.approx(training)
    monkeypatch.setitem(costs.STAGES, "train", Done())
    assert requests() == 0


def test_what_is_not_known_is_no_number():
    found = costs.costs(Basis(RUN, None, Assumptions()))
    by_stage = {line.stage: line for line in found.lines}
    assert by_stage["ingest"].hours is None
    assert "--assume urls=N" in by_stage["ingest"].note
    assert by_stage["train"].hours is None
    assert by_stage["train"].note.startswith("computing not known")
    read = costs.costs(Basis(RUN, None, Assumptions(cpus=128, read_cpu_ms=3.8)))
    (note,) = [line.note for line in read.lines if line.stage == "train"]
    assert note.startswith("reading 53.60 h; computing not known")
    assert by_stage["catalogue"].note == by_stage["evaluate"].note == "not measured"
    assert {"train", "storage", "reference-scores"} <= set(found.without)
    assert found.money == 0


def test_the_training_of_the_reference_is_added_by_its_run_file():
    curated = (LAION.parent / "curation" / "strong.yaml").read_text()
    reference = run_file.load(curated, ["model.name=jest-b-16-256"])
    slow = assuming(read_cpu_ms=38.0)
    found = lines(Basis(RUN, None, slow, reference_run=reference))["train runs/reference-strong"]
    assert found.hours == pytest.approx(reference.n_steps * 32_768 * 38e-3 / 1000 / 3600)
    assert "--reference-run FILE" in lines(Basis(RUN, None, GIVEN))["reference"].note


def test_cpus_come_from_the_manifest(tmp_path):
    group = machines.Group("data", 16, 0, 0, 0, 10)
    gpus = machines.Group("learners", 96, 8, 0, 0, 8)
    found = lines(Basis(RUN, None, assuming(cpus=None), manifest=machines.Machines("f", (group, gpus))))
    assert found["ingest"].machines == "160 CPUs"
    assert found["train"].machines == "64 learners, 864 CPUs reading"  # 8 machines of 96, less one for each learner


def test_a_plan_says_which_prices_are_missing_and_where_rates_come_from(capsys, monkeypatch):
    from rich.console import Console

    console = Console(width=200)
    for table in cost_tables.tables(Basis(RUN, None, Assumptions(urls=10**9, cpus=100))):
        console.print(table)
    printed = capsys.readouterr().out
    assert printed.count("no price given") >= 4
    assert "img2dataset" in printed
    assert "bench_read_costs" in printed
    assert "the total is without the hours of catalogue, reference, reference-scores, train, evaluate" in printed
    assert "1,000,000,000" in printed


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cpu_hour", "has no '='"),
        ("hour=1", "--assume hour: unknown key; the keys are learner_hour, cpu_hour"),
        ("share_fetched=2", "--assume share_fetched: input should be less than or equal to 1"),
        ("cpus=many", "--assume cpus: input should be a valid integer"),
    ],
)
def test_a_wrong_assumption_is_named(word, message):
    with pytest.raises(ValueError, match=message):
        assumptions.read([word])
