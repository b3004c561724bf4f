import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from multiprocessing import active_children
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from shards import Members, jpeg, pairs, write_shards, write_tar
from torch import Tensor

import clipft.data.loader as loader_module
import clipft.data.waiting as waiting_module
from clipft.data.augment import Augment, apply_augment
from clipft.data.decode import decode_rgb
from clipft.data.index import Samples, index_shards
from clipft.data.loader import Batch, eval_images, train_loader
from clipft.data.order import Shuffle, permutation
from clipft.data.pairs import Units, build_units
from clipft.data.waiting import Wait, WaitingLoader, lost_worker, naming_lost_workers, state_of
from clipft.report import RunFailed

STRONG = Augment(16, 0.9, 5.0, 0.5, "bicubic", "shortest", (0, 0, 0))
PLAIN = replace(STRONG, crop_min=1.0, affine_degrees=0.0, flip_prob=0.0)


def tokenize(texts: list[str]) -> Tensor:
    """Bytes of the text, so that a test can read it back."""
    return torch.tensor([list(text.encode()[:20].ljust(20, b"\0")) for text in texts])


def text_of(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).rstrip(b"\0").decode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def batches(samples: Samples | Units, **changes: Any) -> Iterator[Batch]:
    return iter(loader_of(samples, **changes))


def loader_of(samples: Samples | Units, **changes: Any) -> WaitingLoader:
    units = samples if isinstance(samples, Units) else build_units(samples, "one")
    options: dict[str, Any] = {
        "augment": STRONG,
        "tokenize": tokenize,
        "max_pixels": 10_000,
        "positives": "caption",
        "group": None,
        "text_errors": "strict",
        "seed": 3,
        "batch_size": 7,
        "num_steps": 8,
        "rank": 0,
        "world": 1,
        "start_step": 0,
        "workers": 0,
        "pin": False,
    }
    options |= changes
    options["order"] = Shuffle(options["seed"], len(units), options.pop("batch_size"))
    return train_loader(units, **options)


def joined(parts: list[Batch]) -> tuple:
    """All that a global batch is, from the slices of its ranks in order."""
    names = ("pixels", "tokens", "valid", "ids")
    tensors = [torch.cat([getattr(part, name) for part in parts]).tolist() for name in names]
    return *tensors, [key for part in parts for key in part.keys]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return index_shards(write_shards(tmp_path_factory.mktemp("shards"), 18, 5))


@pytest.fixture(scope="module")
def undisturbed(samples: Samples) -> list[tuple]:
    return [joined([batch]) for batch in batches(samples)]


def uneven_members(first: int, count: int) -> Members:
    """Members of samples with one to three captions, of which some cannot be used."""
    members: Members = []
    for i in range(first, first + count):
        text = "" if i % 11 == 5 else "\n".join(f"{i} {number}" for number in range(1 + i % 3))
        members += [(f"{i:05d}.jpg", jpeg(i)[: 300 if i % 7 == 3 else None]), (f"{i:05d}.txt", text.encode())]
    return members


UNUSABLE = {f"{i:05d}" for i in range(40) if i % 11 == 5 or i % 7 == 3}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """A shard of 30 samples and one of 10."""
    folder = tmp_path_factory.mktemp("uneven")
    shards = [(f"{name}.tar", uneven_members(*part)) for name, part in (("a", (0, 30)), ("b", (30, 10)))]
    return index_shards([write_tar(folder / name, members) for name, members in shards])


def named(batch: Batch) -> dict[str, str]:
    """Reasons by key; where keys are unique."""
    return {batch.keys[row]: reason for row, reason in batch.bad.items()}


def split_up(batch: Batch, rows: int) -> Batch:
    """The batch put together again from its micro-batches."""
    pieces = batch.split(rows)
    tensors = {name: torch.cat([getattr(p, name) for p in pieces]) for name in ("pixels", "tokens", "valid", "ids")}
    bad = {n * rows + row: reason for n, piece in enumerate(pieces) for row, reason in piece.bad.items()}
    return Batch(**tensors, keys=[key for piece in pieces for key in piece.keys], bad=bad)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")  # on fewer cores than that
