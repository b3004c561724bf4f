"""What is measured with: the same for both sides, and like what people have."""

import tarfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from shards import pairs, write_tar

from clipft.bench.shards import draw_captions, draw_samples, first_captions, write_shards
from clipft.data.index import index_shards


def size(jpeg: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(jpeg)) as image:
        return image.size


def test_drawn_photos_have_the_size_and_the_detail_of_photographs():
    samples = list(draw_samples(512, 3))
    assert [size(jpeg) for jpeg, _ in samples] == [(512, 384)] * 3
    bits = np.mean([8 * len(jpeg) / (512 * 384) for jpeg, _ in samples])
    assert 2 < bits < 4  # Flickr8k: 2.9 at quality 90
    assert size(next(draw_samples(64, 1, square=True))[0]) == (64, 64)


def test_samples_are_the_same_each_time_and_differ_from_each_other():
    first, again = list(draw_samples(64, 4)), list(draw_samples(64, 4))
    assert first == again and len(set(first)) == 4


def test_captions_are_as_long_as_those_of_people():
    lengths = [len(caption.split()) for caption in draw_captions(500)]
    assert 10 < np.mean(lengths) < 12 and min(lengths) >= 3 and max(lengths) <= 24


def test_of_a_packed_set_the_first_captions_are_taken(tmp_path):
    write_tar(tmp_path / "train-0.tar", pairs(0, 6))
    write_tar(tmp_path / "val-0.tar", pairs(6, 2))
    found = list(first_captions(str(tmp_path), 4))
    assert [caption for _, caption in found] == [f"picture {i}" for i in range(4)]
    with pytest.raises(ValueError, match="has 6 training samples, and 7 are needed"):
        list(first_captions(str(tmp_path), 7))


def test_shards_hold_one_caption_a_sample_so_that_every_reader_sees_the_same_pairs(tmp_path):
    shards = write_shards(tmp_path, draw_samples(32, 5), per_shard=2)
    assert len(shards) == 3 and len(index_shards(shards)) == 5
    names = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            names += tar.getnames()
    assert names == [f"{i:06d}.{kind}" for i in range(5) for kind in ("jpg", "txt")]
