import pytest

from pipelines.training import bottleneck


def line(step: int, **seconds: float) -> dict[str, float]:
    parts = {f"jest/{part}_time": spent for part, spent in seconds.items()}
    batch = sum(spent for part, spent in seconds.items() if part != "checkpoint") + 0.25
    counts = {"jest/samples_seen": 500 * step, "jest/samples_trained": 100 * step, "train/loss": 1.5}
    return {"train/batch_time": batch, **counts, **parts}


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


@pytest.mark.parametrize("part", list(bottleneck.REMEDIES))
def test_the_slowest_part_is_named_with_its_remedy(part: str):
    starting = line(1, wait=100.0)  # the first step, which includes starting the readers, is left out
    lines = [starting, line(2, **{**dict.fromkeys(bottleneck.REMEDIES, 0.1), part: 2.0})]
    on_cpus, on_gpus = (bottleneck.limit(lines, gpus=gpus) for gpus in (0, 1))
    assert on_cpus.startswith(f"limited by {part}, ")
    for limit in (on_cpus, on_gpus):
        assert limit.endswith(bottleneck.REMEDIES[part])
    assert "bf16" not in on_cpus
    assert "compile" not in on_cpus
    assert bottleneck.ON_A_GPU.get(part, "") in on_gpus


def test_lines_without_times_are_said_to_have_none():
    assert bottleneck.limit([{"step": 1}, {"step": 2}], gpus=0).endswith("do not say how long its steps took")


def test_a_remedy_names_settings_that_exist():
    from jest_core.run_file import Run

    schema = str(Run.model_json_schema())
    text = (
        " ".join([*bottleneck.REMEDIES.values(), *bottleneck.ON_A_GPU.values()])
        .replace(",", " ")
        .replace(";", " ")
        .replace("`", " ")
    )
    named = [word.split(".")[-1] for word in text.split() if "." in word or "_" in word]
    assert len(named) >= 10
    for name in named:
        assert f"'{name}'" in schema, name
