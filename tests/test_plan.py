from contextlib import nullcontext
from dataclasses import replace

import pytest
from shards import write_shards, write_tar

from clipft.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from clipft.data.split import load_splits
from clipft.plan import check_batch_norm, count_steps, data_notes, default_lr, resolve, units_of
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


def test_a_group_that_no_sample_names_is_refused(config):
    """The shards' key.json holds a caption and nothing else."""
    grouped = replace(config, loss=LossConfig(positives="group", group="patient"))
    with pytest.raises(ValueError, match=r"loss\.group='patient': none of the first 20 samples"):
        resolve(grouped)


def test_an_epoch_of_all_captions_counts_pairs(config, tmp_path):
    write_tar(
        tmp_path / "many" / "train-0.tar",
        [(f"{i}.{k}", v) for i in range(9) for k, v in (("jpg", b"x"), ("txt", b"one\ntwo\nthree"))],
    )
    data = DataConfig(train=str(tmp_path / "many"), val=config.data.path, captions="all")
    many = replace(config, data=data, train=TrainConfig(batch_size=4))
    steps = count_steps(many, units_of(many, load_splits(data)))
    assert (steps.num_units, steps.per_epoch) == (27, 6)
    one = replace(many, data=replace(data, captions="one"))
    assert count_steps(one, units_of(one, load_splits(one.data))).num_units == 9
    assert "negatives of each other" in data_notes(many)[0] and data_notes(one) == []


@pytest.mark.parametrize("world, micro, fits", [(1, 8, True), (2, 4, False), (1, 4, False)])
def test_batch_norm_is_trained_on_whole_batches_only(config, world, micro, fits):
    trained = replace(config, train=TrainConfig(batch_size=8, batch_norm="train"))
    check_batch_norm(config, world, micro)
    with nullcontext() if fits else pytest.raises(ValueError, match=r"train\.batch_norm=train needs the whole batch"):
        check_batch_norm(trained, world, micro)


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
