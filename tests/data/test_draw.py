"""Splits that are drawn keep together what belongs together, and say what is shared where they do not."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipft.config import DrawConfig
from clipft.data.alike import near_pairs
from clipft.data.caption import normalise_caption
from clipft.data.draw import check_draw, draw_splits, find_near, find_shared, partners, spread
from clipft.data.fingerprint import SEEN
from clipft.data.sources.row import Row

NO_PAIRS = np.zeros((0, 2), np.int64)


def rows_of(num: int, same_image: int = 1, same_caption: int = 1) -> tuple[list[Row], np.ndarray]:
    """Rows of which so many in a row have the same image, and so many the same caption, and what is seen of them."""
    rng = np.random.default_rng(5)
    values = rng.integers(0, 2**63, num, np.uint64)
    seen = np.zeros(num, SEEN)
    seen["digest"] = values[np.arange(num) // same_image]
    rows = [
        Row([i], f"/x/{i}.jpg", [f"Caption  {i // same_caption}"], None, None, f'{{"owner": "{i // 7}"}}', f"{i:06d}")
        for i in range(num)
    ]
    return rows, seen


def drawn(config: DrawConfig, rows: list[Row], seen: np.ndarray, near: np.ndarray = NO_PAIRS) -> list[str]:
    check_draw(config, rows)
    return draw_splits(config, rows, seen, near)


def together(splits: list[str], names: list) -> bool:
    """Whether all rows of the same name are in one split."""
    found: dict = {}
    return all(found.setdefault(name, split) == split for name, split in zip(names, splits, strict=True))


def test_the_shares_are_those_asked_for():
    rows, seen = rows_of(1000)
    splits = drawn(DrawConfig(val=0.05, test=0.1), rows, seen)
    assert [splits.count(name) for name in ("train", "val", "test")] == [850, 50, 100]
    rows, seen = rows_of(1000, same_image=7)
    splits = drawn(DrawConfig(val=0.05, test=0.1), rows, seen)
    assert 43 < splits.count("val") <= 50 and 93 < splits.count("test") <= 100


def test_images_of_the_same_bytes_stay_together():
    rows, seen = rows_of(300, same_image=3)
    splits = drawn(DrawConfig(val=0.2, test=0.2), rows, seen)
    assert together(splits, seen["digest"].tolist()) and not together(splits, [i // 4 for i in range(300)])


def test_images_that_look_the_same_stay_together_unless_the_user_says_no():
    rows, seen = rows_of(300)
    rng = np.random.default_rng(0)
    seen["hashed"] = True
    seen["hash"] = np.repeat(rng.integers(0, 2**63, (150, 2), np.uint64), 2, axis=0)
    config = DrawConfig(val=0.3)
    near = find_near(config, seen)
    assert together(drawn(config, rows, seen, near), [i // 2 for i in range(300)])
    plain = DrawConfig(val=0.3, near=False)
    assert not together(drawn(plain, rows, seen, find_near(plain, seen)), [i // 2 for i in range(300)])


def test_by_caption_equal_texts_stay_together_too():
    rows, seen = rows_of(400, same_caption=4, same_image=2)
    for row in rows[::3]:
        row.captions = [row.captions[0].upper().replace("  ", " ")]
    splits = drawn(DrawConfig(val=0.2, by="caption"), rows, seen)
    assert together(splits, [normalise_caption(row.captions[0]) for row in rows])
    assert together(splits, seen["digest"].tolist())
    assert not together(drawn(DrawConfig(val=0.2), rows, seen), [i // 4 for i in range(400)])


def test_by_a_column_its_values_stay_together_and_rows_without_one_are_alone():
    rows, seen = rows_of(420)
    for row in rows[:70]:
        row.rest = '{"owner": null}'
    splits = drawn(DrawConfig(val=0.2, by="owner"), rows, seen)
    assert together(splits[70:], [i // 7 for i in range(70, 420)])
    assert {"train", "val"} == set(splits[:70])
    seen["digest"][1::2] = seen["digest"][::2]
    splits = drawn(DrawConfig(val=0.2, by="owner"), rows, seen)
    assert together(splits[70:], [i // 7 for i in range(70, 420)]) and together(splits, seen["digest"].tolist())
    with pytest.raises(ValueError, match=r"split\.by='ower' is neither image nor caption nor a column.*\(owner\)"):
        drawn(DrawConfig(val=0.2, by="ower"), rows, seen)


def test_neither_order_nor_names_nor_new_rows_of_the_set_decide_for_an_image():
    rows, seen = rows_of(500)
    splits = dict(zip(seen["digest"].tolist(), drawn(DrawConfig(val=0.1), rows, seen), strict=True))
    order = list(range(500))
    random.Random(0).shuffle(order)
    moved = [Row([0], f"/y/{i}.png", ["x"], None, None, "{}", "k") for i in order]
    again = drawn(DrawConfig(val=0.1), moved, seen[order])
    assert dict(zip(seen["digest"][order].tolist(), again, strict=True)) == splits
    fewer = drawn(DrawConfig(val=0.1), rows[:450], seen[:450])
    changed = [
        digest for digest, split in zip(seen["digest"][:450].tolist(), fewer, strict=True) if splits[digest] != split
    ]
    assert len(changed) <= 10


def test_a_large_group_stays_in_train_and_a_share_below_every_group_is_refused():
    rows, seen = rows_of(100)
    seen["digest"][:60] = 1
    splits = drawn(DrawConfig(val=0.2), rows, seen)
    assert set(splits[:60]) == {"train"} and splits.count("val") == 20
    seen["digest"][60:] = 2
    with pytest.raises(ValueError, match=r"split\.val=0\.2 of 100 images, in 2 groups by image, is none"):
        drawn(DrawConfig(val=0.2), rows, seen)
    with pytest.raises(ValueError, match=r"in 1 groups by owner, is none: .*or say split\.near=false"):
        drawn(DrawConfig(val=0.2, by="owner"), rows, seen, np.array([[0, 99]]))
    with pytest.raises(ValueError, match="leave none of 2 to train on"):
        drawn(DrawConfig(val=0.4, test=0.4), *rows_of(2))


def test_only_rows_of_train_are_drawn_and_a_split_of_the_source_is_not_drawn_again():
    rows, seen = rows_of(100)
    for row in rows[:30]:
        row.split = "test"
    splits = drawn(DrawConfig(val=0.2), rows, seen)
    assert splits[:30] == ["test"] * 30 and splits.count("val") == 14
    with pytest.raises(ValueError, match=r"split\.test=0\.2: the source has a test split.*columns\.split=none"):
        drawn(DrawConfig(test=0.2), rows, seen)


def test_what_splits_share_is_counted_with_an_example():
    rows, seen = rows_of(10)
    splits = ["train"] * 5 + ["val"] * 3 + ["test"] * 2
    seen["digest"][5] = seen["digest"][6] = seen["digest"][0]
    near = np.array([[1, 7], [0, 5], [7, 8], [2, 3]])
    rows[8].captions = ["caption 4", "caption 4 ", "other"]
    shared = find_shared(rows, splits, seen, near)
    assert set(shared) == {"train/val", "train/test", "val/test"}
    first = shared["train/val"]
    assert (first.images, first.alike, first.captions, first.example) == (2, 1, 0, ("000000", "000005"))
    assert (shared["train/test"].images, shared["train/test"].captions) == (0, 2)
    assert (shared["val/test"].alike, shared["val/test"].example) == (1, ("000007", "000008"))


def test_shared_rows_agree_with_a_slow_loop():
    rng = np.random.default_rng(3)
    rows, seen = rows_of(120)
    seen["digest"] = rng.integers(0, 60, 120)
    splits = rng.choice(["train", "val", "test", "extra"], 120).tolist()
    for row in rows:
        row.captions = [f"c{n}" for n in rng.integers(0, 90, 2)]
    for sides, found in find_shared(rows, splits, seen, NO_PAIRS).items():
        first, second = sides.split("/")
        ours = [i for i in range(120) if splits[i] == first]
        images = {int(seen["digest"][i]) for i in ours}
        texts = {text for i in ours for text in rows[i].captions}
        theirs = [i for i in range(120) if splits[i] == second]
        assert found.images == sum(int(seen["digest"][i]) in images for i in theirs)
        assert found.captions == sum(text in texts for i in theirs for text in rows[i].captions)


@pytest.mark.parametrize("seed", range(20))
def test_of_images_that_look_the_same_all_copies_have_the_partners_that_all_pairs_give(seed: int):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 25, 60)
    bits = rng.integers(0, 2, (9, 128), np.uint8)[rng.integers(0, 9, 25)]
    bits[np.arange(25), rng.integers(0, 128, 25)] ^= 1  # up to two differ between images of one look
    seen = np.zeros(60, SEEN)
    seen["digest"], seen["hashed"] = rng.permutation(25)[image], image % 5 > 0
    seen["hash"] = np.packbits(bits, axis=1).view(np.uint64)[image]
    split = rng.integers(0, 3, 60)
    hashed = np.flatnonzero(seen["hashed"])
    pairs = hashed[near_pairs(seen["hash"][hashed], seen["colours"][hashed])]
    expected = partners(pairs[seen["digest"][pairs[:, 0]] != seen["digest"][pairs[:, 1]]], split)
    found = partners(spread(find_near(DrawConfig(), seen), seen["digest"], split), split)
    assert len(expected) == 3 and found == expected
    assert [next(iter(found[sides].items())) for sides in found] == [next(iter(expected[s].items())) for s in found]


def test_many_copies_of_one_image_cost_no_more_pairs_than_there_are_copies():
    rows, seen = rows_of(2003)
    seen["digest"][:2000], seen["hashed"][:2002] = 1, True
    seen["hash"][2001] = 1  # one bit from the others
    splits = ["train"] * 1000 + ["val"] * 1002 + ["test"]
    near = find_near(DrawConfig(), seen)
    assert near.tolist() == [[0, 2000], [0, 2001], [2000, 2001]]
    assert len(spread(near, seen["digest"], np.repeat([0, 1, 2], [1000, 1002, 1]))) < 3 * len(rows)
    [shared] = find_shared(rows, splits, seen, near).values()
    assert (shared.images, shared.alike, shared.example) == (1000, 2, ("000000", "001000"))
    assert set(drawn(DrawConfig(test=0.1), rows, seen, near)[:2002]) == {"train"}


def test_shares_that_cannot_be_are_refused(tmp_path: Path):
    refused: list[dict[str, Any]] = [{"val": 0.0}, {"val": 1.0}, {"test": -0.1}, {"by": "caption"}]
    for options in [*refused, {"val": 0.6, "test": 0.4}]:
        with pytest.raises(ValueError, match=r"split\."):
            DrawConfig(**options)
