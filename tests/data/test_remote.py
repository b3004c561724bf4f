"""Data sets at addresses: found, indexed and read as if they lay here."""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from flaky import Fail, Site, site
from fsspec.implementations.local import LocalFileSystem
from ranks import on_ranks
from shards import list_shards, pairs, write_shards, write_tar

from clipft.cli import main
from clipft.config import DataConfig
from clipft.data.augment import Augment
from clipft.data.check.items import items_of_data
from clipft.data.index import Samples, index_places, index_shards, load_index, parse_index
from clipft.data.lanes import Lanes
from clipft.data.loader import train_loader
from clipft.data.order import Order, Shuffle
from clipft.data.pairs import Units, build_units
from clipft.data.remote.addresses import ALLOW_PIPE
from clipft.data.remote.ahead import Ahead, most_at_once, needed
from clipft.data.remote.cache import DownloadFailed
from clipft.data.remote.indexes import learn
from clipft.data.remote.listing import remote_of
from clipft.data.sides import images_of, side_batches, texts_of
from clipft.data.split import expand_shards, find_shards, load_splits
from clipft.data.waiting import Wait
from clipft.report import RunFailed


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv(ALLOW_PIPE, raising=False)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "www").mkdir()
    with site(tmp_path / "www") as here:
        yield here


def packed(folder: Path) -> Path:
    """A set as packing leaves it: shards, indexes beside them, shards.json, class names."""
    train = [Path(path) for path in write_shards(folder, 6, 4, prefix="train-")]
    others = {"val": [Path(write_tar(folder / "val-000.tar", pairs(10, 3)))]}
    others["test"] = [Path(write_tar(folder / "test-000.tar", pairs(13, 2)))]
    list_shards(folder, {"train": train, **others})
    (folder / "classnames.txt").write_text("blue tit\nwren\n")
    return folder


def foreign(folder: Path, *counts: int) -> list[str]:
    """Shards alone, and the same again at a place where their indexes may lie."""
    return write_shards(folder, *counts, prefix="x-")


def keys(samples: Samples | None) -> list[str]:
    assert samples is not None
    return [samples.key(i) for i in range(len(samples))]


def content(samples: Samples | None) -> list[dict[str, bytes]]:
    assert samples is not None
    return [samples.read(i) for i in range(len(samples))]


def tars(web: Site) -> list[str]:
    return [path for path, _ in web.asked if path.endswith(".tar")]


def test_a_packed_folder_at_an_address_is_the_same_data_set(web: Site):
    here = packed(web.folder / "birds")
    local, away = load_splits(DataConfig(path=str(here))), load_splits(DataConfig(path=f"{web.url}/birds"))
    assert tars(web) == [], "the indexes beside the shards say all"
    assert away.name == "birds" and away.classnames == ["blue tit", "wren"]
    size = sum(path.stat().st_size for path in here.glob("*.tar")) / 1e6
    assert len(away.notes) == 1 and away.notes[0].startswith(f"4 shards of {size:,.1f} MB lie elsewhere and come by")
    for split in ("train", "val", "test"):
        one, two = getattr(local, split), getattr(away, split)
        assert keys(one) == keys(two) and one.fingerprint == two.fingerprint
        assert content(one) == content(two)
    assert sorted(tars(web)) == [f"/birds/{name}.tar" for name in ("test-000", "train-000", "train-001", "val-000")]


def test_what_is_known_is_not_asked_again(web: Site):
    packed(web.folder / "birds")
    load_splits(DataConfig(path=f"{web.url}/birds/"))
    web.asked.clear()
    load_splits(DataConfig(path=f"{web.url}/birds/"))
    assert [path for path, _ in web.asked if "index" in path or "tar" in path] == []


def test_shards_that_are_named_get_their_checksums_from_the_list_in_their_folder(web: Site):
    packed(web.folder / "birds")
    pattern = f"{web.url}/birds/train-{{000..001}}.tar"
    splits = load_splits(DataConfig(train=pattern, val=f"{web.url}/birds/val-000.tar"))
    assert splits.train is not None and splits.train.remote is not None and splits.name == "birds"
    assert all(shard.sha256 and shard.samples for shard in splits.train.remote.shards.values())
    web.always["/birds/train-001.tar"] = Fail(body=(web.folder / "birds/train-001.tar").read_bytes()[:-1] + b"x")
    with pytest.raises(DownloadFailed, match=rf"{web.url}/birds/train-001\.tar cannot be read: .*sha256"):
        content(splits.train)


