"""Whole runs: what they leave, what a kill costs, what ranks change."""

import inspect
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from shards import jpeg, pairs, write_tar
from small import RESNET_CFG, make_config, make_data, make_model, make_world, outcome, train_here, wait_for

from clipft import fit, run
from clipft.config import Config, ExportConfig, OptimConfig
from clipft.learn.after_step import AfterStep
from clipft.learn.checkpoint import saved_step, step_path
from clipft.learn.losses import chance_loss
from clipft.learn.metrics_file import read_rows
from clipft.learn.module import ContrastiveModule
from clipft.learn.stop import StopRequest
from clipft.plan import resolve
from clipft.report import RunFailed
from clipft.rundir import locked, read_results, settle

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def in_child(function: Callable[[], object]) -> int:
    """Runs the function in a forked process; its exit code, negative for a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(function() or 0))  # pyright: ignore
        process.start()
    process.join(100)
    assert process.exitcode is not None
    return process.exitcode


def train_and_die(config: Config, step: int, number: int) -> int:
    """Trains, and sends itself the signal when step `step` has ended."""
    end = AfterStep.on_train_batch_end

    def then_signal(self, trainer, pl_module, outputs, batch, batch_idx):
        end(self, trainer, pl_module, outputs, batch, batch_idx)
        if pl_module.step == step:
            os.kill(os.getpid(), number)

    AfterStep.on_train_batch_end = then_signal
    return train_here(config)[0]


def test_a_run_leaves_what_it_promises(root):
    code, path = train_here(make_config(root, "name=whole"))
    assert code == 0
    results, rows = read_results(path), read_rows(path / "metrics.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
    assert {"train/loss", "train/scale", "train/lr"} < set(rows[0])
    assert [row["step"] for row in rows if row["val/text_to_image_recall@1"]] == ["2", "4", "6"]
    for column in ("base", "best", "last"):
        assert {"squares/text_to_image_recall@1", "squares/image_to_text_recall@10"} < set(results[column])
        assert "squares/zero_shot_top1" in results[column]
    assert results["meta"]["split"] == "test" and results["meta"]["finished"]
    assert results["meta"]["gallery"]["squares"]["images"] == 12
    best = torch.load(path / "checkpoints" / "best.ckpt", weights_only=True)
    model = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert best["clipft"]["step"] in (2, 4, 6) and "visual.conv1.weight" in model and "logit_scale" in model


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.fault)])
def test_a_run_that_was_killed_ends_like_one_that_was_not(root, workers):
    whole = make_config(root, f"name=undisturbed-{workers}")
    assert train_here(whole)[0] == 0
    killed = make_config(root, f"name=killed-{workers}", f"data.workers={workers}")
    for step in (1, 3, 5):  # before the first save, between saves twice
        assert in_child(lambda step=step: train_and_die(killed, step, signal.SIGKILL)) == -signal.SIGKILL
    assert in_child(lambda: train_here(killed)[0]) == 0
    expected = outcome(Path(whole.runs_dir) / f"undisturbed-{workers}")
    assert outcome(Path(killed.runs_dir) / f"killed-{workers}") == expected


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_saves_the_step_and_the_same_command_goes_on(root, number, code):
    name = f"stopped-{code}"
    config = make_config(root, f"name={name}", "checkpoint.every=100")
    assert in_child(lambda: train_and_die(config, 3, number)) == code
    path = Path(config.runs_dir) / name
    assert torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["clipft"]["step"] == 4
    assert read_results(path)["meta"]["ledger"]["used"] == 4 * 8
    assert in_child(lambda: train_here(config)[0]) == 0
    train_here(make_config(root, f"name=calm-{code}", "checkpoint.every=100"))
    assert outcome(path)["weights"] == outcome(path.with_name(f"calm-{code}"))["weights"]


def on_rank(config: Config) -> int:
    os.environ.update(RANK=str(torch.distributed.get_rank()), WORLD_SIZE=str(torch.distributed.get_world_size()))
    os.environ.update(LOCAL_RANK=os.environ["RANK"], LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])
    from clipft.ranks import Ranks

    ranks = Ranks(torch.device("cpu"), int(os.environ["RANK"]), 2, 2, "32-true")
    return run.train(config, Path(config.runs_dir) / str(config.name), ranks, StopRequest())


def test_every_sample_is_accounted_for_on_one_rank_and_on_two(root, tmp_path):
    """Of 44 samples in the training shards one has no caption, two are cut off; 5 batches of 8 an epoch, 3 left out."""
    members = pairs(0, 43)
    for i in (7, 30):
        members[2 * i] = (f"{i:05d}.jpg", jpeg(i)[:-50])
    write_tar(tmp_path / "train-0.tar", [*members, ("alone.jpg", jpeg(99))])
    write_tar(tmp_path / "val-0.tar", pairs(100, 8))
    options = [f"data.path={tmp_path}", "data.max_bad_frac=0.1", "train.max_steps=10", "eval.every=10"]
    one = make_config(root, "name=counted", *options)
    assert train_here(one)[0] == 0
    two = resolve(make_config(root, "name=counted-by-two", "trainer.devices=2", *options))
    settle(two)
    assert on_ranks(2, tmp_path, on_rank, two) == [0, 0]
    seen = [read_results(Path(one.runs_dir) / name)["meta"]["ledger"] for name in ("counted", "counted-by-two")]
    assert seen[0] == seen[1]
    used, dropped = seen[0]["used"], seen[0]["dropped"]
    assert dropped["no_text"] == 2 and used + dropped["image_truncated"] == 80
    assert {"epochs": 2, "indexed": 88, "left_out": 6, "not_reached": 0}.items() <= seen[0].items()
    assert set(seen[0]["examples"]["image_truncated"]) <= {"train-0/00007", "train-0/00030"}
    assert seen[0]["examples"]["no_text"][0].startswith("alone (byte ")


def message_on_rank(config: Config) -> str:
    with pytest.raises(RunFailed) as raised:
        on_rank(config)
    return str(raised.value)


def test_ranks_give_up_together_with_the_reasons_of_all(root, tmp_path):
    """Batches of 40 of 80 samples, all cut off: 100 in a row after 3, of which each rank has seen half."""
    members = pairs(0, 80)
    members[::2] = [(name, raw[:-50]) for name, raw in members[::2]]
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "val-0.tar", pairs(100, 8))
    options = [f"data.path={tmp_path}", "data.max_bad_frac=1", "eval.base=false", "train.batch_size=40"]
    config = resolve(make_config(root, "name=given-up", "trainer.devices=2", *options))
    settle(config)
    first, second = on_ranks(2, tmp_path, message_on_rank, config)
    assert first == second
    assert first.startswith("120 samples in a row could not be used (image_truncated 120, such as train-0/")


def test_captions_that_are_not_utf8_are_dropped_or_repaired_as_the_config_says(root, tmp_path):
    members = pairs(0, 40)
    members[5] = (members[5][0], "Mädchen".encode("latin-1"))
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "val-0.tar", pairs(100, 8))
    for errors, dropped in (("strict", {"bad_utf8": 1}), ("replace", {})):
        options = [f"data.text_errors={errors}", f"data.path={tmp_path}", "train.max_steps=5"]
        code, path = train_here(make_config(root, f"name=text-{errors}", "eval.base=false", *options))
        assert code == 0 and read_results(path)["meta"]["ledger"]["dropped"] == dropped


@pytest.mark.parametrize("again", ["false", "true"], ids=["activations kept", "activations computed again"])
def test_two_ranks_with_micro_batches_train_the_model_of_one(root, tmp_path, again):
    assert train_here(make_config(root, f"runs_dir={tmp_path}", "name=one", "optim.eps=1e-6"))[0] == 0
    parts = ["trainer.devices=2", "train.micro_batch=3", f"model.grad_checkpointing={again}"]
    two = resolve(make_config(root, f"runs_dir={tmp_path}", "name=two", "optim.eps=1e-6", *parts))
    settle(two)
    assert on_ranks(2, tmp_path, on_rank, two) == [0, 0]
    paths = [Path(two.runs_dir) / name for name in ("one", "two")]
    one, other = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for path in paths)
    difference = sum(((one[name] - other[name]) ** 2).sum() for name in one) / sum(
        (one[name] ** 2).sum() for name in one
    )
    assert difference**0.5 < 1e-5
    rows = [read_rows(path / "metrics.csv") for path in paths]
    assert len(rows[1]) == 6
    for a, b in zip(*rows, strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-5)


LIT = "tune.rules=[{match: image, lr_mult: 0}, {match: '*'}]"


def test_a_frozen_tower_stays_as_it_is_on_one_rank_and_two_and_through_a_kill(root, tmp_path):
    """The moments in the state are those of what is trained."""
    one = make_config(root, "name=lit", LIT, "optim.eps=1e-6")
    assert train_here(one)[0] == 0
    two = resolve(make_config(root, "name=lit-two", LIT, "optim.eps=1e-6", "trainer.devices=2", "train.micro_batch=3"))
    settle(two)
    assert on_ranks(2, tmp_path, on_rank, two) == [0, 0]
    killed = replace(one, name="lit-killed")
    assert in_child(lambda: train_and_die(killed, 3, signal.SIGKILL)) == -signal.SIGKILL
    assert in_child(lambda: train_here(killed)[0]) == 0
    runs, start = Path(two.runs_dir), load_file(root / "model" / "open_clip_model.safetensors")
    assert outcome(runs / "lit") == outcome(runs / "lit-killed")
    states = [torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("lit", "lit-two")]
    text = {name for name in start if not name.startswith("visual.")}
    for state in states:
        weights = state["state_dict"]
        assert {name for name in start if not torch.equal(weights[name], start[name])} == text
        moments = state["optimizer_states"][0]["state"].values()
        assert sum(len(each["exp_avg"].flatten()) for each in moments) == sum(start[name].numel() for name in text)
    one_text, two_text = (torch.cat([state["state_dict"][name].flatten() for name in text]) for state in states)
    assert (one_text - two_text).norm() < 1e-5 * one_text.norm()


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_fixed_temperature_is_not_trained_and_not_cut_and_a_later_run_can_keep_it(root):
    code, base = train_here(make_config(root, "name=warm", "loss.temperature=0.005"))
    state, rows = saved(base), read_rows(base / "metrics.csv")
    assert code == 0 and [float(row["train/scale"]) for row in rows] == pytest.approx([200] * 6)
    assert (
        len(state["optimizer_states"][0]["state"]) == len(load_file(root / "model" / "open_clip_model.safetensors")) - 1
    )
    more = [f"model.name={base}", "train.max_steps=2", "eval.base=false", "eval.also=[]"]
    for name, option, scales in (
        ("kept", "loss.temperature=keep", [200, 200]),
        ("learned", "loss.temperature=null", [100, 100]),  # what CLIP's clip leaves
    ):
        code, path = train_here(make_config(root, f"name={name}", option, *more))
        found = [float(row["train/scale"]) for row in read_rows(path / "metrics.csv")]
        assert code == 0 and found == pytest.approx(scales, rel=0.05)
        assert ("its scale is above 100" in (path / "log.txt").read_text()) == (name == "learned")


def test_a_sigmoid_loss_on_a_trained_base_starts_where_its_softmax_stood_on_one_rank_and_two(root, tmp_path):
    _, base = train_here(make_config(root, "name=softmax"))
    options = [f"model.name={base}", "loss.name=siglip", "train.max_steps=1", "optim.lr=1e-9", "eval.base=false"]
    _, one = train_here(make_config(root, "name=sigmoid-one", *options))
    two = resolve(make_config(root, "name=sigmoid-two", *options, "trainer.devices=2", "train.micro_batch=3"))
    settle(two)
    assert on_ranks(2, tmp_path, on_rank, two) == [0, 0]
    paths = [one, one.with_name("sigmoid-two")]
    biases = [saved(path)["state_dict"]["logit_bias"] for path in paths]
    assert torch.allclose(biases[0], biases[1], rtol=1e-5) and not torch.allclose(biases[0], torch.tensor(-math.log(7)))
    assert saved(one)["state_dict"]["logit_scale"].item() == pytest.approx(
        saved(base)["state_dict"]["logit_scale"].item()
    )
    (row,) = read_rows(one / "metrics.csv")
    assert float(row["train/loss"]) == pytest.approx(chance_loss("siglip", 8), rel=0.05)  # as the base's softmax
    assert f"new logit_bias of {biases[0].item():.2f} beside its scale" in (one / "log.txt").read_text()


def test_a_run_ends_when_validations_do_not_improve_also_after_kills_and_on_two_ranks(root, tmp_path, monkeypatch):
    """Under a rate that moves nothing the first validation is the best: three validations later it is over."""
    options = ["optim.lr=1e-9", "train.max_steps=20", "train.patience=3", "eval.every=2", "checkpoint.every=3"]
    calm = make_config(root, "name=patient", *options)
    code, path = train_here(calm)
    meta, rows = read_results(path)["meta"], read_rows(path / "metrics.csv")
    assert code == 0 and len(rows) == saved_step(path / "checkpoints" / "last.ckpt") == 8
    assert meta["finished"] and meta["ended_early"]["step"] == 8 and meta["ended_early"]["best_step"] == 2
    assert meta["ended_early"]["reason"].endswith("not improved in 3 validations (train.patience=3)")
    assert meta["ledger"]["used"] == 8 * 8 and meta["ledger"]["not_reached"] == 2 * 40 - 8 * 8
    assert "Ended at step 8 of 20: val mean_recall@1 has not improved in 3" in (path / "log.txt").read_text()
    assert settle(resolve(calm)).state == "finished"

    killed = replace(calm, name="patient-killed")
    for step in (3, 7):  # between validations, and after the second that was no better
        assert in_child(lambda step=step: train_and_die(killed, step, signal.SIGKILL)) == -signal.SIGKILL
    monkeypatch.setattr(run, "load_exactly", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert in_child(lambda: train_here(killed)[0]) == -signal.SIGKILL  # when it had ended, before it was measured
    monkeypatch.undo()
    assert in_child(lambda: train_here(killed)[0]) == 0
    assert outcome(path.with_name("patient-killed")) == outcome(path)

    two = resolve(make_config(root, "name=patient-two", "trainer.devices=2", *options))
    settle(two)
    assert on_ranks(2, tmp_path, on_rank, two) == [0, 0]
    assert read_results(path.with_name("patient-two"))["meta"]["ended_early"] == meta["ended_early"]


def test_more_patience_lets_a_run_that_had_ended_go_on(root):
    options = ["optim.lr=1e-9", "train.max_steps=9", "eval.every=1", "eval.base=false"]
    config = make_config(root, "name=impatient", "train.patience=1", *options)
    _, path = train_here(config)
    assert saved_step(path / "checkpoints" / "last.ckpt") == 2
    more = replace(config, resume="force", train=replace(config.train, patience=4))
    assert train_here(more)[0] == 0 and read_results(path)["meta"]["ended_early"]["step"] == 5
    never = replace(config, resume="force", train=replace(config.train, patience=None))
    assert train_here(never)[0] == 0 and len(read_rows(path / "metrics.csv")) == 9
    assert "ended_early" not in read_results(path)["meta"]


def test_a_base_run_is_measured_again_on_its_own_data(root):
    code, base = train_here(make_config(root, "name=base"))
    other = make_config(root, "name=tuned", f"model.name={base}", "data.name=others", "train.max_steps=2")
    code, path = train_here(other)
    results = read_results(path)
    assert code == 0 and results["base"]["squares/text_to_image_recall@5"] == pytest.approx(
        read_results(base)["best"]["squares/text_to_image_recall@5"]
    )
    assert "others/text_to_image_recall@5" in results["best"]


def command(config: Config, *overrides: str) -> list[str]:
    """The command line of the config's run, as its user would type it."""
    arguments = [f"model={config.model.name}", f"data.path={config.data.path}", f"runs_dir={config.runs_dir}"]
    arguments += [f"name={config.name}", "train.batch_size=8", "eval.every=100000", *overrides]
    return [sys.executable, str(Path(__file__).parent.parent / "train.py"), *arguments]


