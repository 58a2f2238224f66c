"""What a stage prints at each log level."""

import pytest

from pipelines.base import progress


@pytest.mark.parametrize(
    ("level", "printed"),
    [(None, "a: done\na: odd\n"), ("debug", "a: done\na: odd\n"), ("WARNING", "a: odd\n"), ("error", "")],
)
def test_a_level_hides_what_is_below_it(level, printed, monkeypatch, capsys):
    monkeypatch.delenv("JEST_LOG_LEVEL", raising=False)
    if level:
        monkeypatch.setenv("JEST_LOG_LEVEL", level)
    progress.say("a", "done")
    progress.warn("a", "odd")
    assert capsys.readouterr().out == printed


def test_a_bar_is_hidden_with_the_lines(monkeypatch, capsys):
    monkeypatch.setenv("JEST_LOG_LEVEL", "warning")
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    with progress.bar("a", 2, "shards") as advance:
        advance(1, note="half")
    assert not capsys.readouterr().out