def test_a_list_with_another_number_of_samples_than_an_index_is_refused(web: Site):
    here = packed(web.folder / "birds")
    listed = json.loads((here / "shards.json").read_text())
    listed["splits"]["train"]["shards"][0]["samples"] = 7
    (here / "shards.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=rf"{web.url}/birds/train-000\.tar holds 6 usable samples; .* lists it with 7"):
        load_splits(DataConfig(path=f"{web.url}/birds"))


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/x.tar", "a/../../x.tar"])
def test_a_list_that_leads_out_of_its_folder_is_refused(web: Site, name: str):
    here = packed(web.folder / "birds")
    listed = json.loads((here / "shards.json").read_text())
    listed["splits"]["train"]["shards"][0]["name"] = name
    (here / "shards.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"shards\.json lists a shard outside of its folder"):
        find_shards(DataConfig(path=f"{web.url}/birds"))


def test_a_foreign_shard_is_read_whole_once_and_that_is_announced(web: Site, capsys: pytest.CaptureFixture):
    [path] = foreign(web.folder / "set", 30)
    size = os.path.getsize(path)
    splits = load_splits(DataConfig(train=f"{web.url}/set/x-000.tar"))
    said = capsys.readouterr().err
    assert f"1 shard ({size / 1e6:,.1f} MB) without index, the first is {web.url}/set/x-000.tar: read whole" in said
    load_splits(DataConfig(train=f"{web.url}/set/x-000.tar"))
    assert capsys.readouterr().err == ""
    assert tars(web).count("/set/x-000.tar") == 2, "one question for the size, one read"
    assert splits.train is not None and splits.val is not None and len(splits.train) + len(splits.val) == 30
    both = content(splits.train) + content(splits.val)
    assert sorted(map(str, both)) == sorted(map(str, content(index_shards([path]))))


def test_an_index_of_other_bytes_beside_a_shard_never_makes_wrong_pairs(web: Site):
    [path] = foreign(web.folder / "set", 30)
    stored = load_index(path)
    write_tar(Path(path), pairs(500, 30))
    assert os.path.getsize(path) == stored.size and index_places(path)[0].is_file()
    splits = load_splits(DataConfig(train=f"{web.url}/set/x-000.tar"))
    with pytest.raises(DownloadFailed, match=r"not those that its index was made of\. .*clipft data index"):
        content(splits.train)


@pytest.mark.parametrize("text", ["{", '{"sha256": 1}', "[]", "\x00", '{"sha256": "x", "keys": {}}'])
def test_an_index_that_makes_no_sense_is_left_and_the_shard_read(web: Site, text: str):
    [path] = foreign(web.folder / "set", 30)
    Path(path + ".index.json").write_text(text)
    assert len(keys(load_splits(DataConfig(train=f"{web.url}/set/x-000.tar", val_frac=0.5)).train)) == 15


def test_a_damaged_foreign_shard_is_named_with_its_byte_and_leaves_nothing(web: Site):
    [path] = foreign(web.folder / "set", 30)
    with open(path, "r+b") as file:
        file.truncate(700)
    with pytest.raises(
        ValueError, match=rf"{web.url}/set/x-000\.tar cannot be read: the data of .*byte 512 of 700.*write it"
    ):
        load_splits(DataConfig(train=f"{web.url}/set/x-000.tar"))


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("set", r"there is no shards\.json, and http has no other list"),
        ("set/*.tar", "http has no list of files. Name them"),
        ("set/x-{0..1}{.tar", "unbalanced braces"),
        ("set/x-{000,000}.tar", "more than once"),
        ("set/x-001.tar", r"http://\S*/set/x-001\.tar cannot be read: HTTP 404"),
    ],
)
def test_an_address_that_stands_for_nothing_is_refused_with_what_to_do(web: Site, pattern: str, says: str):
    foreign(web.folder / "set", 30)
    with pytest.raises(ValueError, match=says):
        load_splits(DataConfig(train=f"{web.url}/{pattern}"))