def is_free(path: Path) -> bool:
    try:
        with locked(path):
            return True
    except ValueError:
        return False


@pytest.mark.fault
def test_a_run_on_two_devices_outlives_neither_its_supervisor_nor_its_result(root, tmp_path):
    config = make_config(root, "name=orphan")
    path = Path(config.runs_dir) / "orphan"
    words = command(config, "trainer.devices=2", "train.max_steps=400", "checkpoint.every=5")
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as supervisor:
        wait_for(lambda: len(read_rows(path / "metrics.csv")) >= 7)
        supervisor.kill()
    wait_for(lambda: is_free(path))  # its ranks have saved and gone
    step = len(read_rows(path / "metrics.csv"))
    assert 7 <= step < 400 and saved_step(path / "checkpoints" / "last.ckpt") >= 5
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0
    assert [row["step"] for row in read_rows(path / "metrics.csv")] == [str(n) for n in range(1, 401)]
    assert read_results(path)["meta"]["finished"]


def test_a_stop_signal_to_the_command_stops_both_ranks_at_one_step(root, tmp_path):
    config = make_config(root, "name=terminated")
    path = Path(config.runs_dir) / "terminated"
    words = command(config, "trainer.devices=2", "train.max_steps=4000", "checkpoint.every=100000")
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as supervisor:
        wait_for(lambda: len(read_rows(path / "metrics.csv")) >= 3)
        supervisor.terminate()
    assert supervisor.returncode == 143
    assert saved_step(path / "checkpoints" / "last.ckpt") == len(read_rows(path / "metrics.csv"))
    assert "Stopped at step" in (path / "log.txt").read_text()


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_that_are_read_a_step_late_are_all_on_disk_when_a_state_is_saved(root, monkeypatch, lag):
    """On a GPU the host reads a step's numbers one step later; here the CPU is made to do so."""
    monkeypatch.setattr(fit, "host_lag", lambda ranks: lag)
    name = f"lag-{lag}"
    config = make_config(root, f"name={name}", "train.max_steps=7", "checkpoint.every=3", "eval.every=5")
    assert in_child(lambda: train_and_die(config, 3, signal.SIGTERM)) == 143
    path = Path(config.runs_dir) / name
    assert len(read_rows(path / "metrics.csv")) == saved_step(path / "checkpoints" / "last.ckpt") >= 4
    assert in_child(lambda: train_here(config)[0]) == 0
    assert [row["step"] for row in read_rows(path / "metrics.csv")] == [str(n) for n in range(1, 8)]


