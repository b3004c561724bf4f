from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from clipft.config import DataConfig
from clipft.data import toy
from clipft.data.caption import captions_of
from clipft.data.split import load_splits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "toy"
    toy.make_toy(out)
    return out


@pytest.fixture(scope="module")
def parts(folder):
    """Members of all samples by split, as a training run finds them."""
    splits = load_splits(DataConfig(path=str(folder)))
    assert splits.train is not None and splits.val is not None and splits.test is not None
    samples = {"train": splits.train, "val": splits.val, "test": splits.test}
    return {split: [part.read(i) for i in range(len(part))] for split, part in samples.items()}


def pixels_of(members):
    with Image.open(BytesIO(members["jpg"])) as image:
        return np.asarray(image.convert("RGB"), int)


def caption_of(members):
    [caption] = captions_of(members)
    return caption


def captions(samples):
    return [caption_of(members) for members in samples]


def test_there_are_several_hundred_captions_and_training_shows_each_of_them(parts):
    train = captions(parts["train"])
    assert len(train) == 4000 and 300 <= len(set(train)) <= 600
    counts = np.unique(train, return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_captions_differ_from_each_other_and_are_known_from_training(parts, split):
    held_out = captions(parts[split])
    assert len(held_out) == 300 == len(set(held_out))
    assert set(held_out) <= set(captions(parts["train"]))


def test_no_picture_is_drawn_twice(parts):
    pictures = [members["jpg"] for samples in parts.values() for members in samples]
    assert len(set(pictures)) == len(pictures) == 4600


def test_a_scene_has_a_class_when_it_shows_one_thing_and_its_prompts_are_known_captions(parts, folder):
    splits = load_splits(DataConfig(path=str(folder)))
    classes = sorted(f"{colour} {shape}" for colour in toy.COLOURS for shape in toy.SHAPES)
    assert splits.classnames == classes and splits.templates == toy.TEMPLATES
    prompts = {template.format(c=name) for template in splits.templates for name in classes}
    assert prompts <= set(captions(parts["train"]))
    for members in parts["test"]:
        caption = caption_of(members)
        assert ("cls" in members) == ("background" in caption)
        assert "cls" not in members or f" {classes[int(members['cls'])]} on " in caption


def test_a_scene_shows_the_colours_and_the_background_of_its_caption(parts):
    """The oracle is the nearest named colour of each pixel."""
    named = {**toy.COLOURS, **toy.GROUNDS}
    palette = np.array(list(named.values()))
    for members in parts["test"]:
        if "cls" not in members:
            continue
        nearest = np.abs(pixels_of(members)[:, :, None] - palette).sum(-1).argmin(-1)
        counts = dict(zip(named, np.bincount(nearest.ravel(), minlength=len(named)), strict=True))
        words = caption_of(members).split()
        assert max(toy.GROUNDS, key=lambda name: counts[name]) == words[-2]
        assert max(toy.COLOURS, key=lambda name: counts[name]) == words[2]


def test_left_and_above_are_where_the_caption_says(parts):
    for members in parts["test"]:
        words = caption_of(members).split()
        first, second = words[1], words[-2]
        if "cls" in members or first == second:
            continue
        pixels = pixels_of(members)
        near = [np.abs(pixels - toy.COLOURS[colour]).sum(-1) < 60 for colour in (first, second)]
        down, across = np.median(np.argwhere(near[1]), axis=0) - np.median(np.argwhere(near[0]), axis=0)
        assert (across if "left" in words else down) > 12


def test_making_it_again_changes_nothing_and_leaves_nothing_beside_it(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    toy.make_toy(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]


def test_drawing_is_the_same_every_time(parts):
    rng = np.random.default_rng(toy.SEED)
    scenes = toy.all_scenes(rng)
    for _ in ("val", "test"):
        rng.permutation(len(scenes))
    for number in range(5):
        row = toy.draw_row(scenes[number], "key", "train", rng)
        assert row.image == parts["train"][number]["jpg"]
