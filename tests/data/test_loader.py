import io
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shards import jpeg, pairs, write_shards, write_tar
from torch import Tensor

from clipft.data.augment import Augment, apply_augment
from clipft.data.caption import caption_id
from clipft.data.decode import decode_rgb
from clipft.data.index import Samples, index_shards
from clipft.data.loader import Batch, eval_images, train_loader
from clipft.data.order import batch_at

STRONG = Augment(16, 0.9, 5.0, 0.5, "bicubic", "shortest", (0, 0, 0))
PLAIN = replace(STRONG, crop_min=1.0, affine_degrees=0.0, flip_prob=0.0)


def tokenize(texts: list[str]) -> Tensor:
    """Bytes of the text, so that a test can read it back."""
    return torch.tensor([list(text.encode()[:20].ljust(20, b"\0")) for text in texts])


def text_of(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).rstrip(b"\0").decode()


def batches(samples: Samples, **changes: Any) -> Iterator[Batch]:
    options: dict[str, Any] = {
        "augment": STRONG,
        "tokenize": tokenize,
        "max_pixels": 10_000,
        "positives": "caption",
        "seed": 3,
        "batch_size": 7,
        "num_steps": 8,
        "rank": 0,
        "world": 1,
        "start_step": 0,
        "workers": 0,
        "pin": False,
    }
    return iter(train_loader(samples, **options | changes))


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


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 2), (2, 0), (2, 2), (3, 0), (3, 1)])
def test_ranks_and_workers_do_not_change_the_global_batches(
    samples: Samples, undisturbed: list[tuple], world: int, workers: int
):
    ranks = [batches(samples, rank=rank, world=world, workers=workers) for rank in range(world)]
    assert [joined(list(parts)) for parts in zip(*ranks, strict=True)] == undisturbed


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
        "seed": 0,
        "batch_size": 2,
        "rank": 0,
        "world": 1,
        "pin": False,
    }
    loader = train_loader(samples, augment=PLAIN, tokenize=tokenize, num_steps=9, start_step=4, workers=0, **options)
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


def test_ids_are_equal_for_equal_captions_or_unique_for_each_pair(tmp_path: Path):
    members = [(f"{i}.{kind}", raw) for i in range(6) for kind, raw in (("jpg", jpeg(i)), ("txt", b"A  dog"))]
    samples = index_shards([write_tar(tmp_path / "a.tar", members)])
    by_caption, by_pair = (
        next(batches(samples, batch_size=6, positives=positives)) for positives in ("caption", "pair")
    )
    assert by_caption.ids.tolist() == [caption_id("a dog")] * 6
    assert by_pair.ids.tolist() == batch_at(3, 0, 6, 6)[1].tolist()


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
        assert sorted(batch.bad) == ["a/cut", "a/empty", "a/large"]
        assert batch.bad["a/empty"] == "no_caption" and batch.bad["a/large"] == "too_large"
        assert batch.dropped == Counter(batch.bad.values())
        assert batch.valid.tolist() == [key not in batch.bad for key in batch.keys]
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
    assert sum((Counter(piece.dropped) for piece in pieces), Counter()) == Counter(batch.dropped)


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


def test_an_error_that_is_no_bad_sample_is_raised_from_a_worker(tmp_path: Path):
    samples = index_shards(write_shards(tmp_path, 6))
    os.utime(samples.shards[0], ns=(0, 1))
    with pytest.raises(ValueError, match="was changed after it was indexed"):
        next(batches(samples, batch_size=6, workers=1))


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
