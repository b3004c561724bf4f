"""The README's commands are run, or, where they take long, composed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from small import make_data

from clipft.arguments import options_of
from clipft.cli import COMMANDS, main, split_command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMAND_LINES = [line for line in LINES if re.match(r"(python train\.py|clipft (?=\w)|pip install uv)", line)]


def test_the_two_commands_come_first():
    assert COMMAND_LINES[:2] == [
        "pip install uv && uv run python train.py",
        "pip install uv && uv run --extra dev pytest",
    ]


def arguments_of(line: str) -> list[str]:
    """What main() gets."""
    words = shlex.split(line)
    return ["train", *words[2:]] if words[0] == "python" else words[1:]


SWEEP_LINES = [line for line in COMMAND_LINES if " -m " in line]


@pytest.mark.parametrize("line", [line for line in COMMAND_LINES if not line.startswith("pip") and " -m " not in line])
def test_a_command_of_the_readme_composes(line, tmp_path, monkeypatch, capsys):
    """Up to its composed config, with the folders that it names in place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    for name in re.findall(r"data=(\w+)", line):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
    for name in re.findall(r"model=(runs/[\w-]+)", line):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    name, rest = split_command(arguments_of(line))
    assert name in COMMANDS
    assert main([*name.split(), *rest, "--cfg", "job"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", SWEEP_LINES)
def test_a_sweep_of_the_readme_could_start(line, tmp_path, monkeypatch, capsys):
    """Up to the folder, which is taken: the trials' configs have been composed and checked by then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    make_data(tmp_path / "small", num_train=300).rename(tmp_path / "data" / "mydata")
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "config.yaml").touch()
    assert main([*arguments_of(line), "model.pretrained=null", "name=taken"]) == 2
    assert "is no sweep" in capsys.readouterr().err


def test_every_option_that_the_page_on_data_names_is_one():
    page = (ROOT / "data/README.md").read_text()
    named = set(re.findall(r"(?<![\w./])([a-z_]+(?:\.[a-z_]+)*)=", page))
    known = {option.key for command in COMMANDS.values() for option in options_of(command.schema)}
    assert {"source", "split.val", "image.max_size", "csv.encoding"} <= named
    assert named - known <= {"data", "model", "image", "caption"}, named - known  # groups, and words of the first line


def test_every_file_of_the_map_exists():
    block = next(block for block in BLOCKS if block.startswith("train.py "))
    folder = ROOT
    for line in block.splitlines():
        names = [name for name in re.split(r"\s{2,}", line.strip())[0].split() if re.search(r"[./]", name)]
        folder = ROOT / "clipft" if line.startswith("  ") else ROOT
        for name in names:
            assert (folder / name).exists(), name
    for name in re.findall(r"`((?:clipft|tests|conf|data)/[\w./]*)`", README):
        assert (ROOT / name).exists(), name


@pytest.mark.process
def test_the_main_job_runs_from_a_checkout(tmp_path):
    """The README's first command in a copy of the checkout's working directory, three steps of it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "train.max_steps=3", "name=first"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "toy, test split: 300 images" in done.stdout and (tmp_path / "runs" / "first" / "results.json").exists()
