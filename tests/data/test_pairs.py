import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from shards import Members, jpeg, write_tar

from clipft.data.index import Samples, index_shards
from clipft.data.pairs import build_units, count_captions, counts_place, read_counts, write_counts

NUMBERS = [1, 5, 2, 3, 1, 4, 2]
UNREADABLE: Members = [
    ("empty.jpg", jpeg(1)),
    ("empty.txt", b" \n"),
    ("cut.jpg", jpeg(2)),
    ("cut.json", b'{"captions": ["a", "b'),
    ("label.jpg", jpeg(3)),
    ("label.cls", b"3"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/clipft/captions"


def members(numbers: list[int]) -> Members:
    """Members of samples with so many captions, in turn from json and txt."""
    found: Members = []
    for i, number in enumerate(numbers):
        captions = [f"{i} {n}" for n in range(number)]
        text = ("json", json.dumps({"captions": captions})) if i % 2 else ("txt", "\n".join(captions))
        found += [(f"{i}.jpg", jpeg(i)), (f"{i}.{text[0]}", text[1].encode())]
    return found


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return index_shards([write_tar(tmp_path / "a.tar", members(NUMBERS) + UNREADABLE)])


EXPECTED = [*NUMBERS, 1, 1, 1]


def test_samples_are_the_units_of_one_caption_each(samples: Samples, cache: Path):
    units = build_units(samples, "one")
    assert len(units) == len(samples) == 10
    assert [units.at(u) for u in range(10)] == [(i, None) for i in range(10)]
    assert [units.key(u) for u in range(10)] == [samples.key(i) for i in range(10)]
    assert not cache.exists()


def test_each_caption_is_a_unit_of_all_and_unreadable_ones_keep_one_slot(samples: Samples):
    units = build_units(samples, "all")
    expected = [(i, number) for i, count in enumerate(EXPECTED) for number in range(count)]
    assert len(units) == len(expected)
    assert [units.at(u) for u in range(len(units))] == expected
    assert [units.key(u) for u in range(len(units))] == [f"{samples.key(i)}#{number}" for i, number in expected]
    assert len({units.key(u) for u in range(len(units))}) == len(units)


def test_captions_are_neither_one_nor_all_raises(samples: Samples):
    with pytest.raises(ValueError, match=r"data\.captions='both'"):
        build_units(samples, "both")


def test_taken_samples_have_the_units_of_those_samples(samples: Samples):
    build_units(samples, "all")
    for chosen in ([6, 1, 9], [1, 6, 9], [3]):
        assert count_captions(samples.take(np.array(chosen))).tolist() == [EXPECTED[i] for i in chosen]


def test_counts_are_stored_and_read_again(samples: Samples, cache: Path):
    assert count_captions(samples).tolist() == EXPECTED
    assert list(cache.iterdir()) == [counts_place(samples)]
    write_counts(counts_place(samples), np.array(EXPECTED) + 1)
    assert count_captions(samples).tolist() == [count + 1 for count in EXPECTED]


def test_stored_counts_that_are_damaged_or_of_other_samples_are_made_again(samples: Samples):
    count_captions(samples)
    place = counts_place(samples)
    whole = place.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 3)] + [whole + whole, b"<html>"]
    damaged += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
    for raw in damaged:
        place.write_bytes(raw)
        assert count_captions(samples).tolist() == EXPECTED
        assert place.read_bytes() == whole
    write_counts(place, np.array(EXPECTED[:-1]))
    assert count_captions(samples).tolist() == EXPECTED


def test_a_shard_written_again_is_counted_again_also_where_every_size_is_the_same(tmp_path: Path):
    found = []
    for text in (b"a dog\na cat", b"a dog and cat"[:11]):
        path = write_tar(tmp_path / "b.tar", [("0.jpg", jpeg(0)), ("0.txt", text)])
        os.utime(path, ns=(0, len(found)))
        samples = index_shards([path])
        found.append((samples.fingerprint, count_captions(samples).tolist()))
    assert found == [(found[0][0], [2]), (found[0][0], [1])]


def test_without_a_cache_that_can_be_written_samples_are_counted_at_each_start(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert count_captions(samples).tolist() == count_captions(samples).tolist() == EXPECTED
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    counts_place(samples).mkdir(parents=True)  # a folder in its place refuses the file even to root
    assert count_captions(samples).tolist() == EXPECTED
    assert list(counts_place(samples).parent.iterdir()) == [counts_place(samples)]


def test_counts_made_while_the_storage_fails_are_not_stored(tmp_path: Path, cache: Path):
    samples = index_shards([write_tar(tmp_path / "b.tar", members([2, 2, 2]))])
    places = samples.members[-2:, 1].copy()
    samples.members[-2:, 1] = 10**12  # a read there ends too early
    assert count_captions(samples).tolist() == [2, 2, 1]
    assert not cache.exists()
    samples.members[-2:, 1] = places
    assert count_captions(samples).tolist() == [2, 2, 2] and cache.exists()


def test_counts_of_a_shard_that_changes_meanwhile_are_not_stored(tmp_path: Path, cache: Path):
    samples = index_shards([write_tar(tmp_path / "b.tar", members([2, 2, 2]))])
    samples.read(0)
    os.truncate(tmp_path / "b.tar", (tmp_path / "b.tar").stat().st_size - 1)
    assert count_captions(samples).tolist() == [1, 1, 1]
    assert not cache.exists()


def test_writers_at_the_same_time_never_leave_half_a_file(samples: Samples, cache: Path):
    count_captions(samples)
    place = counts_place(samples)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(60):
            pool.submit(write_counts, place, np.array(EXPECTED))
        read = [pool.submit(read_counts, place, len(samples)) for _ in range(200)]
        for future in read:
            counts = future.result()
            assert counts is not None and counts.tolist() == EXPECTED
    assert list(cache.iterdir()) == [place]
