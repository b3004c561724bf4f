from dataclasses import replace

import pytest
from shards import write_shards, write_tar

from clipft.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from clipft.plan import default_lr, resolve
from clipft.rundir import settle


@pytest.fixture
def config(tmp_path) -> Config:
    write_shards(tmp_path / "shards", 30, 10, prefix="train-")
    return Config(
        model=ModelConfig(name="tiny", pretrained=None),
        data=DataConfig(path=str(tmp_path / "shards")),
        train=TrainConfig(batch_size=8),
    )


def test_what_depends_on_the_base_is_filled_in(config):
    resolved = resolve(config)
    assert resolved.optim.lr == 1e-5 and resolved.data.name == "shards"


def test_a_run_is_tuned_with_a_tenth_of_its_rate(config, tmp_path):
    base = replace(config, runs_dir=str(tmp_path / "runs"), name="base", optim=OptimConfig(lr=2e-3))
    assert default_lr(str(settle(base).path)) == pytest.approx(2e-4)
    low = replace(base, name="low", optim=OptimConfig(lr=3e-5))
    assert default_lr(str(settle(low).path)) == 1e-5


def test_a_set_of_labels_is_refused_before_anything_starts(config, tmp_path):
    write_tar(
        tmp_path / "labels" / "train-0.tar",
        [(f"{i}.{k}", v) for i in range(9) for k, v in (("jpg", b"x"), ("cls", b"1"))],
    )
    labels = replace(config, data=DataConfig(path=str(tmp_path / "labels")), train=TrainConfig(batch_size=2))
    with pytest.raises(ValueError, match=r"data\.train: none of the first 8 samples of labels has a caption"):
        resolve(labels)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train": TrainConfig(batch_size=64)}, "train.batch_size=64 is more than"),
        (
            {"train": TrainConfig(batch_size=4), "trainer": TrainerConfig(devices=5)},
            "less than trainer.devices=5",
        ),
        (
            {"optim": OptimConfig(warmup_frac=0.99), "train": TrainConfig(batch_size=8, epochs=1)},
            "warms up for all",
        ),
        ({"model": ModelConfig(name="tiny", pretrained="openai")}, "no weights for tiny"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(config, change, message):
    with pytest.raises(ValueError, match=message):
        resolve(replace(config, **change))
