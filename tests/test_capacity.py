import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from small import RESNET_CFG, make_config, make_model
from torch.utils.data import Dataset, SequentialSampler

from clipft import capacity
from clipft.capacity import check_disk, choose_micro_batch, num_workers, out_of_memory, place, remember, state_bytes
from clipft.config import Config, ModelConfig, OptimConfig, TrainConfig
from clipft.data.waiting import PREFETCH, InFlight, Wait, in_order
from clipft.learn.gather import rank
from clipft.learn.step import Tower, Towers
from clipft.model.load import Clip, load_model
from clipft.ranks import Ranks
from clipft.report import RunFailed

pytestmark = pytest.mark.process  # they build a model of open_clip

ONE = Ranks(torch.device("cpu"), 0, 1, 1, "32-true")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    folder = make_model(tmp_path_factory.mktemp("model") / "small")
    return load_model(ModelConfig(name=str(folder), pretrained=None), seed=0)


def test_a_trial_leaves_no_trace(tmp_path):
    folder = make_model(tmp_path / "resnet", RESNET_CFG)
    clip = load_model(ModelConfig(name=str(folder), pretrained=None), seed=0)
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    choose_micro_batch(asked(tmp_path), tmp_path, ONE, clip, towers(clip))
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    assert clip.model.training


def towers(clip: Clip) -> Towers:
    def text(batch):
        assert batch.tokens.shape[1] == clip.model.context_length and batch.tokens[:, -1].gt(0).all()
        return clip.model.encode_text(batch.tokens)

    return Towers(
        Tower(lambda batch: clip.model.encode_image(batch.pixels.float())),
        Tower(text),
    )


def asked(tmp_path: Path, micro_batch: int | None = None) -> Config:
    config = make_config(tmp_path)
    return replace(config, train=TrainConfig(batch_size=8, micro_batch=micro_batch))


def test_what_is_asked_for_is_taken_without_a_try(clip, tmp_path):
    def fail(batch):
        raise AssertionError

    never = Towers(Tower(fail), Tower(fail))
    assert choose_micro_batch(asked(tmp_path, micro_batch=3), tmp_path, ONE, clip, never) == 3
    assert choose_micro_batch(asked(tmp_path, micro_batch=100), tmp_path, ONE, clip, never) == 8


def test_what_was_found_on_full_length_captions_is_kept_for_the_next_start(clip, tmp_path, monkeypatch):
    seeds = torch.random.get_rng_state()
    monkeypatch.setattr("clipft.learn.memory.host_memory", lambda: 2e5)
    first = choose_micro_batch(asked(tmp_path), tmp_path, ONE, clip, towers(clip))
    assert 1 <= first < 8 and torch.equal(torch.random.get_rng_state(), seeds)
    assert all(parameter.grad is None for parameter in clip.model.parameters())
    monkeypatch.setattr("clipft.learn.memory.host_memory", lambda: 4e9)
    assert choose_micro_batch(asked(tmp_path), tmp_path, ONE, clip, towers(clip)) == first
    elsewhere = replace(ONE, precision="bf16-mixed")
    assert choose_micro_batch(asked(tmp_path), tmp_path, elsewhere, clip, towers(clip)) == 8


