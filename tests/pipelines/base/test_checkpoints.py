import math
import re
import time

import pytest
import torch

from jest_core.models import towers
from jest_core.selection.arguments import Diverged
from pipelines.base import checkpoints, storage
from pipelines.base.integrity import Damaged


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


def damage(path: str) -> None:
    data = bytearray(storage.read_bytes(path))
    data[len(data) // 2] ^= 4
    storage.write_bytes(path, bytes(data))


def trained(run_dir: str, step: int) -> checkpoints.Checkpoint:
    """A model whose weights say after how many updates they were saved; saved."""
    pair = towers.create("jest-tiny", seed=0)
    with torch.no_grad():
        pair.model.logit_bias.fill_(-step)
    optimizer = torch.optim.AdamW(pair.model.parameters())
    content = checkpoints.content(step, pair, optimizer)
    checkpoints.write(run_dir, step, content | {"jest": {"step": step, "seconds": 1.0, "log_parts": []}})
    return content


def test_a_run_resumes_from_the_last_whole_checkpoint_and_says_so(tmp_path):
    run_dir = str(tmp_path)
    for step in (2, 4, 6, 8):
        trained(run_dir, step)
    damage(checkpoints.path_of(run_dir, 8))
    half = storage.read_bytes(checkpoints.path_of(run_dir, 6))
    storage.write_bytes(checkpoints.path_of(run_dir, 6), half[: len(half) // 2])
    pair = towers.create("jest-tiny", seed=1)
    optimizer = torch.optim.AdamW(pair.model.parameters())
    assert checkpoints.resume(run_dir, pair, optimizer)["step"] == 4
    assert pair.model.logit_bias == -4
    said = checkpoints.set_aside(run_dir, 4)
    assert len(said) == 2
    assert "step_00000008.pt is damaged, and is" in said[1]
    assert "the run goes on from the checkpoint after step 4" in said[1]
    assert checkpoints.steps(run_dir) == [2, 4]
    assert storage.exists(f"{checkpoints.path_of(run_dir, 8)}.damaged")  # nothing is lost: some of it may be of use
    assert checkpoints.set_aside(run_dir, 4) == []

    storage.write_bytes(checkpoints.path_of(run_dir, 6), storage.read_bytes(checkpoints.path_of(run_dir, 2)))
    assert checkpoints.resume(run_dir, pair, optimizer)["step"] == 4  # a copy of another step is not that step
    for step in (2, 4, 6):
        storage.write_bytes(checkpoints.path_of(run_dir, step), b"")
    with pytest.raises(Damaged, match=r"step_00000006\.pt is empty.*no checkpoint before it is whole: restore one"):
        checkpoints.resume(run_dir, pair, optimizer)


def test_a_damaged_file_is_named_wherever_a_checkpoint_is_read(tmp_path):
    for name in ("step_00000002.pt", "open_clip_model.pt"):
        path = f"{tmp_path}/checkpoints/{name}"
        for content in (b"", b"PK\x03\x04 cut", b"not a checkpoint " * 99, bytes(999)):
            storage.write_bytes(path, content)
            with pytest.raises(Damaged, match=re.escape(path)):
                checkpoints.read(path)


def test_files_of_other_names_are_no_checkpoints(tmp_path):
    trained(str(tmp_path), 2)
    others = [
        "step_best.pt",
        "step_2.pt",
        "step_00000004.pt.damaged",
        "step_00000004.pt.1.tmp",
        "latest.pt",
        "step_.pt",
    ]
    for name in [*others, "step_-0000001.pt", "step_00000003 (copy).pt", "epoch_00000001.pt", "step_00000009.PT"]:
        storage.write_bytes(f"{tmp_path}/checkpoints/{name}", b"x")
    assert checkpoints.steps(str(tmp_path)) == [2]
    assert checkpoints.file_of(str(tmp_path)) == checkpoints.path_of(str(tmp_path), 2)
    checkpoints.prune(str(tmp_path), 1, None)
    assert len(storage.names(f"{tmp_path}/checkpoints")) == 11  # they are not jest's to remove


def test_steps_of_more_digits_come_last(tmp_path):
    for step in (99_999_999, 100_000_000):
        checkpoints.write(str(tmp_path), step, {"jest": {"step": step}})
    assert checkpoints.steps(str(tmp_path)) == [99_999_999, 100_000_000]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    content = trained(str(tmp_path), 2)
    checkpoints.refuse_not_finite(content["state_dict"])
    half = {"weight": torch.full((300, 300), 3.0, dtype=torch.float16), "count": torch.tensor(3)}
    checkpoints.refuse_not_finite(half)  # their sum is no number of 16 bits
    content["state_dict"]["visual.proj"] = torch.tensor([0.0, value, -value])
    with pytest.raises(Diverged, match=r"visual\.proj are not finite after the update"):
        checkpoints.refuse_not_finite(content["state_dict"])


def test_checkpoints_have_checksums_also_where_a_program_has_turned_them_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        checkpoints.write(str(tmp_path), 1, {"state_dict": {"a": torch.ones(9)}})
    finally:
        torch.serialization.set_crc32_options(True)
    assert checkpoints.read(str(tmp_path))["state_dict"]["a"].sum() == 9


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