def test_other_data_under_a_run_that_goes_on_are_refused(root):
    data = make_data(root / "first", num_train=40)
    config = make_config(root, "name=moved", f"data.path={data}")
    assert in_child(lambda: train_and_die(config, 3, signal.SIGTERM)) == 143
    data.rename(data.with_name("before"))
    make_data(root / "second", num_train=48).rename(data)
    with pytest.raises(ValueError, match=r"the shards of train.* are not those"):
        train_here(config)


def test_a_run_out_of_time_saves_and_goes_on_later(root):
    config = make_config(root, "name=hurried", "train.max_time=0.0001s", "checkpoint.every=100", "eval.every=100")
    path = Path(config.runs_dir) / "hurried"
    for step in (1, 2):
        assert in_child(lambda: train_here(config)[0]) == 143
        assert saved_step(path / "checkpoints" / "last.ckpt") == step
    assert "Stopped at step 2 of 6 (train.max_time), saved." in (path / "log.txt").read_text()
    unhurried = replace(config, train=replace(config.train, max_time=None))
    assert in_child(lambda: train_here(unhurried)[0]) == 0
    train_here(replace(unhurried, name="calm"))
    assert outcome(path)["weights"] == outcome(path.with_name("calm"))["weights"]


def test_batch_norm_moves_only_where_it_is_asked_to(tmp_path):
    make_model(tmp_path / "model", RESNET_CFG)
    make_data(tmp_path / "data")
    start = load_file(tmp_path / "model" / "open_clip_model.safetensors")
    for setting in ("frozen", "train"):
        _, path = train_here(make_config(tmp_path, f"name={setting}", f"train.batch_norm={setting}"))
        end = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        moved = [not torch.equal(end[name], start[name]) for name in start if name.endswith("running_mean")]
        assert moved and all(moved) == any(moved) == (setting == "train")
        assert not torch.equal(end["visual.conv1.weight"], start["visual.conv1.weight"])
    with pytest.raises(ValueError, match=r"train\.batch_norm=train needs the whole batch"):
        train_here(make_config(tmp_path, "name=cut", "train.batch_norm=train", "train.micro_batch=4"))


