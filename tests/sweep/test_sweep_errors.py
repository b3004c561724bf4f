"""Sweeps that cannot work are answered before anything is started."""

from pathlib import Path

import pytest
from small import make_data

from clipft.arguments import check_sweeper
from clipft.cli import main
from clipft.config import GridConfig, SearchConfig


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


SEARCH = "hydra/sweeper=optuna"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["optim.lrr=1,2"], ["optim.lrr is no option", "optim.lr?"]),
        (["optim.lr=1,2", "optim.beta1=3"], ["optim.beta1=3.0"]),
        (["optim.lr=fast,slow"], ["no trial can be started", "optim.lr=fast: ", "optim.lr=slow: "]),
        (["train.batch_size=900,901"], ["train.batch_size=900: ", "more than the 40"]),
        (["optim.lr=interval(1,2)"], ["hydra/sweeper=optuna"]),
        (["optim.lr=1,2", "resume=force", "name=x"], ["resume=force"]),
        (["optim.lr=1,2", "hydra/sweeper=basic"], ["hydra/sweeper=basic", "grid, optuna"]),
        (["optim.lr=1,2", "hydra.sweeper.n_trials=3"], ["n_trials belongs to a search", SEARCH]),
        (["optim.lr=1,2", "hydra.sweeper.n_jobs=0"], ["hydra.sweeper.n_jobs=0", "greater than 0"]),
        (["optim.lr=1,2", "hydra/launcher=joblib", "hydra.sweeper.n_jobs=2"], ["n_jobs=2 would be ignored"]),
        ([SEARCH, "optim.lr=1"], ["nothing to search"]),
        ([SEARCH, "optim.lr=interval(-2,-1)"], ["optim.lr=-2.0", "greater than 0"]),
        ([SEARCH, "optim.lr=interval(1,2)", "hydra.sweeper.n_trials=many"], ["hydra.sweeper.n_trials", "many"]),
    ],
)
def test_what_is_wrong_with_all_trials_ends_the_sweep_at_once(packed, capsys, arguments, expected):
    shared = ["model=tiny", "trainer.accelerator=cpu", "train.batch_size=8"]
    shared += [] if any(argument.startswith("data=") for argument in arguments) else [f"data.path={packed}"]
    given = {argument.partition("=")[0] for argument in arguments}
    words = [each for each in shared if each.partition("=")[0] not in given]
    assert main(["train", "-m", *words, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    assert all(part in message for part in expected), message
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    "schema, settings, message",
    [
        (GridConfig, {"n_jobs": 0}, r"hydra\.sweeper\.n_jobs=0"),
        (SearchConfig, {"n_jobs": -1}, r"hydra\.sweeper\.n_jobs=-1"),
        (SearchConfig, {"n_trials": 0}, r"hydra\.sweeper\.n_trials=0"),
        (SearchConfig, {"n_startup_trials": 0}, r"hydra\.sweeper\.n_startup_trials=0"),
        (SearchConfig, {"sampler": "magic"}, "hydra.sweeper.sampler='magic' is unknown. Use one of: tpe, random"),
        (SearchConfig, {"pruner": "magic"}, "hydra.sweeper.pruner='magic' is unknown. Use one of: median, none"),
        (SearchConfig, {"seed": -1}, r"hydra\.sweeper\.seed=-1"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(schema, settings, message):
    with pytest.raises(ValueError, match=message):
        schema(**settings)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["hydra/sweeper=optun"], "Did you mean optuna?"),
        (["hydra.sweeper.n_job=3"], "is no option of hydra/sweeper=grid. Did you mean hydra.sweeper.n_jobs?"),
        (["hydra/sweeper=optuna", "hydra.sweeper.n_trial=3"], "Did you mean hydra.sweeper.n_trials?"),
    ],
)
def test_a_misspelt_sweeper_or_setting_is_answered_with_the_closest(arguments, message):
    with pytest.raises(ValueError) as error:
        check_sweeper(arguments)
    assert message in str(error.value)
    check_sweeper(["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.verbose=true", "optim.lr=1,2"])


def test_a_yaml_file_can_say_what_is_swept_and_the_command_line_goes_before_it(tmp_path, packed, capsys):
    """Seen in the values that no trial can have."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra: {sweeper: {params: {train.batch_size: '900,901', optim.lr: '-1,-2'}}}\n"
    )
    shared = ["train", "-m", "experiment=mine", "model=tiny", f"data.path={packed}", "optim.lr=1e-3"]
    assert main(shared) == 2
    message = capsys.readouterr().err
    assert "  train.batch_size=900: " in message and "  train.batch_size=901: " in message


def test_several_values_without_m_are_answered_with_it(capsys):
    for argument in ("optim.lr=1,2", "optim.lr=interval(1,2)", "model=tiny,small"):
        assert main(["train", argument]) == 2
        assert "Add -m" in capsys.readouterr().err
    Path("with,comma").mkdir()
    assert main(["train", "model=tiny", "data=with,comma", "eval.also=[a,b]", "--cfg", "job"]) == 0


def test_torchrun_starts_no_sweep(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "-m", "optim.lr=1,2"]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_help_lists_the_options_of_both_sweepers(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "python train.py -m optim.lr=" in text and "hydra/sweeper=optuna" in text
    for key in ("n_trials", "n_jobs", "sampler", "pruner", "n_startup_trials", "seed", "params"):
        assert f"hydra.sweeper.{key} " in text
    assert main(["evaluate", "--help"]) == 0
    assert "hydra.sweeper" not in capsys.readouterr().out


def test_evaluate_under_m_leaves_no_file_of_hydras(packed, capsys):
    assert main(["evaluate", "-m", "model=tiny", f"data.path={packed}", "split=elsewhere,nowhere"]) == 2
    assert "split='elsewhere'" in capsys.readouterr().err and list(Path.cwd().iterdir()) == []
