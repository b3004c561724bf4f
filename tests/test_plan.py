from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from flaky import site
from shards import list_shards, pairs, write_shards, write_tar

from clipft.config import Config, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from clipft.data.lanes import Lanes
from clipft.data.mix import Mix
from clipft.data.order import Order
from clipft.data.split import load_splits
from clipft.plan import check_batch_norm, count_steps, data_notes, default_lr, order_of, resolve, units_of
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
    assert default_lr(settle(base).path) == pytest.approx(2e-4)
    low = replace(base, name="low", optim=OptimConfig(lr=3e-5))
    assert default_lr(settle(low).path) == 1e-5


def test_a_set_of_labels_is_refused_before_anything_starts(config, tmp_path):
    write_tar(
        tmp_path / "labels" / "train-0.tar",
        [(f"{i}.{k}", v) for i in range(9) for k, v in (("jpg", b"x"), ("cls", b"1"))],
    )
    labels = replace(config, data=DataConfig(path=str(tmp_path / "labels")), train=TrainConfig(batch_size=2))
    with pytest.raises(ValueError, match=r"data\.train: none of 8 samples from all over labels has a caption"):
        resolve(labels)


def test_a_set_whose_first_captions_are_empty_is_trained_on(config, tmp_path):
    texts = [b" "] * 20 + [b"a dog"] * 380
    members = [(f"{i}.{kind}", raw) for i, text in enumerate(texts) for kind, raw in (("jpg", b"x"), ("txt", text))]
    write_tar(tmp_path / "late" / "train-0.tar", members)
    assert resolve(replace(config, data=DataConfig(path=str(tmp_path / "late")))).data.name == "late"


def test_a_group_that_no_sample_names_is_refused(config):
    """The shards' key.json holds a caption and nothing else."""
    grouped = replace(config, loss=LossConfig(positives="group", group="patient"))
    with pytest.raises(ValueError, match=r"loss\.group='patient': none of 20 samples from all over shards"):
        resolve(grouped)


def order_and_units(config: Config) -> tuple[Order, int]:
    splits = load_splits(config.data)
    units = units_of(config, splits)
    return order_of(config, splits, units), len(units)


def test_an_epoch_of_all_captions_counts_pairs(config, tmp_path):
    write_tar(
        tmp_path / "many" / "train-0.tar",
        [(f"{i}.{k}", v) for i in range(9) for k, v in (("jpg", b"x"), ("txt", b"one\ntwo\nthree"))],
    )
    data = DataConfig(train=str(tmp_path / "many"), val=config.data.path, captions="all")
    many = replace(config, data=data, train=TrainConfig(batch_size=4))
    order, num_units = order_and_units(many)
    assert (num_units, count_steps(many, order, num_units).per_epoch) == (27, 6)
    assert "negatives of each other" in data_notes(many, order)[0]
    one = replace(many, data=replace(data, captions="one"))
    order, num_units = order_and_units(one)
    assert num_units == 9 and data_notes(one, order) == []


def test_lanes_read_by_shard_and_say_what_that_costs(config):
    """30 and 10 samples in two shards, two of them held out."""
    laned = replace(config, data=replace(config.data, lanes=2, window_shards=1))
    order, num_units = order_and_units(laned)
    assert isinstance(order, Lanes) and (order.window_shards, num_units) == (1, 38)
    assert sorted(order.shard_sizes, reverse=True)[0] > 25
    steps = count_steps(laned, order, num_units)
    assert steps.per_epoch == 4 and "pairs of one shard in a batch" in data_notes(laned, order)[0]
    default, _ = order_and_units(replace(config, data=replace(config.data, lanes=2)))
    assert isinstance(default, Lanes) and default.window_shards == 8


def mixed(config: Config, tmp_path: Path, lanes: int | None = None) -> Config:
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    sources = [{"shards": str(shards[0]), "weight": 3}, {"shards": str(shards[1])}]
    train = TrainConfig(batch_size=8, max_steps=100)
    return replace(config, data=DataConfig(train=sources, val=str(shards[0]), lanes=lanes), train=train)


def test_sources_with_weights_are_mixed_for_a_number_of_steps(config, tmp_path):
    both = mixed(config, tmp_path)
    order, num_units = order_and_units(both)
    assert isinstance(order, Mix) and (order.sizes, order.weights) == ((30, 10), (3.0, 1.0))
    steps = count_steps(both, order, num_units)
    assert (steps.num_units, steps.per_epoch, steps.total) == (40, 100, 100)
    notes = data_notes(both, order)
    assert notes[0] == "source 1: 30 pairs, 75.00% of the batches, seen 20.0 times" and "eval.every" in notes[2]


def test_a_mix_needs_a_number_of_steps_and_takes_no_lanes(config, tmp_path):
    endless = replace(mixed(config, tmp_path), train=TrainConfig(batch_size=8))
    with pytest.raises(ValueError, match=r"train\.max_steps is needed"):
        resolve(endless)
    with pytest.raises(ValueError, match=r"data\.lanes=2 would be ignored"):
        resolve(mixed(config, tmp_path, lanes=2))


@pytest.mark.parametrize(
    "source, message",
    [
        ({"shards": "x.tar", "weight": 0}, "weight=0 must be a number greater than 0"),
        ({"shards": "x.tar", "weight": "much"}, "weight='much' must be a number"),
        ({"shard": "x.tar"}, "must be {shards: SHARDS, weight: NUMBER}"),
        ("x.tar", "'x.tar' must be {shards: SHARDS, weight: NUMBER}"),
    ],
)
def test_a_source_that_is_not_understood_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(train=[{"shards": "y.tar", "weight": 1}, source])


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


def test_a_cache_smaller_than_what_is_needed_at_once_is_refused_with_the_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    shards = [Path(path) for path in write_shards(tmp_path / "www/set", *[8] * 12, prefix="train-")]
    val = Path(write_tar(tmp_path / "www/set/val-0.tar", pairs(900, 8)))
    list_shards(tmp_path / "www/set", {"train": shards, "val": [val]})
    size = shards[0].stat().st_size
    with site(tmp_path / "www") as web:

        def started(num_shards: int, **changed) -> Config:
            data = DataConfig(path=f"{web.url}/set", cache_size=num_shards * size, **changed)
            model = ModelConfig(name="tiny", pretrained=None)
            return resolve(Config(model=model, data=data, train=TrainConfig(batch_size=8)))

        assert started(13).data.name == "set"
        with pytest.raises(ValueError, match=r"data\.cache_size=.* needed at once: of train all, .*data\.lanes=8"):
            started(12)
        assert started(9, lanes=2, window_shards=1).data.lanes == 2
        says = r"two windows of data\.lanes=4 times data\.window_shards=1 .*lower data\.lanes or data\.window_shards"
        with pytest.raises(ValueError, match=says):
            started(7, lanes=4, window_shards=1)
        with pytest.raises(ValueError, match=r"val is held out of all its shards .*\(data\.val\)"):
            started_without_val = Config(
                model=ModelConfig(name="tiny", pretrained=None),
                data=DataConfig(train=f"{web.url}/set/train-{{000..011}}.tar", cache_size=9 * size, lanes=2),
                train=TrainConfig(batch_size=8),
            )
            resolve(started_without_val)