def test_training_batch_norm_that_is_not_there_is_refused(root):
    with pytest.raises(ValueError, match=r"train\.batch_norm=train would be ignored"):
        train_here(make_config(root, "name=without", "train.batch_norm=train"))


def test_a_run_under_the_sigmoid_loss_resumes_evaluates_and_exports(root, tmp_path):
    config = make_config(root, "name=sigmoid", "loss.name=siglip", "checkpoint.every=2")
    assert in_child(lambda: train_and_die(config, 3, signal.SIGKILL)) == -signal.SIGKILL
    assert in_child(lambda: train_here(config)[0]) == 0
    _, calm = train_here(replace(config, name="sigmoid-calm"))
    path = Path(config.runs_dir) / "sigmoid"
    assert outcome(path) == outcome(calm)
    state = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["logit_bias"] != pytest.approx(-math.log(7))
    assert run.export(ExportConfig(run=str(path), out=str(tmp_path / "out"))) == 0
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    best = torch.load(path / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(exported["logit_bias"], best["logit_bias"])


def test_averages_are_validated_saved_measured_and_exported_and_training_goes_on_without_them(root, tmp_path):
    every = ["checkpoint.every=1", "checkpoint.keep=9", "eval.every=3", f"data.test={root}/data/packed/val-00000.tar"]
    _, plain = train_here(make_config(root, "name=not-averaged", *every))
    code, path = train_here(make_config(root, "name=averaged", "train.ema=0.7", *every))
    assert code == 0
    average = load_file(root / "model" / "open_clip_model.safetensors")
    for step in range(1, 7):
        state, other = (torch.load(step_path(p / "checkpoints", step), weights_only=True) for p in (path, plain))
        assert "raw_state_dict" not in other
        for name, value in other["state_dict"].items():
            assert torch.equal(state["raw_state_dict"][name], value), (step, name)
            average[name] = average[name].lerp(value, 1 - 0.7)
            assert torch.equal(state["state_dict"][name], average[name]), (step, name)
    results, row = read_results(path), read_rows(path / "metrics.csv")[-1]
    for metric in ("text_to_image_recall@5", "image_to_text_median_rank", "zero_shot_mean_per_class"):
        assert results["last"][f"squares/{metric}"] == pytest.approx(float(row[f"val/{metric}"]))
    assert run.export(ExportConfig(run=str(path), checkpoint="last", out=str(tmp_path / "out"))) == 0
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in average.items())
    tuned = make_config(root, "name=from-average", f"model.name={path}", "train.max_steps=1", "data.name=others")
    assert (
        f"best of the run {path}, the moving average of its weights" in (train_here(tuned)[1] / "log.txt").read_text()
    )


