import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from clipft.learn.checkpoint import (
    Found,
    clean,
    find_state,
    forget_old,
    point,
    read_state,
    saved_step,
    saved_steps,
    step_path,
    write_state,
)
from clipft.learn.nested import size_of
from clipft.learn.saver import Saver, check_room
from clipft.report import RunFailed


def state(step: int, value: float = 1.0, best_step: int = 0) -> dict:
    return {
        "state_dict": {"weight": torch.full((4, 300), value), "bias": torch.zeros(4)},
        "optimizer_states": [],
        "clipft": {
            "step": step,
            "best_step": best_step,
            "best_value": 0.5,
            "since_best": 0,
            "select": "mean_recall@1",
            "ledger": {"used": 8 * step, "dropped": {}},
            "trained_by": {"name": "adamw", "groups": [["weight"], ["bias"]]},
        },
    }


MODEL = nn.Linear(300, 4)


def save_some(folder: Path, *steps: int) -> None:
    saver = Saver(keep=len(steps), about={"world_size": 1}, say=print)
    for step in steps:
        saver.save_checkpoint(state(step, best_step=steps[0]), step_path(folder, step))
    saver.finish()


def test_a_saved_state_loads_without_unpickling_and_leaves_no_temporary(tmp_path):
    sha256 = write_state(state(7), tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert loaded["state_dict"]["weight"].sum() == 1200 and os.listdir(tmp_path) == ["a.ckpt"]
    assert hashlib.sha256((tmp_path / "a.ckpt").read_bytes()).hexdigest() == sha256
    assert saved_step(tmp_path / "a.ckpt") == 7 and saved_step(tmp_path / "b.ckpt") == 0


def test_a_failed_save_leaves_the_old_file_and_no_temporary(tmp_path):
    write_state(state(1), tmp_path / "a.ckpt")
    with pytest.raises(AttributeError):
        write_state({"state_dict": lambda: None}, tmp_path / "a.ckpt")
    assert saved_step(tmp_path / "a.ckpt") == 1 and os.listdir(tmp_path) == ["a.ckpt"]


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def cut(frac: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(frac * path.stat().st_size)])


def flip_in_tensor(path: Path) -> None:
    flip(path, path.read_bytes().index(torch.full((100,), 1.0).numpy().tobytes()) + 200)


