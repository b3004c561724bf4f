"""Runs whose locked towers are encoded once: what they leave, and what is found again, made again or refused."""

import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from small import RESNET_CFG, make_config, make_data, make_model, outcome, train_here
from test_run import in_child, on_rank, saved, train_and_die

from clipft import frozen, run
from clipft.config import Config
from clipft.data import kept as kept_module
from clipft.data.kept import Kept
from clipft.data.sample import BadSample
from clipft.learn.metrics_file import read_rows
from clipft.learn.stop import StopRequest
from clipft.plan import resolve
from clipft.ranks import Ranks
from clipft.rundir import read_results, settle

pytestmark = pytest.mark.process

LIT = "tune.rules=[{match: image, lr_mult: 0}, {match: '*'}]"
TIL = "tune.rules=[{match: text, lr_mult: 0}, {match: '*'}]"  # the text tower locked
SCALE = "tune.rules=[{match: scale}, {match: '*', lr_mult: 0}]"
PLAIN, KEEP = "data.augment=none", "train.cache_features=true"
ALIKE = "eval.batch_size=8"  # as many at a time as in a step


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 40 training images 3 are cut off."""
    folder = tmp_path_factory.mktemp("world")
    make_model(folder / "model")
    make_data(folder / "data", damaged=3)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of features; four parts of ten rows for 40 images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_module, "PART_ROWS", 10)
    return tmp_path / "cache" / "clipft" / "features"


def config_of(root: Path, name: str, *overrides: str) -> Config:
    allowed = ("data.max_bad_frac=0.2", "train.max_steps=12", "eval.every=5", "optim.eps=1e-6")
    return make_config(root, f"name={name}", *allowed, *overrides)


def parts_in(cache: Path) -> dict[str, int]:
    """Parts of all features, with the time at which they were written."""
    return {str(path.relative_to(cache)): path.stat().st_mtime_ns for path in cache.rglob("0*")}


def losses(path: Path) -> list[float]:
    return [float(row["train/loss"]) for row in read_rows(path / "metrics.csv")]


def distance(path: Path, other: Path) -> float:
    """Of the last weights, relative to their norm."""
    one, two = (torch.cat([v.flatten() for v in saved(each)["state_dict"].values()]) for each in (path, other))
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("positives", ["caption", "image"])
def test_a_run_with_kept_image_features_is_bit_by_bit_that_without_where_as_many_are_encoded_at_a_time(
    root, cache, positives
):
    """Samples that cannot be used included: the ledger names the same ones for the same reasons."""
    same = (LIT, PLAIN, ALIKE, f"loss.positives={positives}")
    _, plain = train_here(config_of(root, f"plain-{positives}", *same))
    assert not cache.exists()
    _, kept = train_here(config_of(root, f"kept-{positives}", *same, KEEP))
    assert outcome(kept) == outcome(plain)
    ledger = read_results(kept)["meta"]["ledger"]
    assert ledger == read_results(plain)["meta"]["ledger"] and ledger["dropped"]["image_truncated"] > 3
    assert len(parts_in(cache)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("rules, captions", [(LIT, "one"), (TIL, "one"), (TIL, "all"), (SCALE, "one")])
def test_otherwise_it_is_that_run_up_to_rounding(root, cache, rules, captions):
    """Batches of another size sum in another order, and captions are cut to the longest of another batch."""
    name = f"{rules[20]}-{captions}"
    same = (rules, PLAIN, f"data.captions={captions}", f"data.workers={int(captions == 'all')}")
    _, plain = train_here(config_of(root, f"plainly-{name}", *same))
    _, kept = train_here(config_of(root, f"keeping-{name}", *same, KEEP))
    assert losses(kept) == pytest.approx(losses(plain), rel=1e-5)
    assert distance(kept, plain) < 1e-6
    assert read_results(kept)["meta"]["ledger"] == read_results(plain)["meta"]["ledger"]
    images, texts = 4, 8
    assert len(parts_in(cache)) == {LIT: images, TIL: texts, SCALE: images + texts}[rules]


@pytest.mark.slow
def test_nothing_is_decoded_or_encoded_twice(root, cache, monkeypatch):
    """Of a tower that is locked, in epochs and in the next run; what is measured is another matter."""
    seen: list[int] = []
    encode = frozen.image_features
    monkeypatch.setattr(frozen, "image_features", lambda clip, pixels: seen.append(len(pixels)) or encode(clip, pixels))
    monkeypatch.setattr("clipft.fit.image_features", None)  # of the steps
    given = (LIT, PLAIN, KEEP, "train.micro_batch=8")  # else it would be tried
    config = config_of(root, "once", *given, "train.max_steps=15")
    assert train_here(config)[0] == 0
    made = parts_in(cache)
    assert seen == [10] * 4 and len(made) == 4
    for name, other in (("lower", "optim.lr=1e-4"), ("seeded", "train.seed=1"), ("larger", "train.batch_size=10")):
        assert train_here(config_of(root, name, *given, other))[0] == 0
    assert seen == [10] * 4 and parts_in(cache) == made


@pytest.mark.slow
def test_features_of_other_weights_data_pixels_or_precision_are_others(root, cache, tmp_path):
    def folders(*overrides: str, at: Path = root) -> set[str]:
        short = ("train.max_steps=1", "eval.base=false", "eval.every=9")
        path = train_here(config_of(at, "other", LIT, PLAIN, KEEP, *short, "resume=restart", *overrides))[1]
        shutil.rmtree(path)
        return {name.split("/")[0] for name in parts_in(cache)}

    known = folders()
    assert len(known) == 1 and folders() == known
    other = tmp_path / "model"
    shutil.copytree(root / "model", other)
    weights = load_file(other / "open_clip_model.safetensors")
    text = weights | {"text_projection": weights["text_projection"] + 1}
    save_file(text, other / "open_clip_model.safetensors")
    assert folders(f"model.name={other}") == known, "the text tower's weights do not matter"
    save_file(weights | {"visual.proj": weights["visual.proj"] + 1}, other / "open_clip_model.safetensors")
    data = shutil.copytree(root / "data" / "packed", tmp_path / "packed")
    changes: list[tuple[str, ...]] = [
        (f"model.name={other}",),
        ("model.image_size=24",),
        ("data.max_pixels=1000",),
        ("trainer.precision=bf16-mixed",),
        ("eval.batch_size=9",),
        (f"data.train={root}/data/packed/train-00001.tar", f"data.val={root}/data/packed/val-00000.tar"),
    ]
    for change in changes:
        now = folders(*change)
        assert len(now) == len(known) + 1, change
        known = now
    assert folders(f"data.path={data}") == known, "a copy with its times is the same"
    (data / "train-00000.tar").touch()
    assert len(folders(f"data.path={data}")) == len(known) + 1


@pytest.mark.slow
def test_kept_features_are_those_that_each_image_has_alone(root, cache, monkeypatch):
    """A tower with BatchNorm: its statistics are those that it has, and not those of the batch."""
    world = root / "resnet"
    make_model(world / "model", RESNET_CFG)
    jobs = []
    make = run.make_features
    monkeypatch.setattr(run, "make_features", lambda job, stop: jobs.append(job) or make(job, stop))
    train_here(config_of(world, "alone", LIT, PLAIN, KEEP, f"data.path={root}/data/packed", "train.max_steps=1"))
    (job,) = jobs
    kept, clip = job.kept["image"], job.measure.clip
    loaded = torch.load(world / "runs" / "alone" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    clip.model.load_state_dict(loaded)
    clip.model.eval()
    found = 0
    for i in range(len(kept.units)):
        try:
            pixels = frozen.images_of(kept.units, job.augment, 10**6).load(kept.units, i)
        except BadSample:
            continue
        with torch.no_grad():
            alone = frozen.image_features(clip, pixels[None])[0]
        torch.testing.assert_close(torch.from_numpy(kept.feature(i, 0).copy()), alone, rtol=0, atol=1e-6)
        found += 1
    assert found == 37


@pytest.mark.slow
def test_two_ranks_share_the_work_and_train_the_model_of_one(root, cache, tmp_path):
    same = (LIT, PLAIN, KEEP)
    _, one = train_here(config_of(root, "alone", *same))
    first = {name: (cache / name).read_bytes() for name in parts_in(cache)}
    shutil.rmtree(cache)
    two = resolve(config_of(root, "together", *same, "trainer.devices=2", "train.micro_batch=3"))
    settle(two)
    assert on_ranks(2, tmp_path, writing_ranks, two, str(tmp_path)) == [0, 0]
    assert {name: (cache / name).read_bytes() for name in parts_in(cache)} == first
    wrote = [(tmp_path / f"wrote-{rank}").read_text().split() for rank in (0, 1)]
    assert wrote == [["0", "2"], ["1", "3"]]
    assert distance(one.with_name("together"), one) < 1e-5
    assert read_results(one.with_name("together"))["meta"]["ledger"] == read_results(one)["meta"]["ledger"]


def writing_ranks(config: Config, notes: str) -> int:
    """Trains on this rank, which notes the parts that it writes."""
    write = Kept.write

    def noted(self, part, reasons, features):
        with open(f"{notes}/wrote-{torch.distributed.get_rank()}", "a") as file:
            file.write(f"{part} ")
        write(self, part, reasons, features)

    Kept.write = noted
    return on_rank(config)


@pytest.mark.slow
def test_ranks_on_machines_without_a_common_disk_have_all_features_each(root, tmp_path):
    config = resolve(config_of(root, "apart", LIT, PLAIN, KEEP, "trainer.devices=2", "train.max_steps=6"))
    settle(config)
    assert on_ranks(2, tmp_path, on_a_machine_of_its_own, config, str(tmp_path)) == [0, 0]
    found = [list((tmp_path / f"machine-{rank}").rglob("clipft/features/*/0*")) for rank in (0, 1)]
    assert [len(each) for each in found] == [4, 4]


def on_a_machine_of_its_own(config: Config, folder: str) -> int:
    rank = torch.distributed.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ["XDG_CACHE_HOME"] = f"{folder}/machine-{rank}"
    ranks = Ranks(torch.device("cpu"), rank, 2, 1, "32-true")
    return run.train(config, Path(config.runs_dir) / str(config.name), ranks, StopRequest())


def at_part(number: int, do: Callable[[], None]) -> None:
    """Does it when that part is about to be written, in this process."""
    write = Kept.write

    def then(self, part, reasons, features):
        if part == number:
            do()
        write(self, part, reasons, features)

    Kept.write = then


def train_until_part(config: Config, number: int, sign: int) -> int:
    at_part(number, lambda: os.kill(os.getpid(), sign))
    return train_here(config)[0]


@pytest.mark.slow
@pytest.mark.parametrize("sign, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_ends_while_features_are_made_goes_on_with_those_that_are_missing(root, cache, sign, code):
    config = config_of(root, f"ended-{sign}", LIT, PLAIN, KEEP)
    assert in_child(lambda: train_until_part(config, 2, sign)) == code
    made = parts_in(cache)
    assert len(made) == 2 and not list(cache.rglob(".*.tmp"))
    for step in (1, 7):
        assert in_child(lambda step=step: train_and_die(config, step, signal.SIGKILL)) == -signal.SIGKILL
    assert in_child(lambda: train_here(config)[0]) == 0
    after = parts_in(cache)
    assert len(after) == 4 and made.items() <= after.items()
    _, calm = train_here(config_of(root, f"calm-{sign}", LIT, PLAIN, KEEP))
    assert outcome(calm.with_name(str(config.name))) == outcome(calm)
    assert parts_in(cache) == after


@pytest.mark.slow
def test_time_that_is_over_while_features_are_made_ends_the_run_before_its_first_step(root, cache):
    config = config_of(root, "late", LIT, PLAIN, KEEP, "train.max_time=0.001s")
    assert in_child(lambda: train_here(config)[0]) == 143
    assert len(parts_in(cache)) == 1
    assert not (Path(config.runs_dir) / "late" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_two_runs_that_make_the_same_features_at_once_do_not_meet(root, cache):
    configs = [config_of(root, f"at-once-{number}", LIT, PLAIN, KEEP) for number in (0, 1)]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda config: in_child(lambda: train_here(config)[0]), configs)) == [0, 0]
    first, second = (root / "runs" / f"at-once-{number}" for number in (0, 1))
    assert outcome(first) == outcome(second)
    assert len(parts_in(cache)) == 4 and not list(cache.rglob(".*.tmp"))


@pytest.mark.slow
def test_a_damaged_part_is_made_again(root, cache):
    config = config_of(root, "sound", LIT, PLAIN, KEEP)
    _, sound = train_here(config)
    name = sorted(parts_in(cache))[1]
    raw = (cache / name).read_bytes()
    (cache / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    _, again = train_here(replace(config, name="damaged"))
    assert (cache / name).read_bytes() == raw and outcome(again) == outcome(sound)


def refused(root: Path, message: str, *overrides: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_here(config_of(root, "refused", KEEP, "resume=restart", *overrides))


def test_what_cannot_be_kept_is_refused_with_the_reason(root, cache, monkeypatch):
    refused(root, r"train\.cache_features=true would be ignored: no rule of tune\.rules freezes anything", PLAIN)
    last = "tune.rules=[{match: image.embed, lr_mult: 0}, {match: '*'}]"
    refused(root, r"would be ignored: tune\.rules trains something of both towers.*tune=lit", PLAIN, last)
    refused(root, r"sees other pixels each epoch: data\.augment=light with crop_min=0\.9.*data\.augment=none", LIT)
    refused(
        root, r"other pixels each epoch: data\.augment=none with .*flip_prob=0\.5", LIT, PLAIN, "data.flip_prob=0.5"
    )
    refused(root, r"trainer\.precision=64-true wants more", LIT, PLAIN, "trainer.precision=64-true")
    usage = namedtuple("usage", "total used free")(100, 0, 100)
    with monkeypatch.context() as full:
        full.setattr(frozen.shutil, "disk_usage", lambda _: usage)
        full.setattr("clipft.capacity.check_disk", lambda *_: [])
        full.setattr(run, "check_disk", lambda *_: [])
        refused(root, r"has 0\.0 MB of room and the features need 0\.0 MB.*XDG_CACHE_HOME", LIT, PLAIN)
    assert not parts_in(cache)


@pytest.mark.slow
def test_augmentation_of_images_does_not_matter_to_a_locked_text_tower(root, cache):
    same = (TIL, "data.augment=strong")
    _, plain = train_here(config_of(root, "strong", *same))
    _, kept = train_here(config_of(root, "strong-kept", *same, KEEP))
    assert losses(kept) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.slow
def test_a_run_may_keep_features_from_the_middle_on_but_not_those_of_other_weights(root, cache, tmp_path):
    config = config_of(root, "later", LIT, PLAIN, ALIKE)
    _, calm = train_here(replace(config, name="never"))
    assert in_child(lambda: train_and_die(config, 6, signal.SIGKILL)) == -signal.SIGKILL
    keeping = replace(config, train=replace(config.train, cache_features=True))
    other = tmp_path / "model"
    shutil.copytree(root / "model", other)
    weights = load_file(other / "open_clip_model.safetensors")
    save_file(weights | {"visual.proj": weights["visual.proj"] + 1}, other / "open_clip_model.safetensors")
    forced = replace(keeping, resume="force", model=replace(config.model, name=str(other)))
    with pytest.raises(ValueError, match=r"visual\.proj of the locked image tower is another one in .*step-"):
        train_here(forced)
    assert in_child(lambda: train_here(replace(keeping, resume="force"))[0]) == 0  # the model is back
    assert outcome(calm.with_name("later")) == outcome(calm)


def test_the_plan_says_what_is_made_and_what_was_found(root, cache, capsys):
    made, found = "40 of 40 images (0.0 MB) are made before the first step, in", "40 images are in"
    for name, said in (("said", made), ("known", found)):
        train_here(config_of(root, name, LIT, PLAIN, KEEP, "train.max_steps=1"))
        assert f"the image tower is locked: features of {said} {cache}" in capsys.readouterr().out
