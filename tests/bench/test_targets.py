import shutil

import pytest
import torch
from alone import alone

from clipft.bench.__main__ import build_parser, main
from clipft.bench.report import Spread
from clipft.bench.targets import gpu_arguments, targets


def test_the_runs_that_fill_a_gpu_are_ones_that_the_command_knows():
    runs = gpu_arguments(cores=16)
    options = {name: build_parser().parse_args(["--name", name, *arguments]) for name, arguments in runs.items()}
    assert all(options[name].benchmark == arguments[0] for name, arguments in runs.items())
    assert options["train"].workers == 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_started(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["gpu"])
    assert ended.value.code == 2 and "torch sees no CUDA device" in capsys.readouterr().err


def test_targets_are_read_from_the_tables_and_left_open_where_a_table_has_no_figure(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    steps = {f"step-{name}": [{"what": "ours", "MFU": 0.1}] for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14")}
    found = {"data": [{"what": "shards to batches, 512 px", "ours /s/core": 600.0}], "train": [], **steps}
    assert [row["found"] for row in targets(found)] == [None, None, None]
    for name, mfu in (("ViT-B-32", 0.3), ("ViT-B-16", 0.41), ("ViT-L-14", 0.45)):
        found[f"step-{name}"].append({"what": "ours, compiled", "MFU": mfu, "samples/s": 6000.0})
    found["train"] = [{"round": 1, "ratio": 1.7}, {"round": "all", "ratio": Spread(1.6, 1.5, 1.7)}]
    assert [row["found"] for row in targets(found)] == [1.6, 0.45, 600 * 15 / 6000]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it
@alone
def test_a_compiled_step_executes_the_flops_of_a_plain_one_at_the_length_of_its_bucket():
    from clipft.bench.stepping import bench_step, place
    from clipft.run import quiet_libraries

    quiet_libraries()
    rows = {row["what"]: row for row in bench_step(place("tiny", 4, torch.device("cpu"), "32-true"), 1, 1, True)}
    assert rows["ours"]["TFLOP a step"] <= rows["ours, compiled"]["TFLOP a step"] <= rows["plain loop"]["TFLOP a step"]
