from dataclasses import replace

import pytest

from clipft.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from clipft.rundir import load_config, locked, read_results, settle, write_results


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(
        name="one",
        runs_dir=str(tmp_path / "runs"),
        model=ModelConfig(name="tiny", pretrained=None),
        data=DataConfig(name="toy", train="a-{0..3}.tar"),
        optim=OptimConfig(lr=1e-3),
    )


def finish(folder):
    write_results(folder, {"meta": {"finished": True}})


def test_a_new_run_gets_a_folder_with_its_whole_config(config):
    folder = settle(config)
    assert folder.state == "new" and folder.path.name == "one"
    assert load_config(folder.path / "config.yaml", Config) == config


def test_the_same_command_goes_on_with_what_was_saved(config):
    path = settle(config).path
    assert settle(config).state == "new"
    (path / "checkpoints" / "last.ckpt").touch()
    assert settle(config).state == "resumed"
    finish(path)
    assert settle(config).state == "finished"


def test_a_changed_config_under_the_same_name_is_shown_and_refused(config):
    settle(config)
    with pytest.raises(ValueError) as error:
        settle(replace(config, optim=OptimConfig(lr=2e-3), train=TrainConfig(seed=5)))
    assert "optim.lr: 0.001 -> 0.002" in str(error.value) and "train.seed: 0 -> 5" in str(error.value)
    assert "resume=force" in str(error.value) and "resume=restart" in str(error.value)


def test_force_goes_on_under_the_changed_config(config):
    path = settle(config).path
    write_results(path, {"base": {"x": 1}, "best": {"x": 2}, "last": {"x": 2}, "meta": {"finished": True}})
    changed = replace(config, train=TrainConfig(epochs=20), resume="force")
    assert settle(changed).state == "new"
    assert load_config(path / "config.yaml", Config).train.epochs == 20
    assert settle(changed).state == "new"  # killed and started again, it is not taken for finished
    assert read_results(path) == {"base": {"x": 1}}
    settle(replace(changed, eval=EvalConfig(relevance="pair")))
    assert read_results(path) == {}  # the base has to be measured in the new way


def test_a_folder_is_trained_in_by_one_process_at_a_time(config):
    path = settle(config).path
    with locked(path), pytest.raises(ValueError, match="being trained by another process"), locked(path):
        pass
    with locked(path):
        pass


def test_restart_moves_the_old_run_away_first(config):
    path = settle(config).path
    (path / "mark").touch()
    assert settle(replace(config, resume="restart")).state == "new"
    assert settle(replace(config, resume="restart")).state == "new"
    assert not (path / "mark").exists()
    assert (path.with_name("one.old-1") / "mark").exists() and path.with_name("one.old-2").is_dir()


@pytest.mark.parametrize(
    "free",
    [
        {"trainer": TrainerConfig(devices=4)},
        {"train": TrainConfig(micro_batch=8)},
        {"logger": "tensorboard"},
        {"data": DataConfig(name="toy", train="a-{0..3}.tar", workers=3)},
    ],
)
def test_settings_that_the_result_does_not_depend_on_may_change(config, free):
    settle(config)
    assert settle(replace(config, **free)).state == "new"


def test_a_run_without_name_is_called_after_model_and_data_and_numbered(config):
    unnamed = replace(config, name=None)
    first = settle(unnamed).path
    assert first.name == "tiny-toy" and settle(unnamed).path == first
    other = settle(replace(unnamed, train=TrainConfig(seed=1))).path
    assert other.name == "tiny-toy-2"
    finish(first)
    assert settle(unnamed).path.name == "tiny-toy-3"


def test_a_folder_that_is_no_run_is_left_alone(config, tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is no run"):
        settle(config)