@pytest.mark.process
def test_data_index_goes_on_after_it_was_cut_off_and_sees_what_changed(web: Site, capsys, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    shards = foreign(web.folder / "set", 3, 4, 5)
    os.rename(shards[2], shards[2] + ".late")
    command = ["data", "index", f"data.train={web.url}/set/x-{{000..002}}.tar"]
    assert main(command) == 2
    assert f"{web.url}/set/x-002.tar cannot be read: HTTP 404" in capsys.readouterr().err
    os.rename(shards[2] + ".late", shards[2])
    web.fails["/set/x-002.tar"] = [Fail(), Fail(status=404)]  # there when it is asked for, and gone when it is read
    assert main([*command, "data.workers=1"]) == 2
    assert f"{web.url}/set/x-002.tar cannot be read: HTTP 404" in capsys.readouterr().err
    assert main(command) == 0
    out = capsys.readouterr()
    assert "set: 3 shards indexed, 1 read whole for it" in out.out and "12" in out.out
    assert "1 shard (" in out.err
    write_tar(Path(shards[1]), pairs(90, 4))
    assert main(command) == 0
    assert "3 shards indexed, 1 read whole for it" in capsys.readouterr().out


def test_data_index_of_local_shards_writes_their_indexes(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [path] = foreign(tmp_path / "set", 30)
    assert main(["data", "index", f"data={tmp_path}/set"]) == 0
    assert index_places(path)[0].is_file() and "30" in capsys.readouterr().out


def test_data_index_parses_each_stored_index_once(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed(tmp_path / "set")
    command, parsed = ["data", "index", f"data={tmp_path}/set", "data.workers=0"], []
    assert main(command) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("clipft.data.index.parse_index", lambda text: parsed.append(text) or parse_index(text))
    assert main(command) == 0
    assert len(parsed) == 4 and capsys.readouterr().out == first


def test_verify_and_check_say_that_they_read_local_shards(web: Site, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed(web.folder / "birds")
    birds, val = f"{web.url}/birds", f"{web.url}/birds/val-000.tar"
    for option, data in ((f"data={birds}", DataConfig(path=birds)), (f"data.val={val}", DataConfig(val=val))):
        assert main(["data", "verify", option]) == 2
        assert f"data verify and data check read local shards, and {web.url}/birds/" in capsys.readouterr().err
        with pytest.raises(ValueError, match="data verify and data check read local shards"):
            items_of_data(data)
    assert tars(web) == []


AUGMENT = Augment(16, 0.9, 5.0, 0.5, "bicubic", "shortest", (0, 0, 0))


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([list(text.encode()[:20].ljust(20, b"\0")) for text in texts])


def batches(samples: Samples, lanes: int | None, workers: int, rank: int = 0, world: int = 1) -> list[Any]:
    """What this rank gets of two epochs."""
    units = build_units(samples, "one")
    order: Order = Shuffle(3, len(units), 8)
    if lanes:
        order = Lanes(3, tuple(units.per_shard().tolist()), 8, lanes, 1)
    loader = train_loader(
        units,
        augment=AUGMENT,
        tokenize=tokenize,
        max_pixels=10_000,
        positives="caption",
        group=None,
        text_errors="strict",
        seed=3,
        order=order,
        num_steps=2 * order.per_epoch,
        rank=rank,
        world=world,
        start_step=0,
        workers=workers,
        pin=False,
    )
    return [(batch.pixels, batch.tokens, batch.ids, batch.valid, batch.keys) for batch in loader]


def on_rank(config: DataConfig, lanes: int) -> list[Any]:
    import torch.distributed as dist

    samples = load_splits(config).train
    assert samples is not None
    return batches(samples, lanes, workers=2, rank=dist.get_rank(), world=dist.get_world_size())


def joined(parts: list[list[Any]]) -> list[Any]:
    """The global batches from those of the ranks."""
    return [
        [torch.cat([part[n] for part in step]).tolist() for n in range(4)] + [key for part in step for key in part[4]]
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_ranks_with_a_cache_smaller_than_the_set_get_the_batches_of_local_files(web: Site, tmp_path: Path):
    """Shards break off, answer 503 and lack ranges on the way."""
    folder = web.folder / "set"
    shards = [Path(path) for path in write_shards(folder, *[8] * 10, prefix="train-")]
    list_shards(folder, {"train": shards, "val": [Path(write_tar(folder / "val-0.tar", pairs(900, 2)))]})
    local = load_splits(DataConfig(path=str(folder))).train
    size, whole = shards[0].stat().st_size, sum(path.stat().st_size for path in shards)
    web.fails["/set/train-003.tar"] = [Fail(cut=5000)]
    web.fails["/set/train-004.tar"] = [Fail(cut=5000, length=False)]
    web.fails["/set/train-005.tar"] = [Fail(status=503, headers={"Retry-After": "0"})]
    away = DataConfig(path=f"{web.url}/set", cache_dir=str(tmp_path / "cache"), cache_size=6 * size)
    assert local is not None and whole > 6 * size
    expected = joined([batches(local, lanes=2, workers=0)])
    assert joined(on_ranks(2, tmp_path, on_rank, away, 2)) == expected
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.tar"))
    assert 0 < kept <= 6 * size


def test_every_pair_of_a_remote_set_is_counted_after_that_was_announced(web: Site, capsys):
    here = packed(web.folder / "birds")
    one, two = load_splits(DataConfig(path=str(here))).train, load_splits(DataConfig(path=f"{web.url}/birds")).train
    assert one is not None and two is not None
    assert len(build_units(one, "all")) == len(build_units(two, "all")) == 20
    assert "every shard is read once to count its captions" in capsys.readouterr().err


def test_without_processes_the_batches_are_those_of_local_files_too(web: Site):
    here = packed(web.folder / "birds")
    one, two = load_splits(DataConfig(path=str(here))).train, load_splits(DataConfig(path=f"{web.url}/birds")).train
    assert one is not None and two is not None
    assert joined([batches(one, None, 0)]) == joined([batches(two, None, 0)])


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_shard_that_is_gone_in_the_middle_ends_the_run_with_its_address(web: Site):
    here = packed(web.folder / "birds")
    samples = load_splits(DataConfig(path=f"{web.url}/birds")).train
    (here / "train-001.tar").unlink()
    assert samples is not None
    for workers in (0, 1):
        with pytest.raises(RunFailed) as error:
            batches(samples, None, workers)
        assert str(error.value).startswith(f"{web.url}/birds/train-001.tar cannot be read: HTTP 404")


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("what", ["images", "texts"])
def test_a_slow_download_is_progress_where_one_side_of_the_pairs_is_read(web: Site, what: str):
    packed(web.folder / "birds")
    samples = load_splits(DataConfig(path=f"{web.url}/birds")).val
    assert samples is not None
    web.always["/birds/val-000.tar"] = Fail(slow_s=3e-4)  # 10 KB in 3 s and more
    images, pairs_of = Units(samples, None), Units(samples, np.arange(1, 4))
    side = images_of(images, AUGMENT, 10_000) if what == "images" else texts_of(pairs_of, tokenize, "strict")
    began_s = time.monotonic()
    [(inputs, reasons)] = side_batches(side, [range(3)], 3, 1, Wait(limit_s=1.5))
    assert len(inputs) == 3 and reasons == ["", "", ""]
    assert time.monotonic() - began_s > 3


def test_shards_come_in_the_order_in_which_lanes_read_them_and_each_rank_brings_its_own():
    order = Lanes(0, (10,) * 12, batch_size=8, lanes=4, window_shards=1)
    for step in range(2 * order.per_epoch):
        epoch, units = order.batch(step)
        met = set((units // 10).tolist())
        own = [needed(order, step, 12, rank, 2)[0] for rank in (0, 1)]
        soon = needed(order, step, 12, 0, 1)[0]
        assert met <= set(soon) and set(soon) == set(own[0]) | set(own[1])
        assert set((units[:4] // 10).tolist()) <= set(own[0])
        number = order.window_of(step)[1]
        here = order.windows(int(epoch[0]))[number]
        assert soon[: len({n for lane in here for n in lane})] == list(dict.fromkeys(n for lane in here for n in lane))


def test_every_unit_lies_in_a_shard_of_its_lanes_window():
    order = Lanes(5, (30, 10, 25, 40, 7, 33, 20, 35), batch_size=16, lanes=4, window_shards=1)
    ends = [30, 40, 65, 105, 112, 145, 165, 200]
    for epoch in range(3):
        windows = order.windows(epoch)
        for place in range(order.per_epoch):
            units = order.batch(epoch * order.per_epoch + place)[1].reshape(4, 4)
            for lane, row in enumerate(units.tolist()):
                for n, unit in enumerate(row):
                    shard = next(i for i, end in enumerate(ends) if unit < end)
                    assert shard in windows[(place * 4 + n) // order.window][lane]


def test_what_is_needed_at_once_is_two_windows_of_lanes_and_everything_without_them():
    order = Lanes(0, (10,) * 12, batch_size=8, lanes=4, window_shards=1)
    assert most_at_once(order, [100] * 12, 2) == 800 and most_at_once(Shuffle(0, 120, 8), [100] * 12, 2) == 1200


def test_the_next_window_comes_ahead_and_never_in_place_of_this_one(web: Site, tmp_path: Path):
    folder = web.folder / "set"
    shards = [Path(path) for path in write_shards(folder, *[8] * 8, prefix="train-")]
    list_shards(folder, {"train": shards, "val": [Path(write_tar(folder / "val-0.tar", pairs(900, 2)))]})
    size = shards[0].stat().st_size
    config = DataConfig(path=f"{web.url}/set", cache_dir=str(tmp_path / "cache"), cache_size=3 * size)
    samples = load_splits(config).train
    assert samples is not None and samples.remote is not None
    order = Lanes(3, (8,) * 8, batch_size=8, lanes=2, window_shards=1)
    ahead = Ahead(samples.remote, samples.shards, order, 0, 1, step=0, grace_s=0.0)
    brought = []
    while ahead.bring_next():
        brought.append(tars(web)[-1])
    first, second = order.windows(0)[:2]
    wanted = [f"/set/train-{number:03d}.tar" for lane in [*first, *second] for number in lane]
    assert brought == wanted[:3], "there is room for three"
    ahead.step = order.per_epoch - 1
    assert ahead.bring_next(), "what the first windows held goes for the last ones"


def test_what_is_measured_again_and_again_stays_while_the_windows_come_and_go(web: Site, tmp_path: Path):
    folder = web.folder / "set"
    shards = [Path(path) for path in write_shards(folder, *[8] * 8, prefix="train-")]
    list_shards(folder, {"train": shards, "val": [Path(write_tar(folder / "val-0.tar", pairs(900, 2)))]})
    size = shards[0].stat().st_size
    splits = load_splits(DataConfig(path=f"{web.url}/set", cache_dir=str(tmp_path / "c"), cache_size=6 * size))
    assert splits.train is not None and splits.train.remote is not None
    content(splits.val)
    order = Lanes(3, (8,) * 8, batch_size=8, lanes=2, window_shards=1)
    ahead = Ahead(splits.train.remote, splits.train.shards, order, 0, 1, grace_s=0.0)
    for step in range(2 * order.per_epoch):
        ahead.step = step
        while ahead.bring_next():
            pass
    content(splits.val)
    assert len(tars(web)) > 8 and tars(web).count("/set/val-0.tar") == 1


PIPES = "data.train names a command .*add data.allow_pipe=true to the command line"


def test_commands_are_refused_unless_the_command_line_allows_them(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [path] = foreign(tmp_path / "set", 30)
    pipe = f"pipe:cat {path}"
    command = ["data", "index", f"data.train={pipe}"]
    assert main(command) == 2
    assert "add data.allow_pipe=true to the command line" in capsys.readouterr().err
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/mine.yaml").write_text(f"train: '{pipe}'\nallow_pipe: true\n")
    assert main(["data", "index", "data=mine"]) == 2
    assert "stands in a YAML file, where it is not heard" in capsys.readouterr().err
    with pytest.raises(ValueError, match=PIPES):
        find_shards(DataConfig(train=pipe, allow_pipe=True))
    assert main([*command, "data.allow_pipe=true"]) == 0
    assert "30" in capsys.readouterr().out
    assert main(command) == 2, "allowed once is not allowed for ever"


def test_a_commands_output_is_a_shard_and_its_words_reach_it_as_they_are(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(ALLOW_PIPE, "1")
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "$(touch made) `touch made`;touch made.tar"
    os.rename(foreign(tmp_path, 30)[0], odd)
    splits = load_splits(DataConfig(train=f"pipe:cat '{odd}'", val_frac=0.5, allow_pipe=True))
    assert keys(splits.train)[0].startswith("$(touch made) `touch made`;touch made/000")
    assert content(splits.train) and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("cat x.tar | gzip -d", r"has \|\. It is started without a shell"),
        ("cat x.tar > y", "has >"),
        ("", "has no program"),
        ("cat 'x.tar", "quote that is not closed"),
        ("/no/such/program x.tar", "/no/such/program cannot be started"),
    ],
)
def test_a_command_that_cannot_work_is_refused(monkeypatch, words: str, says: str):
    monkeypatch.setenv(ALLOW_PIPE, "1")
    with pytest.raises(ValueError, match=says):
        load_splits(DataConfig(train=f"pipe:{words}", allow_pipe=True))


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import sys; print('no token', file=sys.stderr); sys.exit(3)", r"ended with code 3 \(no token\)"),
        ("import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read()[:700])", "should run to byte"),
        ("import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read()); sys.exit(1)", "ended with code 1"),
        ("import time; time.sleep(60)", r"written nothing for 0\.5 s"),
    ],
)
def test_a_command_that_fails_stalls_or_ends_too_soon_gives_no_shard(tmp_path, monkeypatch, web: Site, program, says):
    monkeypatch.setenv(ALLOW_PIPE, "1")
    [path] = foreign(tmp_path / "set", 30)
    remote = remote_of(DataConfig(allow_pipe=True), web.patience(tries=2))
    script = tmp_path / "program.py"
    script.write_text(program)
    expand_shards("data.train", [f"pipe:{sys.executable} -S {script} {path}"], remote)
    with pytest.raises((RunFailed, ValueError), match=rf"pipe:python\S* \.\.\. x-000\.tar cannot be read: .*{says}"):
        learn(remote)
    assert not list(remote.cache.folder.glob("*/*.tar"))


class Bucket(LocalFileSystem):
    """An object store as its package would give it to fsspec: a folder, whose reads fail now and then."""

    protocol = "s3"
    root = ""
    failures: ClassVar[list[Exception]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return os.path.join(cls.root, path.removeprefix("s3://")).rstrip("/")

    def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> list[str]:
        found = super().glob(path, maxdepth, **kwargs)
        return [str(name).removeprefix(self.root + "/") for name in found]

    def open(self, path: str, *_: Any, **kwargs: Any) -> Any:
        return Reader(path, self.failures)


class Reader:
    def __init__(self, path: str, failures: list[Exception]):
        self.file, self.failures = open(path, "rb"), failures
        self.seek, self.close = self.file.seek, self.file.close

    def read(self, most: int) -> bytes:
        if self.failures and self.file.tell():
            raise self.failures.pop()
        return self.file.read(min(most, 4000))


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Path]:
    before = fsspec.registry.get("s3")
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.root, Bucket.failures = str(tmp_path), []
    yield tmp_path / "bucket"
    from fsspec.registry import _registry

    _registry.pop("s3")
    if before:
        fsspec.register_implementation("s3", before)


def test_an_object_store_is_read_by_way_of_fsspec_and_gone_on_with_where_it_breaks_off(bucket: Path, web: Site):
    here = packed(bucket / "birds")
    away = load_splits(DataConfig(path="s3://bucket/birds"))
    Bucket.failures = [OSError("signed address")]
    assert away.train is not None and away.train.remote is not None
    cache = replace(away.train.remote.cache, patience=web.patience())
    train = replace(away.train, remote=replace(away.train.remote, cache=cache))
    assert content(train) == content(load_splits(DataConfig(path=str(here))).train)
    assert web.sleeps == [1.0]


def test_an_object_store_lists_its_shards(bucket: Path):
    foreign(bucket / "set", 30)
    for name in ("train-10.tar", "train-2.tar", "val-0.tar"):
        load_index(write_tar(bucket / "named" / name, pairs(0, 3)))
    found = find_shards(DataConfig(path="s3://bucket/named"))
    names = {split: [os.path.basename(path) for path in paths] for split, paths in found.shards.items()}
    assert names == {"train": ["train-2.tar", "train-10.tar"], "val": ["val-0.tar"], "test": []}
    assert len(find_shards(DataConfig(train="s3://bucket/named/train-*.tar")).shards["train"]) == 2
    assert len(find_shards(DataConfig(train="s3://bucket/set/")).shards["train"]) == 1
    with pytest.raises(ValueError, match="folder with splits of its own"):
        find_shards(DataConfig(train="s3://bucket/named"))
    for pattern, says in (("none", "neither shards.json nor"), ("set/y-*.tar", "matches no shard")):
        with pytest.raises(ValueError, match=says):
            find_shards(DataConfig(train=f"s3://bucket/{pattern}"))
    with pytest.raises(ValueError, match=r"s3://bucket/set/x-001\.tar cannot be read: there is no such file"):
        load_splits(DataConfig(train="s3://bucket/set/x-001.tar"))
