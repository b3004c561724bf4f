"""A sweep, read from top to bottom: what is tried, where it lies, the trials, the table."""

import signal
from importlib.util import find_spec
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig

from clipft.arguments import is_hydras, split_flags, to_overrides
from clipft.config import Config, GridConfig, SearchConfig
from clipft.rundir import locked
from clipft.sweep.compose import Composer, without_hydra
from clipft.sweep.folder import enter
from clipft.sweep.grid import Grid
from clipft.sweep.launched import SweepTask, run_launched
from clipft.sweep.places import places, visible_gpus
from clipft.sweep.plot import plot
from clipft.sweep.pool import Pool, Source
from clipft.sweep.results import CSV, command_of, print_table, write_csv
from clipft.sweep.search import Search, build_space
from clipft.sweep.show import Show
from clipft.sweep.space import OWN, Axis, as_number, end_points, grid_points, parse_axes
from clipft.sweep.trial import best_of


def run(context: HydraContext, master: DictConfig, task: SweepTask, settings: GridConfig | SearchConfig) -> int:
    """Runs the sweep, or goes on with it; the exit code."""
    base = without_hydra(master)
    own = own_arguments(task.arguments, settings.params)
    axes = parse_axes([each for each in to_overrides(["-m", *own], Config) if each != "-m"], context.config_loader)
    points = grid_points(axes) if isinstance(settings, GridConfig) else end_points(axes)
    space = build_space(axes) if isinstance(settings, SearchConfig) else {}
    fixed = [each for each in own if key_of(each) not in (*OWN, *(axis.key for axis in axes))]
    composer = Composer(context.config_loader, master, fixed)
    composer.check(points)
    launcher = master.hydra.runtime.choices["hydra/launcher"]
    check_launcher(launcher, settings)
    free = places_for(settings, base, axes) if launcher == "basic" else []
    named = any(key_of(each) == "name" for each in own)
    folder = enter(base, base.name if named else None, axes, settings)
    with locked(folder):
        source = Search(folder, space, settings) if isinstance(settings, SearchConfig) else Grid(folder, points)
        show = Show(folder, base.eval.select)
        how = f"{len(free)} at a time" if launcher == "basic" else f"by hydra/launcher={launcher}"
        show.say(headline(folder, source, axes, how, base.eval.select))
        if launcher == "basic":
            stop = Pool(source, folder, lambda trial: composer.compose(trial, folder), show, free).run()
        else:
            master.hydra.sweep.dir = str(folder)  # where launchers put files of their own
            started = Plugins.instance().instantiate_launcher(context, task, master)
            batch = settings.n_jobs or 1 if isinstance(settings, SearchConfig) else source.planned
            stop = run_launched(source, folder, composer, started, batch, show)
        flags, _ = split_flags(task.arguments)
        say_results(source, folder, axes, base.eval.select, task.program, [*flags, *own])
        return say_end(source, show, stop)


def own_arguments(typed: list[str], params: dict[str, str]) -> list[str]:
    """The key=value arguments as they were typed, and what a YAML file sweeps beside them."""
    own = [each for each in split_flags(typed)[1] if not is_hydras(each)]
    keys = {key_of(each) for each in own}
    return own + [f"{key}={value}" for key, value in params.items() if key not in keys]


def key_of(argument: str) -> str:
    return argument.partition("=")[0]


def places_for(settings: GridConfig | SearchConfig, base: DictConfig, axes: list[Axis]) -> list[dict[str, str]]:
    """Where trials run side by side; where trainer.devices is swept, each place has the most of them."""
    swept = [as_number(value) for axis in axes if axis.key == "trainer.devices" for value in axis.values]
    devices = int(max((number for number in swept if number), default=base.trainer.devices))
    return places(settings.n_jobs, devices, base.trainer.accelerator, visible_gpus())


def check_launcher(launcher: str, settings: GridConfig | SearchConfig) -> None:
    if launcher != "basic" and isinstance(settings, GridConfig) and settings.n_jobs is not None:
        raise ValueError(
            f"hydra.sweeper.n_jobs={settings.n_jobs} would be ignored: hydra/launcher={launcher} decides how many "
            "trials of a grid run side by side."
        )


def headline(folder: Path, source: Source, axes: list[Axis], how: str, select: str) -> str:
    done = sum(trial.over for trial in source.trials)
    swept = ", ".join(axis.key for axis in axes) or "no key"
    before = f" ({done} done before)" if done else ""
    return f"sweep   {folder}: {source.planned} trials{before} over {swept}, {how}; best is the highest val {select}"


def say_results(
    source: Source, folder: Path, axes: list[Axis], metric: str, program: str, arguments: list[str]
) -> None:
    """Table, results.csv, picture, and the best trial's command."""
    trials, picture = source.trials, folder / "results.png"
    write_csv(folder / CSV, trials, metric)
    print_table(trials, metric)
    if axes and any(trial.value is not None for trial in trials):
        if find_spec("matplotlib"):
            plot(picture, trials, axes, str(folder), metric)
        else:
            print("No picture of the sweep was made: that needs matplotlib (pip install matplotlib).")
    for trial in trials:
        if trial.status == "failed":
            print(f"trial {trial.number} failed ({' '.join(trial.words())}): {trial.error}")
    print(f"Results {folder}/{CSV}" + (f", {picture}" if picture.exists() else ""))
    if best := best_of(trials):
        where = f"{folder}/{best.number}"
        print(f"Best: trial {best.number}, val {metric} {best.value:.4f}, in {where}. To train with its settings:")
        print(f"  {command_of(best, program, arguments, f'{folder.name}-best')}", flush=True)


def say_end(source: Source, show: Show, stop: int | None) -> int:
    """The exit code: 1 where a trial failed, 130 or 143 where a signal stopped the sweep."""
    if stop is not None:
        done = sum(trial.over for trial in source.trials)
        show.say(
            f"Stopped ({signal.Signals(stop).name}) with {done} of {source.planned} trials done; those that ran have "
            "saved their state. The same command goes on from there."
        )
        return 130 if stop == signal.SIGINT else 143
    return 1 if any(trial.status == "failed" for trial in source.trials) else 0
