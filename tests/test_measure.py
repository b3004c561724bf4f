from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shards import write_shards

from clipft.config import DataConfig
from clipft.data.lanes import Lanes
from clipft.data.mix import Mix
from clipft.data.order import Order, Shuffle
from clipft.data.split import load_splits
from clipft.judge.evaluate import Embedded, Evaluation
from clipft.measure import check_dropped, fingerprints

NOTHING = Embedded(torch.zeros(0, 1), torch.zeros(0, 1), torch.zeros(0, dtype=torch.long), {})


def test_numbers_of_a_set_that_is_not_the_one_asked_for_are_refused():
    gallery = {"indexed": 100, "used": 94, "dropped": {"no_caption": 4, "image_truncated": 2}}
    found = Evaluation("birds", {}, gallery, NOTHING)
    check_dropped(found, 0.06)
    with pytest.raises(ValueError, match=r"birds: 6 of 100 .*\(4 no_caption, 2 image_truncated\).*max_bad_frac=0\.05"):
        check_dropped(found, 0.05)
    named = replace(found, gallery=gallery | {"examples": {"no_caption": ["a/1", "a/2"], "image_truncated": ["a/7"]}})
    with pytest.raises(ValueError, match=r"Such as no_caption: a/1, a/2; image_truncated: a/7\. .* with out=FILE"):
        check_dropped(named, 0.05)


def test_the_fingerprint_of_what_is_trained_on_has_lanes_and_weights_in_it(tmp_path: Path):
    write_shards(tmp_path, 8, 8, prefix="train-")
    splits = load_splits(DataConfig(path=str(tmp_path)))
    lanes, mix = Lanes(0, (8, 8), 4, 2, 1), Mix(0, (8, 8), (1.0, 2.0), 4, 10)
    orders: list[Order] = [
        Shuffle(0, 16, 4),
        lanes,
        replace(lanes, lanes=4),
        replace(lanes, window_shards=2),
        mix,
        replace(mix, weights=(2.0, 1.0)),
    ]
    found = [fingerprints(splits, order) for order in orders]
    assert len({each["train"] for each in found}) == len(orders) and len({each["val"] for each in found}) == 1
    assert splits.train is not None and found[0]["train"] == splits.train.fingerprint
    assert fingerprints(splits, replace(lanes, seed=1, batch_size=8)) == found[1], "these are named apart"
