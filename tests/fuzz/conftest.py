import pytest

from pipelines.base import storage


@pytest.fixture(autouse=True)
def _nothing_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another try cannot help a damaged file."""

    def refuse(state: object) -> float:
        raise AssertionError("a damaged file is read again")

    monkeypatch.setattr(storage, "_BACKOFF", refuse)
