"""A picture of a sweep: the metric against each swept parameter."""

import math
from pathlib import Path
from typing import Any

from clipft.sweep.space import Axis, as_number
from clipft.sweep.trial import Trial, best_of

COLUMNS = 3
WIDTH_IN, HEIGHT_IN = 4.4, 3.6  # of a panel
LOG_RATIO = 8  # numbers that span more than this are spread on a logarithmic axis
MOST_TICKS = 6  # values that are each written under the axis
KINDS: dict[str, dict[str, Any]] = {
    "finished": {"marker": "o", "color": "#1f5fa8", "s": 44},
    "out of time": {"marker": "s", "color": "#7a4fa3", "s": 40},
    "pruned": {"marker": "x", "color": "#8a8a8a", "s": 40},
    "failed": {"marker": "|", "color": "#c0392b", "s": 160, "linewidths": 2.5},
}


def plot(path: Path, trials: list[Trial], axes: list[Axis], title: str, metric: str) -> None:
    """Writes a PNG with a panel per parameter; failed trials, which have no value, stand on the lower edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(axes))
    rows = math.ceil(len(axes) / columns)
    figure = Figure(figsize=(WIDTH_IN * columns, HEIGHT_IN * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        draw_panel(panel, trials, axis)
    for panel in list(figure.axes)[len(axes) :]:
        panel.set_visible(False)
    for number in range(0, len(axes), columns):
        figure.axes[number].set_ylabel(f"val {metric}")
    figure.suptitle(plain(title))
    labelled = [panel.get_legend_handles_labels() for panel in figure.axes]
    handles = {text: handle for found in labelled for handle, text in zip(*found, strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=3 if columns == 1 else len(handles),
        frameon=False,
    )
    figure.savefig(path, dpi=130)


def draw_panel(panel: Any, trials: list[Trial], axis: Axis) -> None:
    tried = [trial for trial in trials if axis.key in trial.params]
    x_of = positions(panel, [trial.params[axis.key] for trial in tried], axis)
    for status, style in KINDS.items():
        here = [trial for trial in tried if trial.status == status and (trial.value is not None or status == "failed")]
        if not here:
            continue
        x = [x_of[trial.params[axis.key]] for trial in here]
        if status == "failed":
            edge = panel.get_xaxis_transform()  # x in data, y as a share of the panel
            panel.scatter(x, [0.03] * len(here), label=status, transform=edge, zorder=2, **style)
            panel.update_datalim([(each, 0) for each in x], updatey=False)  # which matplotlib leaves out then
            panel.autoscale_view()
        else:
            panel.scatter(x, [trial.value for trial in here], label=status, zorder=3, **style)
    if best := best_of(tried):
        ring = {"s": 190, "facecolors": "none", "edgecolors": "#d98200", "linewidths": 2}
        panel.scatter(
            [x_of[best.params[axis.key]]], [best.value], label=f"best (trial {best.number})", zorder=4, **ring
        )
    panel.set_xlabel(plain(axis.key))
    panel.grid(True, color="#e4e4e4", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.margins(x=0.08, y=0.12)


def positions(panel: Any, texts: list[str], axis: Axis) -> dict[str, float]:
    """Where each value lies, with the panel's scale and ticks set for it: numbers as such, words side by side."""
    numbers = {text: number for text in texts if (number := as_number(text)) is not None}
    if len(numbers) < len(set(texts)):
        words = list(dict.fromkeys([*axis.values, *texts]))
        turned = max(map(len, words)) * len(words) > 40
        panel.set_xticks(range(len(words)), [plain(word) for word in words], rotation=30 if turned else 0)
        panel.set_xlim(-0.5, len(words) - 0.5)
        return {word: float(number) for number, word in enumerate(words)}
    distinct = sorted(set(numbers.values()))
    if distinct and distinct[0] > 0 and (axis.log or distinct[-1] / distinct[0] > LOG_RATIO):
        panel.set_xscale("log")
    if axis.values and len(distinct) <= MOST_TICKS:
        panel.set_xticks(distinct, [f"{number:g}" for number in distinct])
        panel.set_xticks([], minor=True)
    return numbers


def plain(text: str) -> str:
    """The text without what matplotlib would read as a formula."""
    return text.replace("$", r"\$")
