"""The command line, in this process where that is honest, in one of its own where start-up is the point."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small import make_data

from clipft import launch
from clipft.cli import COMMANDS, EXAMPLES, main

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must end with exit code 2, before it has made anything."""
    assert main(list(arguments)) == 2
    assert list(Path.cwd().iterdir()) == []
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["trian"], ["clipft train", "data pack"]),
        (["train", "optim.lrr=1"], ["optim.lr?"]),
        (["train", "optim.lr=fast"], ["optim.lr", "fast"]),
        (["train", "model=tiny", "data.path=nowhere", "optim.lr=0"], ["optim.lr=0", "greater than 0"]),
        (["train", "model=tiny", "data.path=nowhere", "optim.lr=-1"], ["optim.lr=-1"]),
        (["train", "model=tiny", "data.path=nowhere", "loss.name=clap"], ["loss.name='clap'", "clip"]),
        (["train", "model=tiny", "data.path=nowhere", "eval.every=often"], ["eval.every='often'", "10min"]),
        (["train", "model=tiny", "data.path=nowhere", "checkpoint.every=0"], ["checkpoint.every"]),
        (["train", "model=tiny", "data.path=nowhere", "train.batch_size=1"], ["train.batch_size"]),
        (
            ["train", "model=tiny", "data.path=nowhere", "trainer.precision=half"],
            ["trainer.precision", "bf16-mixed"],
        ),
        (["train", "model=tiny", "data.path=nowhere"], ["nowhere", "clipft data pack"]),
        (
            ["train", "model=tiny", "data=mydata"],
            ["data/mydata", "clipft data pack source=FOLDER out=data/mydata"],
        ),
        (["train", "model=tiny"], ["no data", "data=NAME"]),
        (["train", "model=RN101", "data=mydata"], ["model.pretrained", "null"]),
        (["train", "model=ViT-B-32", "model.pretrained=opena", "data=mydata"], ["openai"]),
        (["evaluate", "model=tiny", "data=nowhere"], ["data=nowhere"]),
        (["export"], ["run is required"]),
        (["export", "run=nowhere"], ["nowhere"]),
        (["data", "pack", "source=nowhere", "out=x"], ["nowhere", "metadata.jsonl"]),
    ],
)
def test_bad_input_is_named_with_what_to_do(capsys, arguments, expected):
    message = failing(capsys, *arguments)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("group, value", [("data", "FOLDER"), ("tune", "lit"), ("experiment", "toy")])
def test_help_names_the_groups_that_the_command_takes_and_no_others(name, group, value, capsys):
    assert main([*name.split(), "--help"]) == 0
    groups = re.search(r"^Groups: (.+)$", capsys.readouterr().out, re.MULTILINE)
    named = groups is not None and re.search(rf"\b{group}=\S*\b{value}\b", groups[1]) is not None
    capsys.readouterr()
    main([*name.split(), f"{group}=nothing"])
    refused = f"{group} is no option" in capsys.readouterr().err
    assert named != refused


def test_help_shows_ten_examples_and_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(EXAMPLES.splitlines()) == 10 and EXAMPLES in text
    assert all(
        f"clipft {name}" in text for name in ("train", "evaluate", "export", "data pack", "data index", "data verify")
    )
    assert main(["evaluate", "--help"]) == 0
    assert "relevance" in capsys.readouterr().out


def test_the_composed_config_can_be_shown(capsys):
    assert main(["train", "model=tiny", "data=toy", "optim.lr=0.5", "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    assert "lr: 0.5" in text and "name: tiny" in text and "_target_" not in text
    assert main(["train", "optim.lr=0.5", "--cfg", "job", "train.seed=7"]) == 0  # a flag between overrides
    assert "seed: 7" in capsys.readouterr().out


def test_a_changed_config_is_shown_whole(capsys, monkeypatch):
    make_data(Path("data"))  # data/packed
    monkeypatch.setattr(launch, "launch", lambda *_: 0)
    arguments = ["train", "model=tiny", "data=packed", "name=one", "train.batch_size=8"]
    assert main(arguments) == 0
    assert main([*arguments, "optim.lr=0.5"]) == 2
    message = capsys.readouterr().err
    assert "optim.lr: 1e-05 -> 0.5" in message and "resume=force" in message and "resume=restart" in message


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_of_the_command_line_goes_before_that_of_an_experiment(path, capsys):
    assert main(["train", f"experiment={path.stem}", "data=mydata", "--cfg", "job"]) == 0
    assert "path: data/mydata" in capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["--help"], ["optim.lrr=1"], ["data=mydata", "optim.lr=0"]])
def test_neither_torch_nor_open_clip_is_imported_to_answer(tmp_path, arguments):
    code = (
        "import sys; from clipft.cli import main; main(['train', *sys.argv[1:]]); "
        "sys.exit(len({'torch', 'open_clip', 'pytorch_lightning', 'wandb', 'webdataset'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True).returncode == 0
