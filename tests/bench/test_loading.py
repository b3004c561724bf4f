"""bench data: what is compared gives the same pictures and the same number of pairs."""

import gc

import pytest
import torch

from clipft.bench.loading import bench_data, differences
from clipft.bench.shards import draw_samples


def test_pictures_differ_from_pillows_by_one_step_at_most():
    largest, mean = differences([jpeg for jpeg, _ in draw_samples(300, 4)])
    assert largest <= 1 and 0 <= mean < 0.1


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_each_size_has_a_row_for_the_pictures_and_one_for_batches():
    threads = torch.get_num_threads()
    try:
        rows = bench_data([64, 96], num=64, rounds=1)
    finally:
        torch.set_num_threads(threads)
    gc.collect()  # the files that webdataset's reader leaves open, while warnings about them are off
    names = [f"{part}, {side} px" for side in (64, 96) for part in ("image path", "shards to batches")]
    assert [row["what"] for row in rows] == names
    assert all(row["ours /s/core"] > 0 and row["open_clip /s/core"] > 0 and row["ratio"].min > 0 for row in rows)
    assert [("largest difference" in row) for row in rows] == [True, False] * 2
