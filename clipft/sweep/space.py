"""What is swept: overrides in Hydra's grammar -> axes, and the points of a grid."""

import itertools
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

OWN = ("name", "runs_dir", "resume")  # say where the sweep lies


@dataclass(frozen=True)
class Axis:
    """A swept key: values that can be counted, or an interval, or, for a range, both."""

    key: str
    text: str
    """What was typed."""
    values: tuple[str, ...] = ()
    """As overrides write them; empty for an interval."""
    low: float | int | None = None
    high: float | int | None = None
    """The last value, itself among them."""
    step: float | int | None = None
    log: bool = False

    @property
    def ends(self) -> tuple[str, str]:
        return (self.values[0], self.values[-1]) if self.values else (str(self.low), str(self.high))


def parse_axes(overrides: list[str], loader: ConfigLoader | None) -> list[Axis]:
    """The overrides that have several values; raises for keys and forms that cannot be swept."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    return [axis_of(each) for each in parsed if each.is_sweep_override() and not each.is_hydra_override()]


def axis_of(override: Override) -> Axis:
    key, value = override.get_key_element(), override.value()
    text = (override.input_line or "").partition("=")[2]
    if key in OWN:
        raise ValueError(f"{key}={text} cannot be swept: it says where the whole sweep lies.")
    if key == "eval.select":
        raise ValueError(f"{key}={text} cannot be swept: it is what the trials are compared by.")
    tags: set[str] = getattr(value, "tags", set())
    if unknown := tags - {"log"}:
        raise ValueError(f"{key}={text}: the tag {', '.join(sorted(unknown))} is unknown. There is one: log.")
    log = "log" in tags
    if isinstance(value, IntervalSweep):
        return interval(key, text, value, log)
    values = tuple(override.sweep_string_iterator())
    if not values:
        raise ValueError(f"{key}={text} has no value.")
    if isinstance(value, RangeSweep):
        # Decimal, because 0.1 + 2 * 0.1 is not 0.3, and the end has to be a whole number of steps away.
        start, step = Decimal(str(value.start)), Decimal(str(value.step))
        ends = sorted([start, start + (len(values) - 1) * step])
        number = int if all(isinstance(each, int) for each in (value.start, value.stop, value.step)) else float
        return Axis(key, text, values, number(ends[0]), number(ends[1]), number(abs(step)), log)
    return Axis(key, text, values, log=log)


def interval(key: str, text: str, value: IntervalSweep, log: bool) -> Axis:
    assert value.start is not None and value.end is not None
    if not value.start < value.end:
        raise ValueError(f"{key}={text}: the interval's end must be greater than its start.")
    if log and value.start <= 0:
        raise ValueError(f"{key}={text}: a logarithmic interval must start above 0.")
    return Axis(key, text, low=value.start, high=value.end, log=log)


def grid_points(axes: list[Axis]) -> list[dict[str, str]]:
    """Every combination of the values, the last axis fastest; raises for an interval, which has no end of values."""
    for axis in axes:
        if not axis.values:
            raise ValueError(
                f"{axis.key}={axis.text} is an interval to search in, and a grid needs values: add "
                f"hydra/sweeper=optuna, or give {axis.key}=A,B,..."
            )
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, point, strict=True)) for point in itertools.product(*(axis.values for axis in axes))]


def end_points(axes: list[Axis]) -> list[dict[str, str]]:
    """Two points of a search: every axis at its start, every axis at its end."""
    return [{axis.key: axis.ends[side] for axis in axes} for side in (0, 1)]


def as_number(text: str) -> float | None:
    """What a parameter's text is as a number; None for a word."""
    try:
        return float(text)
    except ValueError:
        return None


def as_text(value: Any) -> str:
    """A number or a choice as an override writes it."""
    return value if isinstance(value, str) else repr(value)
