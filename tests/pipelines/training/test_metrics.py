"""metrics.jsonl after damage: what the selection log says too is made again, and what is lost is said."""

import json

import pyarrow as pa
import pytest

from jest_core import tables
from jest_core.training.step import Optimisation, StepResult
from pipelines.base import checkpoints, storage
from pipelines.base.integrity import Damaged
from pipelines.training import metrics_line
from pipelines.training.heartbeat import Board
from pipelines.training.metrics import Journal
from pipelines.training.selection_log import SelectionLog

STEPS = 6
UPDATE: Optimisation = {
    "loss": 0.5,
    "learning_rate": 1e-3,
    "gradient_norm": 2.0,
    "logit_scale": 10.0,
    "logit_bias": -10.0,
}


def result(number: int) -> StepResult:
    """One selected example of a step."""
    row = {name: [0] for name in tables.SELECTION.names} | {"step": [number], "uid": ["0" * 32], "selected": [True]}
    summary = dict.fromkeys(tables.STEPS.names, 0) | {"step": number, "loss": 0.5, "sub_batch_score": number / 4}
    picks = pa.table({f.name: pa.array(row[f.name]).cast(f.type) for f in tables.SELECTION})
    return StepResult(picks, tables.BAD_ROWS.empty_table(), summary, UPDATE, {}, {"score": 0.25})


def opened(run, step: int) -> tuple[Journal, Board]:
    board = Board(in_process=True)
    return Journal(run, board, {"step": step, "seconds": 1.5 * step, "log_parts": []}), board


@pytest.fixture
def run(make_run):
    """A run directory with the log and the metrics of so many steps, and their checkpoint."""
    run = make_run("joint")
    directory = run.path("joint")
    journal, _ = opened(run, 0)
    log = SelectionLog(directory, [])
    with journal:
        for number in range(STEPS):
            log.add(result(number))
            journal.add(result(number), number + 1, {"wait": 0.5, "batch": 1.5})
        parts = log.commit(log.take())
        journal.write(journal.text())
    checkpoints.write(directory, STEPS, {"jest": {"step": STEPS, "seconds": 1.5 * STEPS, "log_parts": parts}})
    return run


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda text: b"", [1, 2, 3, 4, 5, 6]),
        (lambda text: text[: len(text) // 2], [4, 5, 6]),  # the first three lines, and a piece of the fourth
        (lambda text: b"".join(text.splitlines(keepends=True)[:3]), [4, 5, 6]),
        (lambda text: text.replace(b'{"step": 2,', b'["step": 2,'), [2]),
        (lambda text: text.replace(b'{"step": 2,', b'{"step": 5,'), [2, 5]),  # which of two is it?
        (lambda text: text.replace(b'"step": 4,', b'"stop": 4,'), [4]),
        (lambda text: text.replace(b'"step": 1,', b'"step": "1",'), [1]),
        (lambda text: b"\xfe\xff\n7\nnull\n" + text, []),
    ],
)
def test_lines_that_are_lost_are_made_again_and_that_is_said(run, damage, lost):
    directory, whole = run.path("joint"), metrics_line.read(run.path("joint"))
    path = metrics_line.path_of(directory)
    storage.write_bytes(path, damage(storage.read_bytes(path)))
    with pytest.raises(Damaged, match=r"metrics\.jsonl has no line of step \d in its place: restore"):
        metrics_line.read(directory)
    journal, board = opened(run, STEPS)
    lines = metrics_line.read(directory)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line for line in lines if line["step"] not in lost] == [w for w in whole if w["step"] not in lost]
    for step in lost:
        line, before = lines[step - 1], whole[step - 1]
        assert line.items() <= before.items()  # nothing is made up
        assert line["jest/sub_batch_score"] == (step - 1) / 4
        assert line["jest/flops"] == before["jest/flops"]
        assert line["train/loss"] == 0.5
        assert "train/lr" not in line
    assert lines[-1]["jest/seconds"] == 1.5 * STEPS  # which the checkpoint says
    said = board.get().messages
    assert len(said) == bool(lost)
    for text in said:
        assert f"has lost the lines of {len(lost)} of 6 steps (the first is step {lost[0]})" in text
    with journal:
        journal.add(result(6), 7, {"wait": 0.5, "batch": 1.5})
        journal.write(journal.text())
    assert [line["step"] for line in metrics_line.read(directory)] == [1, 2, 3, 4, 5, 6, 7]


def test_without_the_log_too_a_run_goes_on_with_what_the_run_file_says(run):
    directory = run.path("joint")
    storage.remove(metrics_line.path_of(directory))
    storage.write_bytes(f"{directory}/selection/steps-00000000-00000005.parquet", b"torn")
    _, board = opened(run, STEPS)
    lines = metrics_line.read(directory)
    assert [line["jest/samples_trained"] for line in lines] == [32, 64, 96, 128, 160, 192]
    assert not any("jest/sub_batch_score" in line for line in lines)
    assert len(board.get().messages) == 1


def test_whole_lines_are_kept_as_they_are_and_later_ones_removed(run):
    path = metrics_line.path_of(run.path("joint"))
    before = storage.read_bytes(path)
    _, board = opened(run, 4)
    assert storage.read_bytes(path) == b"".join(before.splitlines(keepends=True)[:4])
    assert not board.get().messages
    opened(run, 0)
    assert not storage.exists(path)
    assert json.loads(before.splitlines()[0])["step"] == 1


def test_lines_and_a_checkpoint_that_are_written_while_they_are_read_are_no_loss(run, monkeypatch):
    directory, read_lines = run.path("joint"), storage.read_lines

    def then_a_checkpoint(path: str) -> list:
        lines = read_lines(path)
        checkpoints.write(directory, STEPS + 1, {})
        return lines

    monkeypatch.setattr(storage, "read_lines", then_a_checkpoint)
    assert [line["step"] for line in metrics_line.read(directory)] == list(range(1, STEPS + 1))
