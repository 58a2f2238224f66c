import pytest

from pipelines.base import in_parallel, storage


def test_results_come_in_the_order_of_the_arguments():
    assert list(in_parallel.read_each(lambda n: n * n, range(2500))) == [n * n for n in range(2500)]
    assert list(in_parallel.read_each(str, [])) == []


def test_transient_errors_are_retried_and_missing_files_are_not(monkeypatch):
    monkeypatch.setattr(storage, "_BACKOFF", lambda state: 0)
    tries = list[str]()

    def read(path: str) -> str:
        tries.append(path)
        if path == "gone":
            raise FileNotFoundError(path)
        if tries.count(path) < 3:
            raise OSError("connection lost")
        return path

    assert list(in_parallel.read_each(read, ["a"])) == ["a"]
    assert tries == ["a"] * 3
    with pytest.raises(FileNotFoundError):
        list(in_parallel.read_each(read, ["gone"]))
    assert tries.count("gone") == 1
