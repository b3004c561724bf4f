"""python -m clipft.bench: what it prints and leaves."""

import json

import pytest

from clipft.bench.__main__ import BENCHMARKS, main


def test_a_benchmark_prints_a_table_and_leaves_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--out", "found", "--device", "cpu", "loss", "--batches", "64", "--worlds", "1", "--width", "8"])
    printed = capsys.readouterr().out
    assert "time and memory of the loss and its gradients" in printed and "open_clip local" in printed
    assert len(json.loads((tmp_path / "found/loss.json").read_text())["rows"]) == 2


def test_whole_runs_are_left_out_and_said_so_without_the_other_python(tmp_path, capsys):
    main(["--out", str(tmp_path), "--device", "cpu", "train"])
    assert "left out, for want of --open-clip-python" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [[], ["speed"], ["loss", "--batch", "64", "--colour"]])
def test_what_is_no_benchmark_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and "usage: python -m clipft.bench" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["train", "--warm-up", "0"], ["step", "--rounds", "-1"], ["data", "--sides", "x"]])
def test_counts_are_at_least_one(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert f"argument {words[1]}: {words[2]!r} must be 1 or more" in capsys.readouterr().err


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed and benchmark.doc in printed for name, benchmark in BENCHMARKS.items())