def test_averages_survive_a_kill_are_those_of_two_ranks_and_leave_what_is_frozen(root, tmp_path, monkeypatch):
    options = ["train.ema=0.9", "optim.eps=1e-6", LIT]
    one = make_config(root, "name=ema", *options)
    _, calm = train_here(one)
    killed = replace(one, name="ema-killed")
    for step in (3, 5):
        assert in_child(lambda step=step: train_and_die(killed, step, signal.SIGKILL)) == -signal.SIGKILL
    assert in_child(lambda: train_here(killed)[0]) == 0
    path = calm.with_name("ema-killed")
    assert outcome(path) == outcome(calm)
    torch.testing.assert_close(saved(path)["raw_state_dict"], saved(calm)["raw_state_dict"], rtol=0, atol=0)
    two = resolve(make_config(root, "name=ema-two", "trainer.devices=2", "train.micro_batch=3", *options))
    settle(two)
    assert on_ranks(2, tmp_path, on_rank, two) == [0, 0]
    start = load_file(root / "model" / "open_clip_model.safetensors")
    mine, theirs = saved(calm)["state_dict"], saved(calm.with_name("ema-two"))["state_dict"]
    assert {name for name, value in start.items() if torch.equal(mine[name], value)} == {
        name for name in start if name.startswith("visual.")
    }
    one_rank, two_ranks = (torch.cat([state[name].flatten() for name in start]) for state in (mine, theirs))
    assert (one_rank - two_ranks).norm() < 1e-5 * one_rank.norm()
    assert not any(name.startswith("visual.") for name in saved(calm)["raw_state_dict"])


