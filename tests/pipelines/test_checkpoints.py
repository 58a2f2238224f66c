import pytest
import torch

from pipelines import checkpoints


def test_the_newest_of_a_run_is_read_and_its_absence_is_told(tmp_path):
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
