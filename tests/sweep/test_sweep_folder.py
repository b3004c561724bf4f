"""Where a sweep lies, and what makes it the same sweep."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from clipft.config import Config, GridConfig, SearchConfig
from clipft.sweep.folder import enter
from clipft.sweep.space import parse_axes

LR = ["optim.lr=1,2"]


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def base(*overrides: str) -> Any:
    given = ["model.name=tiny", "model.pretrained=null", "data.name=toy", *overrides]
    return OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.from_dotlist(given))


def folder(*overrides: str, name: str | None = None, swept: list[str] = LR, settings=None) -> str:
    return str(enter(base(*overrides), name, parse_axes(swept, None), settings or GridConfig()))


def test_a_sweep_is_called_after_model_and_data_or_its_experiment_and_numbered():
    assert folder() == folder("train.max_time=1h", "trainer.devices=2") == "runs/tiny-toy-sweep"
    assert folder("train.seed=1") == "runs/tiny-toy-sweep-2"
    assert folder("name=toy") == "runs/toy-sweep"
    assert folder("runs_dir=elsewhere") == "elsewhere/tiny-toy-sweep"
    assert folder(name="mine") == "runs/mine"


def test_a_grid_may_get_other_values_and_a_search_more_trials():
    assert folder(swept=["optim.lr=1,2"]) == folder(swept=["optim.lr=1,2,3"])
    assert folder(swept=["optim.lr=1,2", "train.seed=0,1"]) == "runs/tiny-toy-sweep-2"
    interval = ["optim.lr=interval(1, 2)"]
    search = folder(swept=interval, settings=SearchConfig(n_trials=5))
    assert folder(swept=interval, settings=SearchConfig(n_trials=9, n_jobs=2)) == search
    assert folder(swept=["optim.lr=interval(1, 3)"], settings=SearchConfig()) != search
    assert folder(swept=interval, settings=SearchConfig(seed=1)) != search


def test_another_sweep_under_the_same_name_is_shown_and_refused_or_moved_away():
    folder(name="mine")
    with pytest.raises(ValueError, match=r"train\.seed: 0 -> 1\nUse another name="):
        folder("train.seed=1", name="mine")
    assert folder("train.seed=1", "resume=restart", name="mine") == "runs/mine"
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine", "mine.old-1"]
    with pytest.raises(ValueError, match="resume=force"):
        folder("train.seed=1", "resume=force", name="mine")


def test_the_folder_of_a_run_is_no_place_for_a_sweep():
    Path("runs/tiny-toy").mkdir(parents=True)
    Path("runs/tiny-toy/config.yaml").touch()
    with pytest.raises(ValueError, match="is no sweep"):
        folder(name="tiny-toy")
    assert folder() == "runs/tiny-toy-sweep"
