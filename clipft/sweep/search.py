"""The trials of a search: optuna says what to try next, and keeps in a file what has been tried."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipft.config import SearchConfig
from clipft.launch import Validation
from clipft.sweep.space import Axis, as_text
from clipft.sweep.trial import Trial, Watch

if TYPE_CHECKING:  # half a second, and an extra
    import optuna

STUDY, STUDY_FILE = "sweep", "study.log"
Space = dict[str, "optuna.distributions.BaseDistribution"]
WARM_UP_PERCENT = 20  # of a trial's steps, in which it is not pruned: the rate has only just risen


class Search:
    def __init__(self, folder: Path, space: Space, settings: SearchConfig):
        """Goes on with the study in the folder; trials that failed or were cut off come again, in their folders."""
        self.space, self.settings = space, settings
        mend(folder / STUDY_FILE)
        self.study = open_study(folder, settings)
        self.running: dict[int, optuna.Trial] = {}
        self._bring_back()

    @property
    def trials(self) -> list[Trial]:
        return [trial_of(frozen) for _, frozen in sorted(newest(self.study).items())]

    @property
    def planned(self) -> int:
        return max(self.settings.n_trials, len(newest(self.study)))

    def next(self) -> Trial | None:
        """A trial to start; None where there is none left."""
        import optuna

        folders = newest(self.study)
        waiting = [n for n, frozen in folders.items() if frozen.state == optuna.trial.TrialState.WAITING]
        if not waiting and len(folders) >= self.settings.n_trials:
            return None
        number = min(waiting, default=len(folders))
        # Drawn anew for each trial, so that a search that was interrupted goes on as one that was not.
        self.study.sampler = build_sampler(self.settings, number)
        trial = self.study.ask(self.space)
        number = trial.user_attrs.get("folder", number)
        trial.set_user_attr("folder", number)
        for percent, value in trial.user_attrs.get("validations", []):
            trial.report(value, percent)
        self.running[number] = trial
        frozen = newest(self.study)[number]
        return Trial(number, params_of(frozen), seconds=trial.user_attrs.get("seconds", 0.0))

    def tell(self, trial: Trial) -> None:
        """Takes down how a trial ended; one that was stopped stays open, for the next start."""
        from optuna.trial import TrialState

        asked = self.running.pop(trial.number)
        asked.set_user_attr("status", trial.status)
        asked.set_user_attr("value", trial.value)
        asked.set_user_attr("step", trial.step)
        asked.set_user_attr("seconds", trial.seconds)
        asked.set_user_attr("error", trial.error)
        if trial.counts:
            self.study.tell(asked, trial.value)
        elif trial.status != "waiting":
            self.study.tell(asked, state=TrialState.PRUNED if trial.status == "pruned" else TrialState.FAIL)

    def prune(self, trial: Trial, validation: Validation) -> bool:
        """Takes down a validation; true when the trial is not worth its remaining steps."""
        return report(self.running[trial.number], validation)

    def _bring_back(self) -> None:
        """Asks again for the trials that an earlier start has not brought to an end.

        Only one sweep holds the folder, so a trial that runs in the file runs nowhere.
        """
        from optuna.trial import TrialState

        for frozen in self.study.get_trials(states=[TrialState.RUNNING]):
            self.study.tell(frozen.number, state=TrialState.FAIL)
        for number, frozen in sorted(newest(self.study).items()):
            if frozen.state == TrialState.FAIL:
                validations = sorted(frozen.intermediate_values.items())
                seconds = frozen.user_attrs.get("seconds", 0.0)
                attributes = {"folder": number, "validations": validations, "seconds": seconds}
                self.study.enqueue_trial(frozen.params, user_attrs=attributes)


def watch_from_elsewhere(folder: Path, number: int, settings: SearchConfig) -> Watch:
    """`Search.prune` of a trial that runs in another process than its search."""
    import optuna

    study = open_study(folder, settings)
    trial = optuna.Trial(study, newest(study)[number]._trial_id)
    return lambda validation: report(trial, validation)


def report(trial: "optuna.Trial", validation: Validation) -> bool:
    """Takes down a validation in the study; true when the pruner would stop the trial.

    Trials are compared at equal shares of their steps: with another batch size an epoch has other step numbers.
    """
    percent = round(100 * validation.step / validation.of)
    reported = trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
    if percent not in reported:  # a trial that goes on repeats what came after its last saved state
        trial.report(validation.value, percent)
    return validation.step < validation.of and bool(trial.should_prune())  # optuna's is numpy's


def open_study(folder: Path, settings: SearchConfig) -> "optuna.Study":
    optuna = import_optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        study_name=STUDY,
        storage=JournalStorage(JournalFileBackend(str(folder / STUDY_FILE))),
        direction="maximize",
        load_if_exists=True,
        pruner=build_pruner(settings),
    )


def import_optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError("hydra/sweeper=optuna needs a package. Run: pip install 'optuna>=4'") from error
    if int(optuna.__version__.split(".")[0]) < 4:
        raise ValueError(f"optuna {optuna.__version__} is too old. Run: pip install 'optuna>=4'")
    return optuna


def mend(file: Path) -> None:
    """Cuts off what a kill or a full disk left of the last line, to which the next would be glued, and an old lock."""
    if file.exists():
        raw = file.read_bytes()
        if not raw.endswith(b"\n"):
            with file.open("r+b") as damaged:
                damaged.truncate(raw.rfind(b"\n") + 1)
    file.with_name(f"{file.name}.lock").unlink(missing_ok=True)


def build_sampler(settings: SearchConfig, number: int) -> "optuna.samplers.BaseSampler":
    import optuna

    seed = settings.seed * 1_000_003 + number
    if settings.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar: trials side by side are not all drawn at the same place.
    return optuna.samplers.TPESampler(n_startup_trials=settings.n_startup_trials, constant_liar=True, seed=seed)


def build_pruner(settings: SearchConfig) -> "optuna.pruners.BasePruner":
    import optuna

    if settings.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(settings.n_startup_trials, n_warmup_steps=WARM_UP_PERCENT)


def build_space(axes: list[Axis]) -> Space:
    """What optuna draws from; raises where there is nothing to draw, or no optuna."""
    if not axes:
        raise ValueError(
            "hydra/sweeper=optuna has nothing to search. Give a key an interval or values: "
            "'optim.lr=tag(log, interval(1e-6, 1e-4))', train.batch_size=64,128."
        )
    import_optuna()
    return {axis.key: distribution(axis) for axis in axes}


def distribution(axis: Axis) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.low is None or axis.high is None:
        return CategoricalDistribution(axis.values)
    if axis.log and axis.step is not None:
        raise ValueError(f"{axis.key}={axis.text}: a range has equal steps. Use tag(log, interval(...)), or values.")
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return IntDistribution(axis.low, axis.high, log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def newest(study: "optuna.Study") -> dict[int, "optuna.trial.FrozenTrial"]:
    """The last trial of each folder: one that came again is another trial for optuna."""
    found = {}
    for frozen in study.get_trials(deepcopy=False):
        if "folder" in frozen.user_attrs:  # else it was cut off before it was more than a draw
            found[frozen.user_attrs["folder"]] = frozen
    return found


def params_of(frozen: "optuna.trial.FrozenTrial") -> dict[str, str]:
    params = frozen.params or frozen.system_attrs.get("fixed_params", {})
    return {key: as_text(value) for key, value in params.items()}


def trial_of(frozen: "optuna.trial.FrozenTrial") -> Trial:
    attributes = frozen.user_attrs
    return Trial(
        frozen.user_attrs["folder"],
        params_of(frozen),
        status=attributes.get("status", "waiting"),
        value=attributes.get("value"),
        step=attributes.get("step"),
        seconds=attributes.get("seconds", 0.0),
        error=attributes.get("error", ""),
    )
