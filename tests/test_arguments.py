import pytest

from clipft.arguments import options_of, to_overrides
from clipft.config import Config, EvaluateConfig, GridConfig, PackConfig, SearchConfig


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_option_of_every_command_is_documented():
    for schema in (Config, EvaluateConfig, PackConfig, GridConfig, SearchConfig):
        assert all(len(option.doc) > 10 for option in options_of(schema))


def test_train_alone_is_the_toy_experiment_and_keeps_its_overrides():
    assert to_overrides([], Config) == ["experiment=toy"]
    assert to_overrides(["optim.lr=1e-3"], Config) == ["optim.lr=1e-3", "experiment=toy"]
    assert to_overrides(["tune=lit", "--cfg", "job"], Config) == ["tune=lit", "--cfg", "job", "experiment=toy"]
    assert to_overrides(["--cfg", "job"], Config) == ["--cfg", "job", "experiment=toy"]
    assert to_overrides(["model=tiny", "data=toy"], Config) == ["model=tiny", "data=toy"]
    assert to_overrides(["data.train=x.tar"], Config) == ["data.train='x.tar'"]


@pytest.mark.parametrize(
    "argument, message",
    [
        ("optim.lrr=1", "Did you mean optim.lr?"),
        ("lr=1e-5", "Did you mean optim.lr?"),
        ("batch_size=3", "Did you mean"),
        ("train.lr=1", "Did you mean"),
        ("+train.seed=3", "Did you mean train.seed?"),
        ("model=ViT-B-3", "Did you mean ViT-B-32"),
        ("model=vit-b-32", "Did you mean ViT-B-32"),
        ("experiment=toi", "Did you mean toy?"),
        ("data=toi", "Did you mean data=toy?"),
        ("train.seed", "options are written train.seed=VALUE"),
        ("qqq=1", "--help lists all options"),
    ],
)
def test_what_is_unknown_is_answered_with_the_closest_name(argument, message):
    with pytest.raises(ValueError) as error:
        to_overrides([argument], Config)
    assert message in str(error.value)


def test_unquoted_braces_are_answered_with_the_quoting():
    with pytest.raises(ValueError, match=r"given twice.*quote them"):
        to_overrides(["model=tiny", "data.train=x-0.tar", "data.train=x-1.tar"], Config)


def test_free_text_reaches_hydra_quoted():
    assert to_overrides(["name=1e-5", "data=toy"], Config)[0] == "name='1e-5'"
    assert to_overrides(["data.train=a/{000..009}.tar"], Config) == ["data.train='a/{000..009}.tar'"]
    assert to_overrides(["data.train=['a','b']"], Config) == ["data.train=['a','b']"]
    assert to_overrides(["name=it's"], Config)[0] == r"name='it\'s'"


def test_weights_are_free_text_and_are_not_forgotten_beside_a_model_that_brings_its_own(tmp_path):
    given = ["model.pretrained=a(1)/epoch=3.pt", "data=toy"]
    expected = "model.pretrained='a(1)/epoch=3.pt'"
    assert to_overrides(["model=tiny", *given], Config) == ["model=tiny", expected, "data=toy"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    for arguments in (["model=run", *given], [*given, "model=run"]):  # refused later, by name
        found = to_overrides(arguments, Config)
        assert expected in found and "model.pretrained=null" not in found
    assert "model.pretrained=null" in to_overrides(["model=run", "data=toy"], Config)


def test_a_packed_folder_is_found_by_name_and_by_path(tmp_path):
    (tmp_path / "data" / "birds").mkdir(parents=True)
    expected = ["data.name='birds'", "data.path='data/birds'"]
    assert to_overrides(["data=birds"], Config) == expected
    assert to_overrides(["data=data/birds"], Config) == expected


def test_a_yaml_of_the_working_directory_goes_before_a_folder(tmp_path):
    (tmp_path / "data" / "birds").mkdir(parents=True)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "birds.yaml").write_text("path: elsewhere\n")
    assert to_overrides(["data=birds"], Config) == ["data=birds"]


def test_missing_data_says_which_command_makes_it():
    with pytest.raises(ValueError, match="clipft data pack source=FOLDER out=data/birds"):
        to_overrides(["data=birds"], Config)


def test_a_run_directory_is_a_model(tmp_path):
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").touch()
    assert to_overrides(["model=runs/a", "data=toy"], Config)[:2] == [
        "model.name='runs/a'",
        "model.pretrained=null",
    ]


def test_hydras_own_words_pass():
    arguments = ["-m", "--cfg", "job", "hydra.verbose=true", "optim.lr=1e-4,1e-5", "model=tiny,ViT-B-32"]
    assert to_overrides(arguments, Config) == arguments