def test_activations_that_are_computed_again_are_counted_on_a_cpu_as_if_they_were_kept(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("clipft.learn.memory.host_memory", lambda: 2e5)
    plain = choose_micro_batch(asked(tmp_path), tmp_path, ONE, clip, towers(clip))
    again = replace(asked(tmp_path), model=ModelConfig(name=clip.name, pretrained=None, grad_checkpointing=True))
    other = load_model(again.model, seed=0)
    assert 1 <= plain < 8 and choose_micro_batch(again, tmp_path, ONE, other, towers(other)) == plain
    assert other.model.visual.transformer.grad_checkpointing and other.model.transformer.grad_checkpointing


def test_a_device_without_room_for_a_pair_is_named(clip, tmp_path, monkeypatch):
    monkeypatch.setattr("clipft.learn.memory.host_memory", lambda: 10.0)
    with pytest.raises(RunFailed, match="cpu has no memory for one pair"):
        choose_micro_batch(asked(tmp_path), tmp_path, ONE, clip, towers(clip))


def chosen(config: Config, folder: Path, clip: Clip) -> int:
    capacity.tried = lambda share, *_: share - rank()
    return choose_micro_batch(config, folder, Ranks(torch.device("cpu"), rank(), 2, 2, "32-true"), clip, towers(clip))


def test_all_ranks_take_the_least_that_one_of_them_found(clip, tmp_path):
    assert on_ranks(2, tmp_path, chosen, asked(tmp_path), tmp_path, clip) == [3, 3]


def test_after_running_out_of_memory_the_next_start_takes_half(clip, tmp_path):
    error, config = torch.OutOfMemoryError("CUDA out of memory"), asked(tmp_path)
    advice = out_of_memory(error, config, tmp_path, ONE, 6)
    assert advice is not None and "6 pairs at a time" in str(advice) and "with 3 at a time" in str(advice)
    assert choose_micro_batch(config, tmp_path, ONE, clip, towers(clip)) == 3
    explicit = out_of_memory(error, asked(tmp_path, micro_batch=6), tmp_path, ONE, 6)
    assert "Use train.micro_batch=3" in str(explicit)
    assert out_of_memory(ValueError("else"), config, tmp_path, ONE, 6) is None


def test_a_damaged_memory_of_the_last_start_is_ignored(clip, tmp_path):
    remember(tmp_path, place(asked(tmp_path), ONE), 5)
    assert json.loads((tmp_path / "micro_batch.json").read_text())["micro_batch"] == 5
    (tmp_path / "micro_batch.json").write_text("{")
    assert choose_micro_batch(asked(tmp_path), tmp_path, ONE, clip, towers(clip)) == 8


class Numbers(Dataset):
    def __getitem__(self, number: int) -> int:
        return number


@pytest.mark.parametrize(
    ("cores", "local_world", "expected"), [(16, 1, 15), (16, 2, 7), (128, 8, 15), (64, 1, 16), (1, 1, 0)]
)
def test_loader_processes_and_the_batches_ahead_follow_from_the_cores(clip, monkeypatch, cores, local_world, expected):
    monkeypatch.setattr("clipft.ranks.job_cores", lambda: cores)
    here = Ranks(torch.device("cpu"), 0, local_world, local_world, "32-true")
    assert num_workers(None, here, clip, 8, 2) == expected and num_workers(3, here, clip, 8, 2) == 3
    several = min(expected, 1)  # torch warns of more than there are cores
    loader = in_order(Numbers(), SequentialSampler([0]), InFlight(several), str, Wait(), several, pin=False)
    assert loader.prefetch_factor == (PREFETCH if expected else None)


@pytest.mark.parametrize(("local_world", "expected"), [(1, 5), (2, 2), (8, 1)])
def test_loader_processes_are_fewer_where_their_batches_would_fill_the_memory(clip, monkeypatch, local_world, expected):
    """Each holds two batches that are ready and one that it makes; a quarter of the memory is theirs."""
    monkeypatch.setattr("clipft.ranks.job_cores", lambda: 128)
    images = 1000 * 3 * 16 * 16
    monkeypatch.setattr("clipft.capacity.host_memory", lambda: 4 * 5.5 * 3 * images)
    ranks = Ranks(torch.device("cpu"), 0, 8, local_world, "32-true")
    assert num_workers(None, ranks, clip, 1000, 250) == expected
    assert num_workers(None, ranks, clip, 8, 250) == expected  # measured as floats, of four bytes each


def test_a_disk_without_room_for_a_state_is_refused_and_a_tight_one_named(clip, tmp_path, monkeypatch):
    disk, config = namedtuple("disk", "total used free"), asked(tmp_path)
    size = state_bytes(config, clip)
    parameters = sum(parameter.numel() for parameter in clip.model.parameters())
    buffers = sum(value.numel() for value in clip.model.state_dict().values()) - parameters
    assert size == 4 * (3 * parameters + buffers)
    for free, num_there, notes in ((10 * size, 0, 0), (3 * size, 0, 1), (3 * size, 2, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: disk(0, 0, free))
        assert len(check_disk(config, tmp_path, clip, num_there=num_there)) == notes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(0, 0, size))
    with pytest.raises(ValueError, match=r"runs_dir: .* one saved state needs"):
        check_disk(config, tmp_path, clip, num_there=0)


def test_a_frozen_tower_leaves_room_in_memory_and_in_states(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "model")
    clip = load_model(ModelConfig(name=str(folder), pretrained=None), seed=0)
    config, whole = asked(tmp_path), state_bytes(asked(tmp_path), clip)
    monkeypatch.setattr("clipft.learn.memory.host_memory", lambda: 2e5)
    fits = choose_micro_batch(config, tmp_path / "model", ONE, clip, towers(clip))
    clip.model.visual.requires_grad_(False)
    image = sum(parameter.numel() for parameter in clip.model.visual.parameters())
    assert state_bytes(config, clip) == whole - 4 * 2 * image
    locked = replace(towers(clip), image=replace(towers(clip).image, trained=False))
    assert choose_micro_batch(config, tmp_path, ONE, clip, locked) > fits
    lion = replace(config, optim=OptimConfig(name="lion"))
    text = sum(parameter.numel() for parameter in clip.model.parameters()) - image
    assert state_bytes(config, clip) - state_bytes(lion, clip) == 4 * text
    clip.model.requires_grad_(False)
    (tmp_path / "runs").mkdir()
    nothing = Towers(replace(locked.image), replace(locked.text, trained=False))
    assert choose_micro_batch(config, tmp_path / "runs", ONE, clip, nothing) == 8
