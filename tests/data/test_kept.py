import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import Members, jpeg, write_tar
from torch import Tensor

from clipft.data import kept as kept_module
from clipft.data.augment import Augment, apply_augment
from clipft.data.decode import decode_rgb
from clipft.data.index import index_shards
from clipft.data.kept import MOST_PARTS, Kept
from clipft.data.order import rng_for
from clipft.data.pairs import Units, build_units
from clipft.data.sample import PASSING, BadSample
from clipft.data.sides import images_of, side_batches, texts_of
from clipft.data.waiting import Wait

WIDTH, CAPTIONS = 3, [2, 1, 3]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept_module, "PART_ROWS", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pairs(tmp_path: Path) -> Units:
    """Six pairs of three images; the second image is cut off."""
    members: Members = []
    for i, count in enumerate(CAPTIONS):
        raw = jpeg(i)
        members.append((f"{i}.jpg", raw[:-50] if i == 1 else raw))
        members.append((f"{i}.json", json.dumps({"captions": [f"{i} {n}" for n in range(count)]}).encode()))
    return build_units(index_shards([write_tar(tmp_path / "a.tar", members)]), "all")


@pytest.fixture
def kept(tmp_path: Path, pairs: Units) -> Kept:
    return Kept(tmp_path / "features", pairs, WIDTH)


def fill(kept: Kept, reason: str = "") -> np.ndarray:
    """Writes noise; unit 1 has the reason in place of a feature."""
    features = np.random.default_rng(0).normal(size=(len(kept.units), WIDTH)).astype(np.float32)
    for part in range(kept.num_parts):
        rows = kept.rows_of(part)
        kept.write(part, [reason if u == 1 else "" for u in rows], features[rows.start : rows.stop])
    return features


def test_what_was_written_comes_back_bit_by_bit_and_a_reason_in_its_place(kept: Kept):
    assert [kept.rows_of(part) for part in range(kept.num_parts)] == [range(4), range(4, 6)]
    features, u = fill(kept, "image_truncated"), 0
    for i, count in enumerate(CAPTIONS):
        for number in range(count):
            if u == 1:
                with pytest.raises(BadSample, match="image_truncated"):
                    kept.feature(i, number)
            else:
                assert np.array_equal(kept.feature(i, number), features[u])
            u += 1
    images = Kept(kept.folder.with_name("images"), Units(kept.units.samples, None), WIDTH)
    features = fill(images)
    assert all(np.array_equal(images.feature(i, number), features[i]) for i in range(3) for number in range(9))


def test_a_caption_that_was_not_counted_has_no_feature_and_not_the_next_samples(kept: Kept):
    fill(kept)
    with pytest.raises(BadSample, match="read_error"):
        kept.feature(0, CAPTIONS[0])


@pytest.mark.parametrize("at", [0, 40, 200])  # in digest, reasons and features
def test_a_part_with_a_flipped_bit_a_cut_one_and_a_missing_one_are_not_whole(kept: Kept, at: int):
    fill(kept)
    assert kept.is_whole(0) and kept.is_whole(1)
    path = kept.path(0)
    raw = bytearray(path.read_bytes())
    raw[min(at, len(raw) - 1)] ^= 1
    path.write_bytes(raw)
    assert kept.is_there(0) and not kept.is_whole(0) and kept.is_whole(1)
    path.write_bytes(raw[:-1])
    assert not kept.is_there(0) and not kept.is_whole(0)
    path.unlink()
    assert not kept.is_there(0) and not kept.is_whole(0)


def test_a_part_that_met_a_fault_of_the_storage_is_used_and_made_again_at_the_next_start(kept: Kept):
    for reason in PASSING:
        fill(kept, reason)
        assert kept.is_there(0) and not kept.is_whole(0)
        with pytest.raises(BadSample, match=reason):
            kept.feature(0, 1)
    fill(kept, "image_damaged")
    assert kept.is_whole(0)


def test_the_parts_of_many_units_are_no_more_than_a_process_can_open(kept: Kept):
    for number in (1, 4, 5, 10**6, 10**9 + 1):
        many = Kept(kept.folder, Units(kept.units.samples, np.array([number])), WIDTH)
        assert many.num_parts <= MOST_PARTS
        last = many.rows_of(many.num_parts - 1)
        assert last.stop == number and 0 < len(last) <= many.part_rows


@pytest.mark.parametrize("workers", [0, 1])
def test_a_side_is_what_training_sees_in_batches_of_one_size(pairs: Units, workers: int):
    plain = Augment(16, 1.0, 0.0, 0.0, "bicubic", "shortest", (0, 0, 0))
    images, samples = Units(pairs.samples, None), pairs.samples
    batches = [range(0, 2), range(2, 3)]
    (first, why), (last, fine) = side_batches(images_of(images, plain, 10_000), batches, 2, workers, Wait())
    assert (why, fine) == (["", "image_truncated"], [""])
    assert first.shape == last.shape == (2, 3, 16, 16) and not first[1].any() and not last[1].any()
    for pixels, i in ((first[0], 0), (last[0], 2)):
        decoded = decode_rgb(samples.read(i)["jpg"], 10_000)
        assert torch.equal(pixels, apply_augment(plain, decoded, rng_for(1)))

    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([list(text.encode().ljust(4)) for text in texts])

    (tokens, reasons), (rest, _) = side_batches(
        texts_of(pairs, tokenize, "strict"), [range(0, 4), range(4, 6)], 4, workers, Wait()
    )
    said = [bytes(row.tolist()).decode().strip() for row in torch.cat([tokens, rest])]
    assert said == [*(f"{i} {n}" for i, count in enumerate(CAPTIONS) for n in range(count)), "", ""]
    assert reasons == [""] * 4
