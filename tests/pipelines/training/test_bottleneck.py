import pytest
import torch

from jest_core import losses, run_file
from jest_core.models import configurations
from jest_core.run_file import Run
from pipelines.scores import score_cache
from pipelines.stream import read_costs
from pipelines.stream.read_costs import ReadCosts
from pipelines.training import bottleneck, hardware, metrics_line, train
from pipelines.training.hardware import Hardware
from tests.conftest import RUN, MakeRun

H100, OLD_GPU = Hardware(gpu=True, bf16=True, compiles=True), Hardware(gpu=True, bf16=False, compiles=True)
BARE_GPU = Hardware(gpu=True, bf16=True, compiles=False)
CPU, NEW_CPU = Hardware(gpu=False, bf16=False, compiles=True), Hardware(gpu=False, bf16=True, compiles=True)
LATE = ("data.decode=late", "selection.score_image_size=32")


def line(step: int, **seconds: float) -> dict[str, float]:
    parts = {f"jest/{part}_time": spent for part, spent in seconds.items()}
    batch = sum(spent for part, spent in seconds.items() if part != "checkpoint") + 0.25
    counts = {"jest/samples_seen": 500 * step, "jest/samples_trained": 100 * step, "train/loss": 1.5}
    return {"train/batch_time": batch, **counts, **parts}


def run_of(*overrides: str) -> Run:
    return run_file.load(RUN.format(root="/nowhere", name="joint", shards="/nowhere"), list(overrides))


def test_each_part_has_its_share_of_the_time_and_the_rest_is_other():
    lines = [line(1, wait=0.25, score=0.5, train=0.5), line(2, wait=0.25, score=0.5, train=0.5, checkpoint=1.0)]
    assert bottleneck.shares(lines) == pytest.approx(
        {"wait": 0.125, "score": 0.25, "train": 0.25, "checkpoint": 0.25, "other": 0.125}
        | dict.fromkeys(("reference", "select", "log", "agreement", "exchange"), 0.0)
    )
    assert list(bottleneck.shares(lines))[-5:] == ["reference", "select", "log", "agreement", "exchange"]
    note = bottleneck.note(lines)
    assert note.startswith("loss 1.500, 200 trained of 1,000 seen; ")
    assert "score 25%" in note
    assert "select" not in note


def limit(part: str, machine: Hardware | None, *overrides: str, seconds: float = 7200.0) -> str:
    """The advice of a run of so many seconds, most of them in one part."""
    starting = line(1, wait=100.0)  # the first step, which includes starting the readers, is left out
    lines = [starting, line(2, **{**dict.fromkeys(bottleneck.REMEDIES, seconds / 100), part: seconds})]
    return bottleneck.limit(lines, run_of(*overrides), machine)


@pytest.mark.parametrize("machine", [H100, CPU, None])
@pytest.mark.parametrize("part", [part for part in bottleneck.REMEDIES if part != "wait"])
def test_the_slowest_part_is_named_with_its_remedy(part: str, machine: Hardware | None):
    said = limit(part, machine)
    assert said.startswith(f"limited by {part}, ")
    assert said.endswith(bottleneck.REMEDIES[part])
    if machine is not H100:
        assert "bf16" not in said
        assert "compile" not in said


@pytest.mark.parametrize(
    ("part", "machine", "recommended"),
    [
        ("score", H100, ["selection.score_precision bf16", "training.compile"]),
        ("train", H100, ["training.precision bf16", "training.compile"]),
        ("select", H100, ["selection.precision fast"]),
        ("score", BARE_GPU, ["selection.score_precision bf16"]),
        ("score", OLD_GPU, ["training.compile"]),
        ("select", OLD_GPU, []),
        ("train", NEW_CPU, ["training.precision bf16"]),
        ("score", NEW_CPU, ["selection.score_precision bf16"]),
        ("train", CPU, []),
        ("log", H100, []),
        ("train", None, []),
    ],
)
def test_a_setting_is_recommended_where_it_is_faster(part: str, machine: Hardware | None, recommended: list[str]):
    run = run_of()
    assert list(bottleneck.faster(part, run, machine, 7200.0)) == recommended
    without = [word for word in recommended if word != "training.compile"]
    assert list(bottleneck.faster(part, run, machine, 600.0)) == without  # a short run ends before it has paid


def test_what_a_run_has_already_is_not_recommended():
    has = (
        "selection.score_precision=bf16",
        "training.precision=bf16",
        "training.compile=true",
        "selection.precision=fast",
    )
    for part in ("score", "train", "select"):
        assert not list(bottleneck.faster(part, run_of(*has), H100, 7200.0))
    assert not list(bottleneck.faster("score", run_of("selection.score_precision=fp16"), H100, 600.0))


