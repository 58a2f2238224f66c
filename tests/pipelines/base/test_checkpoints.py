import time

import pytest
import torch

from pipelines.base import checkpoints, storage


def test_the_newest_checkpoint_is_read_and_a_missing_one_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="train that run first, or name a checkpoint file"):
        checkpoints.read(str(tmp_path))
    for step in (5, 12):
        checkpoints.write(str(tmp_path), step, {"jest": {"step": step}})
    assert checkpoints.steps(str(tmp_path)) == [5, 12]
    assert checkpoints.read(str(tmp_path)) == {"jest": {"step": 12}}
    assert checkpoints.read(checkpoints.path_of(str(tmp_path), 5)) == {"jest": {"step": 5}}


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoints.read(str(tmp_path / "evil.pt"))


def test_pruning_keeps_the_last_checkpoints_and_every_nth_step(tmp_path):
    for step in range(2, 21, 2):
        checkpoints.write(str(tmp_path), step, {"epoch": step})
    checkpoints.prune(str(tmp_path), None, 6)
    assert len(checkpoints.steps(str(tmp_path))) == 10
    checkpoints.prune(str(tmp_path), 3, 6)
    assert checkpoints.steps(str(tmp_path)) == [6, 12, 16, 18, 20]
    checkpoints.prune(str(tmp_path), 1, None)
    assert checkpoints.steps(str(tmp_path)) == [20]


def test_tidy_removes_only_temporary_files_of_a_killed_writer(tmp_path):
    for name in ("checkpoints/step_00000002.pt", "checkpoints/results.jsonl.1.tmp", "metrics.jsonl", "run.yaml"):
        storage.write_bytes(f"{tmp_path}/{name}", b"x")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for name in ("checkpoints/step_00000004.pt.1.tmp", "metrics.jsonl.2.tmp"):
        storage.write_bytes(f"{tmp_path}/{name}", b"half")
    checkpoints.tidy(str(tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_copy_does_not_change_with_its_source():
    source = {"a": torch.ones(2, requires_grad=True), "b": [torch.zeros(1), {"c": 3}], "d": (torch.ones(1), "e")}
    copied = checkpoints.copied(source)
    with torch.no_grad():
        source["a"].add_(1)
        source["b"][0].add_(1)
        source["d"][0].add_(1)
    assert copied["a"].tolist() == [1, 1]
    assert copied["b"] == [torch.zeros(1), {"c": 3}]
    assert copied["d"] == (torch.ones(1), "e")


def test_a_background_writer_keeps_the_order_and_raises_failures():
    done: list[int] = []
    with checkpoints.Writer() as writer:
        writer.submit(lambda: (time.sleep(0.2), done.append(1)))
        assert not done  # submit returned without waiting
        writer.submit(lambda: done.append(2))
    assert done == [1, 2]
    with pytest.raises(OSError, match="disk full"):
        _write_to_a_full_disk(1, done)
    with pytest.raises(OSError, match="disk full"):
        _write_to_a_full_disk(2, done)
    assert done == [1, 2]


def _write_to_a_full_disk(times: int, done: list[int]) -> None:
    def fail() -> None:
        raise OSError("disk full")

    with checkpoints.Writer() as writer:
        writer.submit(fail)
        for _ in range(1, times):
            writer.submit(lambda: done.append(3))


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "model.safetensors", "epoch_3.pth", "last.ckpt", "w"])
def test_a_path_that_is_a_file_is_that_file_whatever_its_name(tmp_path, name):
    storage.write_bytes(f"{tmp_path}/folder/{name}", b"x")
    assert checkpoints.file_of(f"{tmp_path}/folder/{name}") == f"{tmp_path}/folder/{name}"
    if "." in name:
        assert checkpoints.file_of(f"{tmp_path}/folder") == f"{tmp_path}/folder/{name}"


def test_of_a_folder_the_file_is_read_that_open_clip_would_read(tmp_path):
    for name in ("training_args.bin", "pytorch_model.bin", "open_clip_pytorch_model.bin", "config.json"):
        storage.write_bytes(f"{tmp_path}/{name}", b"x")
    assert checkpoints.file_of(str(tmp_path)) == f"{tmp_path}/open_clip_pytorch_model.bin"
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        storage.write_bytes(f"{tmp_path}/parts/{name}", b"x")
    with pytest.raises(ValueError, match=r"several files of weights, model-00001.*name one of them"):
        checkpoints.file_of(f"{tmp_path}/parts")
