import os

import pytest
import torch

from clipft.learn.checkpoint import AtomicCheckpointIO, forget_old, point, saved_step, saved_steps, step_path


def save(path, step=1):
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(3)}, "clipft": {"step": step}}, path)


def test_a_saved_state_loads_without_unpickling_and_leaves_no_temporary(tmp_path):
    save(tmp_path / "a.ckpt", step=7)
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert loaded["state_dict"]["w"].tolist() == [1, 1, 1] and os.listdir(tmp_path) == ["a.ckpt"]
    assert saved_step(tmp_path / "a.ckpt") == 7 and saved_step(tmp_path / "b.ckpt") == 0


def test_a_failed_save_leaves_the_old_file(tmp_path):
    save(tmp_path / "a.ckpt", step=1)
    with pytest.raises(AttributeError):
        AtomicCheckpointIO().save_checkpoint({"state_dict": lambda: None}, tmp_path / "a.ckpt")
    assert saved_step(tmp_path / "a.ckpt") == 1


@pytest.mark.parametrize("content", [b"", b"<html>", b"half"])
def test_a_damaged_state_is_named_in_one_sentence(tmp_path, content):
    save(tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(whole[: len(whole) // 2] if content == b"half" else content)
    with pytest.raises(ValueError, match=r"a\.ckpt cannot be read as a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


def test_code_in_a_state_is_refused_and_never_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()


def test_the_newest_states_are_kept_and_names_survive_them(tmp_path):
    for step in (5, 10, 15):
        save(step_path(tmp_path, step), step)
        if step == 5:
            point(tmp_path, "best", step_path(tmp_path, step))
        point(tmp_path, "last", step_path(tmp_path, step))
        forget_old(tmp_path, keep=2)
    assert saved_steps(tmp_path) == [10, 15]
    assert saved_step(tmp_path / "best.ckpt") == 5 and saved_step(tmp_path / "last.ckpt") == 15
