from io import BytesIO
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from clipft.config import DataConfig
from clipft.data import toy
from clipft.data.caption import captions_of
from clipft.data.split import load_splits


@pytest.fixture(scope="module")
def rows():
    return toy.draw_rows()


def pixels_of(row):
    with Image.open(BytesIO(row.image)) as image:
        return np.asarray(image.convert("RGB"), int)


def captions(rows, split):
    return [captions_of(row.members)[0] for row in rows if row.split == split]


def test_there_are_several_hundred_captions_and_training_shows_each_of_them(rows):
    train = captions(rows, "train")
    assert len(train) == 4000 and 300 <= len(set(train)) <= 600
    counts = np.unique(train, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_captions_differ_from_each_other_and_are_known_from_training(rows, split):
    held_out = captions(rows, split)
    assert len(held_out) == 400 == len(set(held_out))
    assert set(held_out) <= set(captions(rows, "train"))


def test_no_picture_is_drawn_twice(rows):
    assert len({row.image for row in rows}) == len(rows)


def test_the_class_of_a_scene_with_one_thing_is_in_its_caption(rows):
    labels = {row.label for row in rows if row.label is not None}
    assert len(labels) == len(toy.COLOURS) * len(toy.SHAPES)
    templates = {template.format(c=label) for template in toy.TEMPLATES for label in labels}
    assert templates <= set(captions(rows, "train"))
    for row in rows:
        [caption] = captions_of(row.members)
        assert (row.label is not None) == ("background" in caption)
        assert row.label is None or f" {row.label} on " in caption


def test_a_scene_shows_the_colours_and_the_background_of_its_caption(rows):
    """The oracle is the nearest named colour of each pixel."""
    named = {**toy.COLOURS, **toy.GROUNDS}
    palette = np.array(list(named.values()))
    singles = (row for row in rows if row.label is not None)
    for row in islice(singles, 0, 1500, 10):
        nearest = np.abs(pixels_of(row)[:, :, None] - palette).sum(-1).argmin(-1)
        shares = dict(
            zip(named, np.bincount(nearest.ravel(), minlength=len(named)) / nearest.size, strict=True)
        )
        [caption] = captions_of(row.members)
        ground = caption.split()[-2]
        colour = caption.split()[2]
        assert max(toy.GROUNDS, key=lambda name: shares[name]) == ground
        assert max(toy.COLOURS, key=lambda name: shares[name]) == colour


def test_left_and_above_are_where_the_caption_says(rows):
    for row in islice((row for row in rows if row.label is None), 0, 600, 3):
        [caption] = captions_of(row.members)
        first, second = caption.split()[1], caption.split()[-2]
        if first == second:
            continue
        pixels = pixels_of(row)
        centres = []
        for colour in (first, second):
            near = np.abs(pixels - toy.COLOURS[colour]).sum(-1) < 90
            centres.append(np.argwhere(near).mean(axis=0))
        down, across = centres[1] - centres[0]
        assert (across if "left of" in caption else down) > 12


def test_the_set_is_packed_once_and_the_same_everywhere(tmp_path, rows):
    toy.make_toy(tmp_path / "a/toy")
    splits = load_splits(DataConfig(path=str(tmp_path / "a/toy")))
    assert splits.train is not None and splits.val is not None and splits.test is not None
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [4000, 400, 400]
    assert (
        splits.classnames == sorted({row.label for row in rows if row.label})
        and splits.templates == toy.TEMPLATES
    )
    assert splits.train.read(7)["jpg"] == rows[7].image
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a/toy").iterdir()}
    toy.make_toy(tmp_path / "a/toy")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a/toy").iterdir()}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["toy"]


def test_drawing_is_the_same_every_time(rows):
    rng = np.random.default_rng(toy.SEED)
    scenes = toy.all_scenes(rng)
    for _ in ("val", "test"):
        rng.permutation(len(scenes))
    for number in range(5):
        assert toy.draw_row(scenes[number], "key", "train", rng).image == rows[number].image
