import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jest_core.models import configurations, flexible, flop_counts, outlines, sharding, towers

PROPERTIES: list[tuple[str, tuple[Any, ...]]] = [
    ("width", ("jest-tiny",)),
    ("image_size", ("jest-tiny",)),
    ("patch_size", ("jest-tiny",)),
    ("n_parameters", ("jest-tiny", None)),
    ("n_gathered", ("jest-tiny", None)),
    ("forward_flops", ("jest-tiny", None, None, 16)),
]


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """An empty cache folder, with nothing cached in memory either."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    return tmp_path


def forget() -> None:
    """Clear the caches in memory, as in a new process."""
    for name, _ in PROPERTIES:
        getattr(outlines, name).cache_clear()


def read_all() -> list[Any]:
    forget()
    return [getattr(outlines, name)(*arguments) for name, arguments in PROPERTIES]


def test_cached_properties_match_the_model_and_load_without_pytorch(folder, monkeypatch):
    model = towers.outline("jest-tiny")
    expected = [
        configurations.width("jest-tiny"),
        configurations.image_size("jest-tiny"),
        flexible.patch_size(model.visual),
        sum(p.numel() for p in model.parameters()),
        sharding.n_gathered(model),
        pytest.approx(flop_counts.forward_flops("jest-tiny", None, None, 16)),
    ]
    assert read_all() == expected
    code = "import sys; from jest_core.models import outlines;"
    code += f"print([getattr(outlines, n)(*a) for n, a in {PROPERTIES}]); sys.exit('torch' in sys.modules)"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(expected[3]) in fresh.stdout


def test_a_damaged_cache_file_is_computed_again(folder):
    first = read_all()
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text()[:-5])
    assert read_all() == first
    written = [path.read_text() for path in folder.rglob("*.json")]
    assert len(written) == len(PROPERTIES)
    assert all(text.endswith("}") for text in written)


def test_without_a_writable_cache_folder_properties_are_computed_each_time(folder):
    (folder / "jest").write_text("no folder")
    assert read_all() == read_all()


def test_a_cache_entry_of_other_package_versions_is_not_used(folder, monkeypatch):
    calls = []

    @outlines.cached
    def answer(name: str) -> int:
        calls.append(name)
        return len(calls)

    for releases, expected in ([["one"], 1], [["one"], 1], [["another"], 2]):
        monkeypatch.setattr(outlines, "_releases", lambda releases=releases: releases)
        answer.cache_clear()
        assert answer("a") == expected


def test_an_unknown_model_is_refused_and_not_cached(folder):
    for _ in range(2):
        with pytest.raises(ValueError, match="is no open_clip model"):
            outlines.width("ViT-Z-99")
    assert not list(folder.rglob("*.json"))