def costs(busy: float, **cpu_ms: float) -> ReadCosts:
    cpu_ms = {"decoding": 0.1, "tokens": 0.1, "reading": 0.1, **cpu_ms}
    return ReadCosts(cpu_ms=cpu_ms, clock_ms=sum(cpu_ms.values()) / busy, encoded_bytes=2e4)


@pytest.mark.parametrize(
    ("overrides", "found", "words", "never"),
    [
        (
            (),
            costs(0.9, decoding=2.0),
            ["most of it for decoding", "more CPUs than the 8", "data.decode late"],
            ["storage"],
        ),
        (LATE, costs(0.9, decoding=2.0), ["more CPUs than the 8", "; data.decoder simplejpeg"], ["data.decode late"]),
        (("selection.method=uniform",), costs(0.9, decoding=2.0), ["more CPUs than the 8"], ["data.decode late"]),
        (("data.decoder=simplejpeg",), costs(0.9, decoding=2.0), ["more CPUs than the 8"], ["data.decoder"]),
        ((), costs(0.9, tokens=2.0), ["most of it for tokens", "more CPUs than the 8"], ["decode"]),
        (("data.read_cpus=2",), costs(0.9), ["a larger data.read_cpus: 2 of 8 CPUs read"], ["more CPUs"]),
        (("data.read_cpus=16",), costs(0.9), ["more CPUs than the 8"], ["read_cpus"]),
        (
            (),
            costs(0.1),
            ["the storage comes too slowly", "works for 10%", "storage nearer by"],
            ["more CPUs", "decode"],
        ),
        (("data.read_cpus=2",), costs(0.1), ["a larger data.read_cpus", "storage nearer by"], ["decode"]),
        ((), None, [bottleneck.REMEDIES["wait"]], []),
    ],
)
def test_what_makes_reading_faster(overrides: tuple[str, ...], found, words: list[str], never: list[str]):
    said = bottleneck.reading(run_of(*overrides), found, 8)
    for word in words:
        assert word in said
    for word in never:
        assert word not in said


@pytest.mark.parametrize(
    ("overrides", "taken", "between"),
    [
        ((), 1000.0, True),  # 8 CPUs could read 3,636 a second
        ((), 3000.0, False),
        (("data.read_cpus=2",), 1000.0, False),
        (("data.n_streams=1", "training.n_learners=2"), 1000.0, False),  # which both read all of it
        ((), None, False),
    ],
)
def test_what_is_between_the_nodes_is_named_where_the_cpus_could_read_more(overrides, taken, between):
    said = bottleneck.reading(run_of(*overrides), costs(0.9, decoding=2.0), 8, taken)
    assert ("neither CPUs nor storage are slow" in said) == between
    if between:
        assert "read 3,636 a second, and 1,000 came" in said


def test_the_hardware_of_this_machine():
    found = hardware.of(torch.device("cpu"))
    assert found == Hardware(gpu=False, bf16=losses.has_bfloat16_products(torch.device("cpu")), compiles=found.compiles)


def test_lines_without_times_are_said_to_have_none():
    said = bottleneck.limit([{"step": 1}, {"step": 2}], run_of(), None)
    assert said.endswith("do not say how long its steps took")


@pytest.mark.slow
def test_a_run_whose_data_comes_too_slowly_says_so(make_scored_run: MakeRun, capsys, monkeypatch):
    """Windows are read once more: from a local disk the CPU is busy most of the time."""
    run = make_scored_run("joint")
    train.run_stage(run, in_process=True)
    said = capsys.readouterr().out
    assert "limited by " in said
    for line_ in (lines := metrics_line.read(run.path("joint"))):
        line_["jest/wait_time"] = 10 * line_["train/batch_time"]
    local = bottleneck.limit(lines, run, CPU)
    assert local.startswith("limited by wait, ")
    assert "the data comes too slowly: an example takes " in local
    found = read_costs.measure(run, seconds=0.1)
    assert found.busy > 0.5
    measured = (found.decoder, found.image_size, found.late, found.stored_tokens, found.width)
    scores = score_cache.opened(run.path("scores"))["config"]
    assert measured == (run.data.decoder, configurations.image_size(run.model.name), False, True, scores["width"])


def test_a_remedy_names_settings_that_exist():
    schema = str(Run.model_json_schema())
    settings = [name for name, _ in bottleneck.BF16.values()]
    said = [bottleneck.reading(run_of("data.read_cpus=2"), costs(0.9, decoding=2.0), 8)]
    text = (
        " ".join([*bottleneck.REMEDIES.values(), *settings, *said, "training.compile"])
        .replace(",", " ")
        .replace(";", " ")
        .replace("`", " ")
        .replace(":", " ")
    )
    named = [word.split(".")[-1] for word in text.split() if "_" in word or ("." in word and not word[0].isdigit())]
    assert len(named) >= 10
    for name in named:
        assert f"'{name}'" in schema, name