def test_averages_may_begin_and_end_where_a_run_goes_on(root):
    flat = ["optim.schedule=constant", "optim.warmup_frac=0"]
    _, calm = train_here(make_config(root, "name=never", "train.max_steps=4", *flat))
    config = make_config(root, "name=later", "train.max_steps=2", *flat)
    _, path = train_here(config)
    second = saved(path)["state_dict"]
    for num_steps, ema in ((3, 0.5), (4, None)):
        train = replace(config.train, max_steps=num_steps, ema=ema)
        assert train_here(replace(config, resume="force", train=train))[0] == 0
        if ema is not None:
            third = saved(path)
            for name, value in third["raw_state_dict"].items():
                assert torch.equal(third["state_dict"][name], second[name].lerp(value, 0.5))
    torch.testing.assert_close(saved(path)["state_dict"], saved(calm)["state_dict"], rtol=0, atol=0)
    assert "raw_state_dict" not in saved(path)


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "lamb", "sgd", "muon"])
def test_a_step_that_is_left_out_moves_neither_weights_nor_the_optimizer(root, monkeypatch, name):
    """Steps 1 and 4 have a gradient that is not a number; states are saved after each step."""
    step = ContrastiveModule.training_step

    def spoiled(self, batch, batch_idx):
        handle = self.logit_scale.register_hook(lambda gradient: gradient * (math.nan if self.step in (0, 3) else 1))
        step(self, batch, batch_idx)
        handle.remove()

    monkeypatch.setattr(ContrastiveModule, "training_step", spoiled)
    options = [
        f"optim.name={name}",
        "optim.lr=1e-3",
        "train.ema=0.5",
        "checkpoint.every=1",
        "checkpoint.keep=9",
        "eval.every=9",
    ]
    code, path = train_here(make_config(root, f"name=skips-{name}", "eval.base=false", *options))
    assert code == 0
    assert [float(row["train/skipped"]) for row in read_rows(path / "metrics.csv")] == [1, 0, 0, 1, 0, 0]
    states = [torch.load(step_path(path / "checkpoints", n), weights_only=True) for n in range(1, 7)]
    start = load_file(root / "model" / "open_clip_model.safetensors")
    assert all(torch.equal(value, states[0]["state_dict"][key]) for key, value in start.items())
    third, fourth, fifth = (rateless(state) for state in states[2:5])
    torch.testing.assert_close(fourth, third, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(fifth, fourth, rtol=0, atol=0)


def rateless(state: dict[str, Any]) -> list[Any]:
    """Weights, moments and what else the optimizer counts, without the rate of the step."""
    optimizer = state["optimizer_states"][0]
    counts = [{key: value for key, value in group.items() if key == "step"} for group in optimizer["param_groups"]]
    return [state["state_dict"], state["raw_state_dict"], optimizer["state"], counts]


def test_a_run_that_goes_on_under_another_decay_decays_by_it_and_under_other_rules_is_refused(root):
    config = make_config(root, "name=forced", "train.max_steps=3", "optim.weight_decay=0")
    _, path = train_here(config)
    steps = replace(config.train, max_steps=5)
    more = replace(config, resume="force", train=steps, optim=replace(config.optim, weight_decay=50.0))
    norms = []
    for one in (replace(config, resume="force", train=steps), more):
        shutil.copytree(path, path.with_name("forced-copy"))
        assert train_here(replace(one, name="forced-copy"))[0] == 0
        norms.append(saved(path.with_name("forced-copy"))["state_dict"]["token_embedding.weight"].norm())
        shutil.rmtree(path.with_name("forced-copy"))
    assert norms[1] < 0.8 * norms[0]
    with pytest.raises(ValueError, match=r"forced cannot go on under this config.*conv1\.weight is no longer trained"):
        train_here(replace(config, resume="force", train=steps, tune=make_config(root, LIT).tune))
    other = replace(config, resume="force", train=steps, optim=OptimConfig(name="lion", lr=1e-3))
    with pytest.raises(ValueError, match=r"optim\.name adamw -> lion"):
        train_here(other)


def profiled(config: Config) -> dict[str, int]:
    """Trains on this rank; what the second step sent, by the backend's names, and the number of DDP's buckets."""
    found = {}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    begin, end = ContrastiveModule.training_step, AfterStep.on_train_batch_end

    def begin_watching(self, batch, batch_idx):
        if self.step == 1:
            profiler.__enter__()
        return begin(self, batch, batch_idx)

    def end_watching(self, trainer, pl_module, outputs, batch, batch_idx):
        end(self, trainer, pl_module, outputs, batch, batch_idx)
        if pl_module.step == 2:
            profiler.__exit__(None, None, None)
            found["buckets"] = len(trainer.strategy.model.reducer._get_zeros_like_grad_buckets())

    ContrastiveModule.training_step, AfterStep.on_train_batch_end = begin_watching, end_watching
    on_rank(config)
    return found | {each.key: each.count for each in profiler.key_averages() if each.key.startswith("gloo:")}


def test_a_step_sends_three_gathers_one_reduction_and_ddps_buckets(root, tmp_path):
    """Features with validity, ids, log-sum-exps; the record and the gradients. Nothing of Lightning's."""
    rarely = ("eval.every=100", "checkpoint.every=100")
    config = resolve(make_config(root, "name=sent", "trainer.devices=2", "train.micro_batch=3", *rarely))
    settle(config)
    for sent in on_ranks(2, tmp_path, profiled, config):
        assert sent == {"gloo:all_gather": 3, "gloo:all_reduce": 1 + sent["buckets"], "buckets": sent["buckets"]}


def test_lightning_still_has_the_broadcast_that_is_switched_off(monkeypatch):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert fit.STOP_BROADCAST in inspect.getsource(type(trainer.fit_loop.epoch_loop).advance)
    fit.switch_off_stop_broadcast(trainer)
    assert getattr(trainer.fit_loop.epoch_loop, fit.STOP_BROADCAST)() is None
    monkeypatch.setattr(trainer.fit_loop, "epoch_loop", object())
    with pytest.raises(RuntimeError, match="this pytorch-lightning has no _broadcast_sigterm_tensor"):
        fit.switch_off_stop_broadcast(trainer)


def test_more_steps_may_be_added_to_a_finished_run(root):
    config = make_config(root, "name=longer", "train.max_steps=3")
    assert train_here(config)[0] == 0
    code, path = train_here(replace(config, resume="force", train=replace(config.train, max_steps=5)))
    assert code == 0 and len(read_rows(path / "metrics.csv")) == 5
    assert saved_step(path / "checkpoints" / "last.ckpt") == read_results(path)["meta"]["steps"] == 5


def test_a_run_goes_on_under_another_batch_size_when_it_is_forced_to(root, capsys):
    config = make_config(root, "name=smaller", "train.max_steps=3")
    assert train_here(config)[0] == 0
    smaller = replace(config, resume="force", train=replace(config.train, max_steps=5, batch_size=4))
    code, path = train_here(smaller)
    assert code == 0 and read_results(path)["meta"]["ledger"] == {
        "drawn": 3 * 8 + 2 * 4,
        "used": 3 * 8 + 2 * 4,
        "dropped": {},
        "incomplete": {},
        "examples": {},
    }
    assert "32 drawn = 32 used + 0 dropped" in capsys.readouterr().out


def test_after_a_forced_change_of_the_seed_no_epochs_are_claimed(root):
    config = make_config(root, "name=seeded", "train.max_steps=3")
    assert train_here(config)[0] == 0
    code, path = train_here(replace(config, resume="force", train=replace(config.train, max_steps=5, seed=1)))
    ledger = read_results(path)["meta"]["ledger"]
    assert code == 0 and ledger["drawn"] == 5 * 8 and "epochs" not in ledger


def test_data_that_become_unusable_on_the_way_fail_the_run_and_before_it_are_refused(root, tmp_path, monkeypatch):
    data = make_data(tmp_path)
    config = make_config(root, f"data.path={data}", "name=touched")

    def after_a_touch(function):
        def touched(*arguments):
            for shard in data.glob("val-*.tar"):
                os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
            return function(*arguments)

        return touched

    monkeypatch.setattr(AfterStep, "_validate", after_a_touch(AfterStep._validate))
    with pytest.raises(RunFailed, match=r"none of its 12 images could be decoded \(12 shard_changed\)"):
        train_here(config)
    monkeypatch.setattr(fit, "batches", after_a_touch(fit.batches))
    with pytest.raises(ValueError, match=r"none of its 12 images could be decoded"):
        train_here(replace(config, name="touched-first"))