@pytest.mark.parametrize("captions", ["one", "all"])
def test_ranks_workers_and_micro_batches_do_not_change_the_global_batches(uneven: Samples, captions: str):
    units, options = build_units(uneven, captions), {"batch_size": 9, "num_steps": 18}
    expected = list(batches(units, **options))
    assert 18 * 9 > 2 * len(units) and not all(batch.valid.all() for batch in expected)
    for world in (1, 2, 3, 4):
        for workers in (0, 1, 2, 3):
            ranks = [batches(units, **options, rank=rank, world=world, workers=workers) for rank in range(world)]
            for whole, parts in zip(expected, zip(*ranks, strict=True), strict=True):
                parts = [split_up(part, 1 + workers) for part in parts]
                assert joined(list(parts)) == joined([whole])
                assert {key: why for part in parts for key, why in named(part).items()} == named(whole)


@pytest.mark.parametrize("case", range(36))
def test_over_ranks_and_restarts_the_keys_come_in_the_same_order(uneven: Samples, case: int):
    draw = random.Random(case)
    units = build_units(uneven, draw.choice(["one", "all"]))
    size = draw.randint(4, len(units) // 2)
    num_steps = 3 * (len(units) // size)
    starts = sorted({0, *(draw.randrange(num_steps) for _ in range(draw.randint(0, 3)))})
    found = []
    for start, stop in zip(starts, [*starts[1:], num_steps], strict=True):
        world = draw.randint(1, 4)
        options = {"batch_size": size, "start_step": start, "num_steps": stop, "seed": case, "augment": PLAIN}
        ranks = [batches(units, rank=rank, world=world, **options) for rank in range(world)]
        found += [key for parts in zip(*ranks, strict=True) for part in parts for key in part.keys]
    orders = [permutation(case, epoch, len(units)).tolist() for epoch in range(3)]
    assert found == [units.key(u) for order in orders for u in order[: len(order) // size * size]]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("captions", ["one", "all"])
def test_what_is_indexed_is_what_was_used_dropped_and_left_out(uneven: Samples, captions: str, world: int):
    units, size = build_units(uneven, captions), 12
    indexed = Counter(units.key(u) for u in range(len(units)))
    assert len(units) == (40 if captions == "one" else sum(1 if i % 11 == 5 else 1 + i % 3 for i in range(40)))
    per_epoch, remainders = len(units) // size, set()
    options = {"batch_size": size, "num_steps": 3 * per_epoch, "world": world, "augment": PLAIN}
    parts = list(zip(*(batches(units, rank=rank, **options) for rank in range(world)), strict=True))
    for epoch in range(3):
        used, dropped = Counter(), Counter()
        for part in (part for step in parts[epoch * per_epoch : (epoch + 1) * per_epoch] for part in step):
            used.update(key for key, valid in zip(part.keys, part.valid.tolist(), strict=True) if valid)
            dropped.update(list(named(part)))
            assert len(part.bad) == int((~part.valid).sum())
        remainder = Counter(units.key(u) for u in permutation(3, epoch, len(units))[per_epoch * size :].tolist())
        assert used + dropped + remainder == indexed and set(indexed.values()) == {1}
        assert {key[2:7] for key in dropped} <= UNUSABLE and not {key[2:7] for key in used} & UNUSABLE
        remainders.add(frozenset(remainder))
    assert len(remainders) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_is_the_same_as_skipping_the_steps_before_it(
    samples: Samples, undisturbed: list[tuple], workers: int
):
    later = batches(samples, start_step=5, workers=workers)
    assert [joined([batch]) for batch in later] == undisturbed[5:]


def test_the_loader_is_as_long_as_the_whole_run_wherever_it_starts(samples: Samples):
    options = {
        "max_pixels": 1,
        "positives": "pair",
        "group": None,
        "text_errors": "strict",
        "seed": 0,
        "order": Shuffle(0, len(samples), 2),
        "rank": 0,
        "world": 1,
        "pin": False,
    }
    units = build_units(samples, "one")
    loader = train_loader(units, augment=PLAIN, tokenize=tokenize, num_steps=9, start_step=4, workers=0, **options)
    assert len(loader) == 9 and len(list(loader)) == 5


def test_an_epoch_gives_each_sample_once_and_leaves_only_the_remainder(undisturbed: list[tuple], samples: Samples):
    for epoch in range(2):
        seen = Counter(key for batch in undisturbed[3 * epoch : 3 * epoch + 3] for key in batch[-1])
        assert len(seen) == 21 and set(seen.values()) == {1}
        assert set(seen) < {samples.key(i) for i in range(len(samples))}


def test_a_row_is_the_image_and_a_caption_of_its_key(samples: Samples):
    pictures = {samples.key(i): samples.read(i)["jpg"] for i in range(len(samples))}
    for batch in batches(samples, augment=PLAIN):
        for row, key in enumerate(batch.keys):
            expected = apply_augment(PLAIN, decode_rgb(pictures[key], 10_000), np.random.default_rng())
            assert torch.equal(batch.pixels[row], expected)
            assert text_of(batch.tokens[row]).split()[1] == str(int(key.rpartition("/")[2]))


def test_captions_and_augmentation_are_drawn_anew_in_each_epoch_and_the_same_with_the_same_seed(
    samples: Samples,
):
    drawn: dict[str, list[tuple]] = {}
    for batch in batches(samples, num_steps=30):
        for row, key in enumerate(batch.keys):
            drawn.setdefault(key, []).append((text_of(batch.tokens[row])[0], batch.pixels[row].numpy().tobytes()))
    rows = [row for several in drawn.values() for row in several]
    assert 0.3 < np.mean([first == "p" for first, _ in rows]) < 0.7
    assert all(len({pixels for _, pixels in several}) == len(several) for several in drawn.values())
    once, again, other = (joined(list(batches(samples, seed=seed))) for seed in (3, 3, 4))
    assert once == again != other


def test_in_an_epoch_of_pairs_each_caption_comes_once_with_its_image_and_an_augmentation_of_its_own(samples: Samples):
    units = build_units(samples, "all")
    pictures = {samples.key(i): samples.read(i)["jpg"] for i in range(len(samples))}
    epochs = []
    for augment in (PLAIN, STRONG):
        found = batches(units, batch_size=2, num_steps=2 * len(samples), augment=augment)
        rows = [row for batch in found for row in zip(batch.keys, batch.tokens, batch.pixels, strict=True)]
        epochs += [rows[: len(units)], rows[len(units) :]]
        for epoch in epochs[-2:]:
            texts = sorted(text_of(tokens) for _, tokens, _ in epoch)
            assert texts == sorted(f"{word} {i}" for i in range(len(samples)) for word in ("picture", "number"))
    for key, tokens, pixels in epochs[0]:
        key, _, number = key.rpartition("#")
        assert text_of(tokens) == f"{('picture', 'number')[int(number)]} {int(key.rpartition('/')[2])}"
        assert torch.equal(pixels, apply_augment(PLAIN, decode_rgb(pictures[key], 10_000), np.random.default_rng()))
    drawn = Counter(pixels.numpy().tobytes() for epoch in epochs[2:] for _, _, pixels in epoch)
    assert set(drawn.values()) == {1}


def test_a_caption_that_is_not_there_any_more_is_a_bad_sample(samples: Samples):
    units = Units(samples, 3 * np.arange(1, len(samples) + 1))
    batch = next(batches(units, batch_size=len(units), num_steps=1))
    assert named(batch) == {f"{samples.key(i)}#2": "no_caption" for i in range(len(samples))}


GROUPS: list[dict[str, Any]] = [
    {"product": "7"},
    {"product": 7},
    {"product": "7 "},
    {"product": 7.5},
    {"product": 7.5},
    {"product": True},
    {"product": True},
    {"product": "\ud800"},
    {"product": None},
    {"product": None},
    {"product": ""},
    {"product": float("nan")},
    {"other": "7"},
    {"product": ["7"]},
    {"product": {"id": "7"}},
]
SAME_GROUP = [{0, 1, 2}, {3, 4}, {5, 6}]
NO_GROUP_OF_SCALARS = {13, 14}


@pytest.fixture
def related(tmp_path: Path) -> Samples:
    """Samples with two captions each, of which some share captions, image files or groups."""
    members: Members = []
    for i, row in enumerate(GROUPS):
        row = row | {"captions": [f"A  DOG {i % 4}", f"a cat {i % 5}" if i % 2 else f"a dog {i % 4}"]}
        members += [(f"{i:02d}.jpg", jpeg(i % 6)), (f"{i:02d}.json", json.dumps(row).encode())]
    return index_shards([write_tar(tmp_path / "a.tar", members)])


def belong_together(positives: str, one: tuple[int, str], other: tuple[int, str]) -> bool:
    """Whether two pairs of sample number and text share what the option names."""
    match positives:
        case "pair":
            return False
        case "caption":
            return one[1].lower().split() == other[1].lower().split()
        case "image":
            return one[0] % 6 == other[0] % 6
        case _:
            return one[0] == other[0] or any({one[0], other[0]} <= group for group in SAME_GROUP)


@pytest.mark.parametrize("captions", ["one", "all"])
@pytest.mark.parametrize("positives", ["pair", "caption", "image", "group"])
def test_rows_have_equal_ids_where_they_share_what_positives_names(related: Samples, positives: str, captions: str):
    units = build_units(related, captions)
    group = "product" if positives == "group" else None
    options = {"batch_size": len(units), "positives": positives, "group": group, "augment": PLAIN}
    for batch in batches(units, num_steps=3, **options):
        numbers = [int(key[2:4]) for key in batch.keys]
        unusable = NO_GROUP_OF_SCALARS if positives == "group" else set()
        assert batch.valid.tolist() == [number not in unusable for number in numbers]
        assert set(batch.bad.values()) == ({"bad_group"} if unusable else set())
        assert ((batch.ids >= 0) == batch.valid).all()
        for a, b in combinations(range(len(units)), 2):
            rows = [(numbers[row], text_of(batch.tokens[row])) for row in (a, b)]
            expected = bool(batch.valid[a] and batch.valid[b]) and belong_together(positives, *rows)
            assert (batch.ids[a] == batch.ids[b]).item() == expected, rows


@pytest.fixture
def damaged(tmp_path: Path) -> Samples:
    """Six samples, of which three cannot be used."""
    members = pairs(0, 3)
    members += [
        ("cut.jpg", jpeg(3)[:300]),
        ("cut.txt", b"cut"),
        ("empty.jpg", jpeg(4)),
        ("empty.txt", b" \n"),
    ]
    members += [("large.jpg", jpeg(5, 101, 100)), ("large.txt", b"large")]
    return index_shards([write_tar(tmp_path / "a.tar", members)])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unusable_sample_keeps_its_row_and_is_named_with_the_reason(damaged: Samples, workers: int):
    for batch in batches(damaged, batch_size=6, num_steps=3, workers=workers):
        assert sorted(named(batch)) == ["a/cut", "a/empty", "a/large"]
        assert named(batch)["a/empty"] == "no_caption" and named(batch)["a/large"] == "too_large"
        assert batch.valid.tolist() == [row not in batch.bad for row in range(6)]
        assert not batch.pixels[~batch.valid].any() and batch.pixels[batch.valid].any()
        assert (batch.ids[batch.valid] >= 0).all() and (batch.ids[~batch.valid] < 0).all()
        assert len(set(batch.ids.tolist())) == 6


def test_an_unusable_sample_changes_no_other_row(damaged: Samples, tmp_path: Path):
    sound = list(pairs(0, 3))
    for name in ("cut", "empty", "large"):
        sound += [(f"{name}.jpg", jpeg(9)), (f"{name}.txt", name.encode())]
    whole = index_shards([write_tar(tmp_path / "sound/a.tar", sound)])
    for one, other in zip(batches(damaged, batch_size=6), batches(whole, batch_size=6), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.pixels[one.valid], other.pixels[one.valid])
        assert torch.equal(one.tokens[one.valid], other.tokens[one.valid])


def test_the_pieces_of_a_batch_are_its_rows_and_its_counts(damaged: Samples):
    batch = next(batches(damaged, batch_size=6))
    pieces = batch.split(4)
    assert [len(piece) for piece in pieces] == [4, 2]
    assert joined(pieces) == joined([batch])
    assert [sorted(piece.bad) for piece in pieces] == [(~piece.valid).nonzero().flatten().tolist() for piece in pieces]


def test_samples_of_one_key_in_shards_of_one_name_are_counted_apart(tmp_path: Path):
    members = [("0.jpg", jpeg(0)), ("0.txt", b"one")]
    shards = [
        write_tar(tmp_path / f"{n}/a.tar", members if n % 2 else [*members[:1], ("0.txt", b"")]) for n in range(6)
    ]
    batch = next(batches(index_shards(shards), batch_size=6))
    assert set(batch.keys) == {"a/0"} and list(batch.bad.values()) == ["no_caption"] * 3
    for piece in batch.split(1):
        assert len(piece.bad) == (0 if piece.valid.item() else 1)


def test_captions_that_are_not_utf8_are_dropped_unless_they_are_to_be_repaired(tmp_path: Path):
    row = json.dumps({"caption": "MM", "product": "MM"}).encode().replace(b"MM", "Mädchen".encode("latin-1"))
    members = [("0.jpg", jpeg(0)), ("0.txt", "Mädchen".encode("latin-1")), ("1.jpg", jpeg(1)), ("1.json", row)]
    samples = index_shards([write_tar(tmp_path / "a.tar", members)])
    options = {"batch_size": 2, "num_steps": 1, "positives": "group", "group": "product"}
    assert list(next(batches(samples, **options)).bad.values()) == ["bad_utf8"] * 2
    repaired = next(batches(samples, text_errors="replace", **options))
    assert repaired.valid.all() and {text_of(tokens) for tokens in repaired.tokens} == {"M\ufffddchen"}


@pytest.mark.parametrize("captions", ["one", "all"])
def test_a_caption_reaches_the_tokenizer_in_words(tmp_path: Path, captions: str):
    members = [("0.jpg", jpeg(0)), ("0.txt", b"<end_of_text>\n&lt;end_of_text>")]
    units = build_units(index_shards([write_tar(tmp_path / "a.tar", members)]), captions)
    batch = next(batches(units, batch_size=len(units), num_steps=1))
    assert {text_of(tokens) for tokens in batch.tokens} == {"< end_of_text >"}


def test_on_a_device_a_batch_has_the_same_rows(damaged: Samples):
    batch = next(batches(damaged, batch_size=6))
    moved = batch.to(torch.device("meta"))
    assert moved.pixels.device.type == moved.ids.device.type == "meta"
    assert moved.keys == batch.keys and moved.bad == batch.bad and moved.pixels.shape == batch.pixels.shape


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="sigwaitinfo")
def test_workers_outlive_a_stop_signal_to_all_and_end_when_their_parent_says_so(
    samples: Samples, undisturbed: list[tuple]
):
    others = active_children()
    running = batches(samples, workers=2)
    found = [joined([next(running)])]
    workers = [child for child in active_children() if child not in others]
    assert len(workers) == 2
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert found + [joined([batch]) for batch in running] == undisturbed
    for worker in workers:
        assert worker.is_alive()
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


def kill_at(number: int, how: signal.Signals) -> Callable[..., Any]:
    """decode_rgb, but that the process dies over one picture, as a decoder that crashes or too little memory do."""
    deadly = jpeg(number)

    def decode(raw: bytes, max_pixels: int) -> Any:
        if raw == deadly:
            os.kill(os.getpid(), how)
        return decode_rgb(raw, max_pixels)

    return decode


@pytest.mark.process
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a socket of torch's to the dead one
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_reported_with_the_sample_that_it_read(
    samples: Samples, monkeypatch: pytest.MonkeyPatch, workers: int, how: signal.Signals
):
    monkeypatch.setattr(loader_module, "decode_rgb", kill_at(13, how))
    began = time.monotonic()
    for loader in (
        loader_of(samples, workers=workers),
        eval_images(samples, preprocess, 10_000, workers, [np.arange(8), np.arange(8, 16), np.arange(16, 20)]),
    ):
        with pytest.raises(RunFailed, match=r"died \(.+\) while it read 000/00013\."), naming_lost_workers(loader):
            list(loader)
        assert not any(state_of(pid) for pid in loader.in_flight.slots[:, 0].tolist())  # none is left, nor a zombie
    assert time.monotonic() - began < 60  # torch looks every 5 s; without its help the loader would wait for ever


def test_a_worker_that_dies_between_samples_is_reported_without_one(samples: Samples):
    loader = loader_of(samples, workers=2)
    dataset = cast(Any, loader.dataset)
    dataset.in_flight.slots[:] = torch.tensor([[11, 4], [22, -1]])
    error = "DataLoader worker (pid(s) {}) exited unexpectedly"
    assert "while it read no sample" in str(lost_worker(loader, RuntimeError(error.format("22"))))
    assert f"while it read {samples.key(4)}." in str(lost_worker(loader, RuntimeError(error.format("22, 11"))))
    assert lost_worker(loader, RuntimeError(error.format("33"))) is None, "a process of another loader"
    for other in (RuntimeError("something else"), RunFailed("another cause")):
        with pytest.raises(RuntimeError) as raised, naming_lost_workers(loader):
            raise other
        assert raised.value is other


def test_a_lost_worker_is_named_in_any_thread(samples: Samples):
    """Signal handlers, which torch has one of, belong to the main thread."""
    loader = loader_of(samples, workers=1)
    cast(Any, loader.dataset).in_flight.slots[:] = torch.tensor([[22, 4]])

    def lose() -> None:
        with naming_lost_workers(loader):
            raise RuntimeError("DataLoader worker (pid(s) 22) exited unexpectedly")

    with ThreadPoolExecutor(1) as threads, pytest.raises(RunFailed, match=samples.key(4)):
        threads.submit(lose).result()


def stand_still_at(number: int) -> Callable[..., Any]:
    """decode_rgb, but that the process does not come back from one picture, as from a disk that does not answer."""
    endless = jpeg(number)

    def decode(raw: bytes, max_pixels: int) -> Any:
        while raw == endless:
            time.sleep(60)
        return decode_rgb(raw, max_pixels)

    return decode


def children_but(others: list[Any]) -> list[Any]:
    return [child for child in active_children() if child not in others]


@pytest.mark.process
def test_a_worker_that_hangs_is_named_with_its_sample_and_ends_the_wait(
    samples: Samples, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(loader_module, "decode_rgb", stand_still_at(13))
    others, wait = active_children(), Wait(limit_s=3.0)
    for loader in (
        loader_of(samples, workers=2, wait=wait),
        eval_images(samples, preprocess, 10_000, 2, [np.arange(8), np.arange(8, 16), np.arange(16, 20)], wait),
    ):
        running = iter(loader)
        with pytest.raises(RunFailed, match=r"no batch came .* is at 000/00013 for \d+ s\. .*trainer\.dist_timeout_s"):
            list(running)
        assert not children_but(others), "they are not waited for at the end"
    words = capsys.readouterr().err.splitlines()
    assert len(words) == 2 and all(word.startswith("warning: no batch") and "000/00013 for" in word for word in words)


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("can_leave", [True, False])
def test_a_run_that_is_to_stop_does_not_wait_for_a_worker_that_stands_still(
    samples: Samples, monkeypatch: pytest.MonkeyPatch, can_leave: bool
):
    monkeypatch.setattr(waiting_module, "STOP_S", 2)
    others, asked, left = active_children(), [""], []
    leave = (lambda: left.append(1)) if can_leave else None
    wait = Wait(limit_s=60.0, asked_to_stop=lambda: asked[0], leave=leave)
    running = iter(loader_of(samples, workers=2, num_steps=1000, wait=wait))
    next(running)
    for child in children_but(others):
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
    asked[0], began = "SIGTERM", time.monotonic()
    if can_leave:
        assert len(list(running)) < 10 and left == [1]
    else:
        with pytest.raises(RunFailed, match=r"SIGTERM asked the run to stop, and no batch came .* is stopped, "):
            list(running)
    assert time.monotonic() - began < 20 and not children_but(others)


@pytest.mark.process
def test_workers_that_are_slow_are_waited_for_as_long_as_they_get_further(
    samples: Samples, undisturbed: list[tuple], monkeypatch: pytest.MonkeyPatch
):
    def slow(raw: bytes, max_pixels: int) -> Any:
        time.sleep(0.3)
        return decode_rgb(raw, max_pixels)

    monkeypatch.setattr(loader_module, "decode_rgb", slow)
    before = signal.getsignal(signal.SIGALRM)
    running = batches(samples, workers=1, num_steps=2, wait=Wait(limit_s=1.5))
    assert [joined([batch]) for batch in running] == undisturbed[:2]
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_is_no_fault_of_a_sample_comes_out_with_its_key(
    samples: Samples, monkeypatch: pytest.MonkeyPatch, workers: int
):
    def broken(raw: bytes, max_pixels: int) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr(loader_module, "decode_rgb", broken)
    says = r"reading 000/000\d\d failed: AttributeError: no such thing"
    for loader in (loader_of(samples, workers=workers), eval_images(samples, preprocess, 100, workers, [np.arange(4)])):
        with pytest.raises(RuntimeError, match=says):
            list(loader)


def test_samples_of_a_shard_that_changes_or_goes_away_are_dropped(tmp_path: Path):
    samples = index_shards(write_shards(tmp_path, 6, 2, 4))
    os.utime(samples.shards[0], ns=(0, 1))
    os.unlink(samples.shards[1])
    batch = next(batches(samples, batch_size=12, workers=1))
    assert Counter(batch.bad.values()) == {"shard_changed": 6, "read_error": 2}
    assert {batch.keys[row].partition("/")[0] for row in range(12) if row not in batch.bad} == {"002"}


def test_pictures_that_are_far_too_long_are_dropped_before_they_are_resized(tmp_path: Path):
    raw = io.BytesIO()
    Image.new("L", (1, 200_000)).save(raw, "PNG")
    samples = index_shards([write_tar(tmp_path / "a.tar", [("0.png", raw.getvalue()), ("0.txt", b"a line")])])
    for augment in (STRONG, PLAIN):
        batch = next(batches(samples, batch_size=1, num_steps=1, max_pixels=1_000_000, augment=augment))
        assert batch.bad == {0: "too_long"}
    [(_, _, valid)] = eval_images(samples, preprocess, 1_000_000, 0, [np.arange(1)])
    assert not valid.any()


def test_batches_that_cannot_be_filled_raise_before_anything_is_read(samples: Samples):
    with pytest.raises(ValueError, match=r"train\.batch_size=24"):
        batches(samples, batch_size=24)
    with pytest.raises(ValueError, match=r"trainer\.devices"):
        batches(samples, batch_size=2, world=3)


def preprocess(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_the_asked_samples_through_the_given_transform(damaged: Samples, workers: int):
    asked = [np.array([5, 0]), np.array([1, 2, 3]), np.array([4])]
    found = list(eval_images(damaged, preprocess, 10_000, workers, asked))
    assert [indices.tolist() for indices, _, _ in found] == [indices.tolist() for indices in asked]
    for indices, pixels, valid in found:
        for i, image, ok in zip(indices.tolist(), pixels, valid.tolist(), strict=True):
            assert ok == (damaged.key(i) not in ("a/cut", "a/large"))
            if ok:
                original = Image.open(io.BytesIO(damaged.read(i)["jpg"])).convert("RGB")
                assert torch.equal(image, preprocess(original))
            else:
                assert not image.any()
