import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jest_core.models import configurations, flexible, flop_counts, outlines, sharding, towers

ASKED: list[tuple[str, tuple[Any, ...]]] = [
    ("width", ("jest-tiny",)),
    ("image_size", ("jest-tiny",)),
    ("patch_size", ("jest-tiny",)),
    ("n_parameters", ("jest-tiny", None)),
    ("n_gathered", ("jest-tiny", None)),
    ("forward_flops", ("jest-tiny", None, None, 16)),
]


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """Where answers are kept, which nothing remembers yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    return tmp_path


def forget() -> None:
    """As in a process of its own."""
    for name, _ in ASKED:
        getattr(outlines, name).cache_clear()


def ask() -> list[Any]:
    forget()
    return [getattr(outlines, name)(*arguments) for name, arguments in ASKED]


def test_answers_are_those_of_the_model_and_need_no_pytorch_again(folder, monkeypatch):
    model = towers.outline("jest-tiny")
    expected = [
        configurations.width("jest-tiny"),
        configurations.image_size("jest-tiny"),
        flexible.patch_size(model.visual),
        sum(p.numel() for p in model.parameters()),
        sharding.n_gathered(model),
        pytest.approx(flop_counts.forward_flops("jest-tiny", None, None, 16)),
    ]
    assert ask() == expected
    code = f"import sys; from jest_core.models import outlines; print([getattr(outlines, n)(*a) for n, a in {ASKED}]); "
    code += "sys.exit('torch' in sys.modules)"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(expected[3]) in again.stdout


def test_a_damaged_answer_is_counted_again(folder):
    first = ask()
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text()[:-5])
    assert ask() == first
    kept = [path.read_text() for path in folder.rglob("*.json")]
    assert len(kept) == len(ASKED)
    assert all(text.endswith("}") for text in kept)


def test_without_a_folder_to_write_to_it_is_counted_each_time(folder):
    (folder / "jest").write_text("no folder")
    assert ask() == ask()


def test_an_answer_of_other_releases_is_not_taken(folder, monkeypatch):
    calls = []

    @outlines.cached
    def answer(name: str) -> int:
        calls.append(name)
        return len(calls)

    for releases, expected in ([["one"], 1], [["one"], 1], [["another"], 2]):
        monkeypatch.setattr(outlines, "_releases", lambda releases=releases: releases)
        answer.cache_clear()
        assert answer("a") == expected


def test_a_model_that_there_is_not_is_refused_and_not_remembered(folder):
    for _ in range(2):
        with pytest.raises(ValueError, match="is no open_clip model"):
            outlines.width("ViT-Z-99")
    assert not list(folder.rglob("*.json"))
