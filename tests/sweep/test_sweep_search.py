"""A search over a curve instead of a training run: what it draws, remembers and stops."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipft.config import SearchConfig
from clipft.launch import Validation
from clipft.sweep.search import STUDY_FILE, Search, build_space, import_optuna, watch_from_elsewhere
from clipft.sweep.space import parse_axes
from clipft.sweep.trial import Trial, failed

AXES = parse_axes(["optim.lr=tag(log, interval(1e-6, 1e-2))", "loss.name=clip,siglip"], None)


def search(folder: Path, **settings: Any) -> Search:
    settings = {"n_trials": 12, "n_startup_trials": 4} | settings
    return Search(folder, build_space(AXES), SearchConfig(**settings))


def curve(trial: Trial) -> float:
    """Highest at 1e-4, and a little higher for one of the two words."""
    return 1.0 - abs(math.log10(float(trial.params["optim.lr"])) + 4) / 4 + 0.1 * (trial.params["loss.name"] == "clip")


def finish(found: Search, most: int = 99) -> list[Trial]:
    """Runs up to so many trials to their end."""
    done = []
    while len(done) < most and (trial := found.next()) is not None:
        done.append(replace(trial, status="finished", value=curve(trial), step=1))
        found.tell(done[-1])
    return done


def test_a_search_that_was_cut_off_draws_what_it_would_have_drawn(tmp_path):
    (tmp_path / "calm").mkdir()
    (tmp_path / "cut").mkdir()
    calm = finish(search(tmp_path / "calm"))
    assert [trial.number for trial in calm] == list(range(12))
    first = search(tmp_path / "cut")
    finish(first, most=7)
    cut_off = first.next()
    again = search(tmp_path / "cut")
    assert len(again.trials) == 8 and again.trials[7].status == "waiting"
    rest = finish(again)
    assert cut_off and rest[0].number == 7 and rest[0].params == cut_off.params
    assert again.trials == calm


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_what_is_drawn_follows_from_sampler_and_seed(tmp_path, sampler):
    folders = [tmp_path / name for name in ("one", "same", "other")]
    for folder in folders:
        folder.mkdir()
    one, same, other = (
        [t.params for t in finish(search(folder, sampler=sampler, seed=seed))]
        for folder, seed in zip(folders, (0, 0, 1), strict=True)
    )
    assert one == same and one != other


def test_tpe_finds_a_better_value_than_chance(tmp_path):
    found = {}
    for sampler in ("tpe", "random"):
        best = []
        for seed in range(2):
            folder = tmp_path / f"{sampler}-{seed}"
            folder.mkdir()
            best.append(max(curve(t) for t in finish(search(folder, sampler=sampler, seed=seed, n_trials=16))))
        found[sampler] = sum(best)
    assert found["tpe"] > found["random"]


def test_a_failed_trial_comes_again_in_its_folder_at_the_next_start_only(tmp_path):
    first = search(tmp_path, n_trials=3)
    bad = first.next()
    assert bad
    first.tell(failed(bad, "no room"))
    assert [trial.number for trial in finish(first)] == [1, 2]
    assert [trial.status for trial in first.trials] == ["failed", "finished", "finished"]
    assert first.trials[0].error == "no room"
    again = search(tmp_path, n_trials=3)
    assert again.trials[0].params == bad.params and again.planned == 3
    assert [trial.number for trial in finish(again)] == [0]
    assert [trial.status for trial in search(tmp_path, n_trials=3).trials] == ["finished"] * 3


def test_more_trials_go_on_with_a_finished_search(tmp_path):
    finish(search(tmp_path, n_trials=3))
    assert [trial.number for trial in finish(search(tmp_path, n_trials=5))] == [3, 4]


def validations(found: Search, trial: Trial, values: list[float], of: int) -> int | None:
    """The step at which the trial would be stopped, given its values at equal distances."""
    for number, value in enumerate(values, 1):
        if found.prune(trial, Validation(of * number // len(values), of, value)):
            return of * number // len(values)
    return None


def test_a_trial_below_the_median_at_the_same_share_of_its_steps_is_stopped(tmp_path):
    found = search(tmp_path, n_startup_trials=2)
    for steps, values in ((100, [0.1, 0.5, 0.6, 0.7]), (50, [0.2, 0.4, 0.6, 0.8])):
        trial = found.next()
        assert trial and validations(found, trial, values, of=steps) is None
        found.tell(replace(trial, status="finished", value=values[-1], step=steps))
    good, bad, late = found.next(), found.next(), found.next()
    assert good and bad and late
    assert validations(found, good, [0.3, 0.5, 0.7, 0.9], of=200) is None
    assert validations(found, bad, [0.3, 0.3, 0.3, 0.3], of=200) == 100  # 0.3 is less than 0.45, the median half way
    assert validations(found, late, [0.3, 0.5, 0.7, 0.7], of=200) is None  # the last step is made anyway
    found.tell(replace(bad, status="pruned", value=0.3, step=50))
    assert found.trials[bad.number].status == "pruned" and found.trials[bad.number].value == 0.3
    assert bad.number not in [trial.number for trial in finish(search(tmp_path, n_startup_trials=2))]


def test_without_a_pruner_none_is_stopped(tmp_path):
    found = search(tmp_path, n_startup_trials=1, pruner="none")
    for values in ([0.9, 0.9, 0.9], [0.1, 0.1, 0.1]):
        trial = found.next()
        assert trial and validations(found, trial, values, of=30) is None
        found.tell(replace(trial, status="finished", value=values[-1], step=30))


def test_a_trial_that_goes_on_still_has_its_earlier_validations(tmp_path):
    found = search(tmp_path, n_startup_trials=1)
    trial = found.next()
    assert trial
    validations(found, trial, [0.9, 0.9], of=10)
    found.tell(replace(trial, status="finished", value=0.9, step=10))
    cut_off = found.next()
    assert cut_off and not found.prune(cut_off, Validation(5, 10, 0.95))
    again = search(tmp_path, n_startup_trials=1)
    resumed = again.next()
    assert resumed and resumed.number == cut_off.number
    assert not again.prune(resumed, Validation(5, 10, 0.1))  # told again after the resume: the first word holds
    assert not again.prune(resumed, Validation(8, 10, 0.1))


def test_a_watch_in_another_process_sees_the_same_study(tmp_path):
    found = search(tmp_path, n_startup_trials=1)
    first = found.next()
    assert first
    validations(found, first, [0.9, 0.9], of=10)
    found.tell(replace(first, status="finished", value=0.9, step=10))
    second = found.next()
    assert second
    watch = watch_from_elsewhere(tmp_path, second.number, found.settings)
    assert watch(Validation(5, 10, 0.1)) is True


@pytest.mark.parametrize("rest", [b'{"op_code": 4, "wor', b"x"])
def test_a_file_that_was_cut_off_in_a_line_is_gone_on_with(tmp_path, rest):
    finish(search(tmp_path, n_trials=2))
    with (tmp_path / STUDY_FILE).open("ab") as file:
        file.write(rest)
    (tmp_path / f"{STUDY_FILE}.lock").symlink_to(STUDY_FILE)  # as a kill within a write leaves it
    assert [trial.number for trial in finish(search(tmp_path, n_trials=3))] == [2]
    assert len(search(tmp_path, n_trials=3).trials) == 3


def test_a_missing_or_old_optuna_is_answered_with_the_command_that_installs_it(monkeypatch):
    import optuna

    monkeypatch.setattr(optuna, "__version__", "2.10.1")
    with pytest.raises(ValueError, match=r"2\.10\.1 is too old.*pip install 'optuna>=4'"):
        import_optuna()
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="pip install 'optuna>=4'"):
        build_space(AXES)
