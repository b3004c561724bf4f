"""Trackers get what they are promised, and none of them can end a run."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from small import wait_for

from clipft.config import Config, ModelConfig
from clipft.learn import loggers
from clipft.learn.loggers import Retrieved, build_loggers, log_end, redact

pytestmark = [
    pytest.mark.process,  # wandb starts a service
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of wandb's and tensorboard's own making
]
RESULTS = {"base": {"x/recall@1": 0.25}, "best": {"x/recall@1": 0.5}, "last": {"x/recall@1": 0.5}, "meta": {}}


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No settings of the person who runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def config(logger: str) -> Config:
    return Config(name="run", logger=logger, model=ModelConfig(name="tiny", pretrained=None))


def retrieved() -> list[Retrieved]:
    pixels = np.zeros((8, 8, 3), np.uint8)
    return [Retrieved("a dog", pixels, [pixels, pixels], rank=2)]


def track(tmp_path: Path, logger: str) -> None:
    (each,) = build_loggers(config(logger), tmp_path)
    each.log_metrics({"train/loss": 1.5}, 1)
    log_end(each, RESULTS, retrieved())


def test_without_a_logger_there_is_none(tmp_path):
    assert build_loggers(config("none"), tmp_path) == []


def test_wandb_without_a_key_leaves_an_offline_run_with_both_tables(tmp_path):
    track(tmp_path, "wandb")
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    wait_for(
        lambda: next(run.glob("*.wandb")).stat().st_size > 1000
    )  # what `wandb sync` uploads; its service writes it
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in run.rglob("*.table.json")}
    assert tables["results"] == {
        "columns": ["metric", "base", "best", "last"],
        "data": [["x/recall@1", 0.25, 0.5, 0.5]],
    }
    assert tables["retrievals"]["data"][0][:2] == ["a dog", 2]
    assert list(run.rglob("media/images/*.png"))


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path):
    track(tmp_path, "wandb")
    track(tmp_path, "wandb")
    ids = {path.stem.removeprefix("run-") for path in (tmp_path / "wandb").rglob("*.wandb")}
    assert ids == {(tmp_path / "wandb_id").read_text()}


def test_a_server_that_does_not_answer_costs_one_warning(tmp_path, monkeypatch, capsys):
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(loggers, "WAIT_S", 2.0)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        track(tmp_path, "wandb")
    assert capsys.readouterr().err.count("warning: wandb is not reached") == 1
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_tensorboard_writes_an_event_file(tmp_path):
    track(tmp_path, "tensorboard")
    (events,) = (tmp_path / "tensorboard").glob("events.out.*")
    assert b"train/loss" in events.read_bytes() and b"a dog" in events.read_bytes()


def test_what_looks_like_a_secret_is_not_shown():
    node = {"api_key": "abc", "nested": [{"token": "x", "lr": 1}], "password": None}
    assert redact(node) == {"api_key": "***", "nested": [{"token": "***", "lr": 1}], "password": None}