DAMAGES = {
    "empty": cut(0.0),
    "cut in half": cut(0.5),
    "cut near the end": cut(0.99),
    "html": lambda path: path.write_text("<html>not found</html>"),
    "one bit of a tensor": flip_in_tensor,
    "no checkpoint of ours": lambda path: torch.save({"state_dict": {}}, path),
    "another model's": lambda path: write_state(state(9) | {"state_dict": nn.Linear(2, 2).state_dict()}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_put_aside_and_the_one_before_it_is_used(tmp_path, damage):
    save_some(tmp_path, 5, 10)
    DAMAGES[damage](step_path(tmp_path, 10))
    if not damage.startswith("another"):
        with pytest.raises(ValueError, match=r"step-00000010\.ckpt is (damaged|none of our)"):
            read_state(step_path(tmp_path, 10))
    found = find_state(tmp_path, MODEL)
    assert (found.step, found.path, found.best) == (5, str(step_path(tmp_path, 5)), True)
    assert "step-00000010.ckpt" in found.notes[0] and "Going on from step-00000005.ckpt, step 5" in found.notes[-1]
    assert (tmp_path / "step-00000010.ckpt.damaged").exists() and saved_steps(tmp_path) == [5]
    assert saved_step(tmp_path / "last.ckpt") == 5


@pytest.mark.parametrize("place", range(40, 5000, 331))
def test_no_flipped_bit_changes_a_weight(tmp_path, place):
    write_state(state(3), tmp_path / "a.ckpt")
    flip(tmp_path / "a.ckpt", place)
    try:
        loaded = read_state(tmp_path / "a.ckpt")
    except ValueError:
        return
    assert torch.equal(loaded["state_dict"]["weight"], state(3)["state_dict"]["weight"])


def test_without_any_good_state_it_is_said_what_to_do(tmp_path):
    assert find_state(tmp_path, MODEL) == Found()
    save_some(tmp_path, 5)
    flip_in_tensor(step_path(tmp_path, 5))  # best and last are the same file
    for _ in range(2):  # a job that is started again and again must not begin again by itself
        with pytest.raises(ValueError, match=r"no state to go on from: .*05\.ckpt is damaged.*resume=restart"):
            find_state(tmp_path, MODEL)
    assert not list(tmp_path.glob("*.damaged"))
    for path in tmp_path.glob("*.ckpt"):
        path.rename(f"{path}.damaged")
    with pytest.raises(ValueError, match="no state to go on from"):
        find_state(tmp_path, MODEL)


def test_a_disk_that_does_not_answer_is_not_taken_for_a_damaged_state(tmp_path, monkeypatch):
    save_some(tmp_path, 5)

    def stale(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("zipfile.ZipFile", stale)
    with pytest.raises(OSError, match="Stale"):
        find_state(tmp_path, MODEL)
    assert saved_steps(tmp_path) == [5]


def test_a_kill_before_best_was_pointed_is_made_good(tmp_path):
    save_some(tmp_path, 5)
    write_state(state(10, best_step=10), step_path(tmp_path, 10))
    found = find_state(tmp_path, MODEL)
    assert (found.step, found.best) == (10, True)
    assert saved_step(tmp_path / "best.ckpt") == saved_step(tmp_path / "last.ckpt") == 10
    (tmp_path / "best.ckpt").unlink()
    assert find_state(tmp_path, MODEL).best and saved_step(tmp_path / "best.ckpt") == 10


def test_best_is_a_way_back_when_all_others_are_damaged(tmp_path):
    save_some(tmp_path, 5, 10)
    step_path(tmp_path, 5).unlink()
    flip_in_tensor(step_path(tmp_path, 10))
    found = find_state(tmp_path, MODEL)
    assert (found.step, found.best) == (5, True) and saved_step(tmp_path / "last.ckpt") == 5


def test_a_state_of_another_version_is_named_and_left_alone(tmp_path):
    old = state(5)
    del old["clipft"]["ledger"]
    write_state(old, step_path(tmp_path, 5))
    with pytest.raises(ValueError, match="was written by another version of clipft: it has no ledger"):
        find_state(tmp_path, MODEL)
    assert saved_steps(tmp_path) == [5]


def test_a_damaged_best_is_forgotten(tmp_path):
    save_some(tmp_path, 5, 10)
    step_path(tmp_path, 5).unlink()
    flip_in_tensor(tmp_path / "best.ckpt")
    found = find_state(tmp_path, MODEL)
    assert (found.step, found.best) == (10, False) and "best.ckpt is damaged" in found.notes[0]


def test_code_in_a_state_is_refused_and_never_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="is none of our training states"):
        read_state(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()


def test_the_newest_states_are_kept_and_names_survive_them(tmp_path):
    for step in (5, 10, 15):
        write_state(state(step), step_path(tmp_path, step))
        if step == 5:
            point(tmp_path, "best", step_path(tmp_path, step))
        point(tmp_path, "last", step_path(tmp_path, step))
        forget_old(tmp_path, keep=2)
    assert saved_steps(tmp_path) == [10, 15]
    assert saved_step(tmp_path / "best.ckpt") == 5 and saved_step(tmp_path / "last.ckpt") == 15


def test_temporaries_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    save_some(tmp_path, 5)
    there = sorted(os.listdir(tmp_path))
    (tmp_path / ".step-00000010.ckpt.tmp").write_bytes(b"half")
    clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == there


def test_the_manifest_describes_the_states_that_are_there(tmp_path):
    saver = Saver(keep=1, about={"world_size": 4, "config_sha256": "c"}, say=print)
    for step in (5, 10):
        saver.save_checkpoint(state(step, best_step=5), step_path(tmp_path, step))
    saver.finish()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest) == ["best.ckpt", "last.ckpt", "step-00000010.ckpt"]
    assert (manifest["best.ckpt"]["step"], manifest["last.ckpt"]["step"]) == (5, 10)
    for name, entry in manifest.items():
        raw = (tmp_path / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(raw).hexdigest() and entry["bytes"] == len(raw)
        assert entry["world_size"] == 4 and entry["used"] == 8 * entry["step"]


def test_what_changes_after_a_save_is_not_in_it(tmp_path):
    """The file is written beside training, which goes on changing the weights."""
    saver, content = Saver(keep=1, about={}, say=print), state(5)
    saver.save_checkpoint(content, step_path(tmp_path, 5))
    content["state_dict"]["weight"].zero_()
    saver.finish()
    assert read_state(step_path(tmp_path, 5))["state_dict"]["weight"].sum() == 1200


def test_where_memory_is_short_the_state_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("clipft.learn.saver.host_memory", lambda: size_of(state(5)))
    saver = Saver(keep=1, about={}, say=print)
    saver.save_checkpoint(state(5), step_path(tmp_path, 5))
    assert saver.thread is None and saved_step(tmp_path / "last.ckpt") == 5


def test_saves_that_fail_are_said_and_the_third_in_a_row_ends_the_run(tmp_path):
    """A file in the folder's place refuses every write."""
    said: list[str] = []
    saver = Saver(keep=1, about={}, say=said.append)
    (tmp_path / "no-folder").write_text("")
    for step in (5, 10, 15):
        saver.save_checkpoint(state(step), step_path(tmp_path / "no-folder", step))
        saver.wait()
    assert len(said) == 3 and "The state of step 15 was not saved" in said[2]
    with pytest.raises(RunFailed, match="was not saved"):
        saver.finish()
    with pytest.raises(RunFailed, match="3 states in a row could not be saved"):
        saver.save_checkpoint(state(20), step_path(tmp_path, 20))


def test_a_save_that_succeeds_makes_up_for_one_that_failed(tmp_path):
    saver = Saver(keep=1, about={}, say=print)
    (tmp_path / "no-folder").write_text("")
    saver.save_checkpoint(state(5), step_path(tmp_path / "no-folder", 5))
    saver.save_checkpoint(state(10), step_path(tmp_path, 10))
    saver.finish()
    assert find_state(tmp_path, MODEL).step == 10


def test_a_disk_without_room_is_left_alone(tmp_path):
    check_room(tmp_path, 1000)
    with pytest.raises(OSError, match=r"MB of room left and a state needs 1,000,000,000,000\.0 MB"):
        check_room(tmp_path, 10**18)
