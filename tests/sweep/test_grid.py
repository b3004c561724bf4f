"""What a grid remembers from one start to the next."""

from dataclasses import replace

from clipft.sweep.grid import Grid
from clipft.sweep.trial import failed

POINTS = [{"optim.lr": "1"}, {"optim.lr": "2"}, {"optim.lr": "3"}]


def numbers(grid: Grid) -> list[int]:
    """Those that it would start now."""
    return [trial.number for trial in iter(grid.next, None)]


def test_what_is_over_does_not_come_again_and_what_failed_or_was_cut_off_does(tmp_path):
    grid = Grid(tmp_path, POINTS)
    first, second, third = grid.next(), grid.next(), grid.next()
    assert first and second and third and grid.next() is None
    grid.tell(replace(first, status="finished", value=0.5, seconds=7.0))
    grid.tell(failed(second, "no room"))
    again = Grid(tmp_path, POINTS)
    assert [trial.status for trial in again.trials] == ["finished", "failed", "waiting"]
    assert again.trials[0].value == 0.5 and again.trials[1].error == "no room"
    assert numbers(again) == [1, 2]


def test_a_grid_that_grows_keeps_the_numbers_and_values_it_has(tmp_path):
    grid = Grid(tmp_path, POINTS[:2])
    one = grid.next()
    assert one
    grid.tell(replace(one, status="finished", value=0.5))
    grown = Grid(tmp_path, [{"optim.lr": "0"}, *POINTS])
    assert [(t.number, t.params["optim.lr"]) for t in grown.trials] == [(0, "1"), (1, "2"), (2, "0"), (3, "3")]
    assert numbers(grown) == [2, 1, 3] and grown.planned == 4
    shrunk = Grid(tmp_path, [{"optim.lr": "3"}])
    assert [trial.number for trial in shrunk.trials] == [0, 3]  # what has a value stays in the table
    assert numbers(shrunk) == [3]
