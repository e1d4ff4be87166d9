"""Plots of learning curves, legible at the width of a phone."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from sb3_mbmpo.common.atomic import write_whole
from tuning.results.curves import NAMES, Curve, Curves, at, budgets, median_seconds
from tuning.results.runs import OURS

# The colours of Okabe and Ito, which colour-blind readers can tell apart; the markers work without any colour
STYLES = {
    OURS: ("#D55E00", "o"),
    "sac": ("#0072B2", "s"),
    "crossq": ("#009E73", "^"),
    "tqc": ("#CC79A7", "D"),
    "ppo": ("#E69F00", "v"),
    "trpo": ("#56B4E9", "P"),
    "dqn": ("#000000", "X"),
}
# A phone shows the 5 inches (360 points) 360 pixels wide, so that 11 points become 11 pixels
WIDTH, DPI = 5.0, 180
PARAMETERS: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def save_environment(title: str, curves: Curves, time: str, path: Path) -> None:
    """Plot an environment's returns against real steps and, below, against training time."""
    with plt.rc_context(PARAMETERS):
        figure, (by_steps, by_time) = plt.subplots(2, 1, figsize=(WIDTH, 7.0), sharey=True, layout="constrained")
        draw(by_steps, curves)
        by_steps.set_title(title)
        by_steps.set(xlabel="real steps", ylabel="return")
        draw(by_time, curves, against_time=True)
        by_time.set(xlabel=f"{time} time of the training", ylabel="return")
        add_legend(figure, by_steps)
        save(figure, path)


def save_overview(curves: Mapping[str, Curves], names: Sequence[str], path: Path) -> None:
    """Plot returns against real steps for the named environments that have any, two plots in a row."""
    shown = [name for name in names if name in curves] or list(curves)[:4]
    n_rows = -(-len(shown) // 2)
    with plt.rc_context({**PARAMETERS, "font.size": 9}):
        figure, grid = plt.subplots(n_rows, 2, figsize=(WIDTH, 0.5 + 2.3 * n_rows), squeeze=False, layout="constrained")
        for axes, name in zip(grid.flat, shown, strict=False):
            draw(axes, curves[name], max_ticks=4)
            axes.set_title(name, fontsize=10)
        for axes in grid.flat[len(shown) :]:
            axes.axis("off")
        figure.supxlabel("real steps", fontsize=10)
        figure.supylabel("return", fontsize=10)
        add_legend(figure, *grid.flat[: len(shown)])
        save(figure, path)


def draw(axes: Axes, curves: Curves, against_time: bool = False, max_ticks: int = 7) -> None:
    """
    Draw a thin line for each seed and a thick one for the mean.

    :param axes: empty axes
    :param curves: curves of one environment
    :param against_time: whether the x axis shows training time (for the mean, the median over the seeds) instead of real steps
    :param max_ticks: number of ticks that there is room for on an axis of real steps
    """
    for algo, of_algo in reversed(curves.items()):  # ours above the others
        colour, marker = STYLES[algo]
        for curve in of_algo:
            x = [curve.seconds[step] if against_time else step for step in curve.returns]
            axes.plot(x, list(curve.returns.values()), color=colour, linewidth=0.8, alpha=0.45)
        steps, means = mean_curve(of_algo)
        x = [median_seconds(of_algo, step) or 0.0 for step in steps] if against_time else list(steps)
        width = 2.6 if algo == OURS else 1.6
        axes.plot(x, means, color=colour, linewidth=width, marker=marker, markersize=4, label=NAMES[algo])
    axes.set_xscale("log")
    low, high = (float(bound) for bound in axes.get_xlim())
    ticks = TIME_TICKS if against_time else {step: short(step) for step in step_ticks(budgets(curves), max_ticks)}
    shown = {position: label for position, label in ticks.items() if low <= position <= high}
    axes.set_xticks(list(shown), list(shown.values()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[float]]:
    """Return the real steps at which at least two seeds (or the only one) were evaluated, and the mean returns there."""
    steps = sorted({step for curve in curves for step in curve.returns})
    kept = [step for step in steps if len(at(curves, step)) >= min(2, len(curves))]
    return kept, [sum(at(curves, step)) / len(at(curves, step)) for step in kept]


TIME_TICKS = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36_000: "10 h"}


def step_ticks(steps: Sequence[int], max_ticks: int) -> list[int]:
    """Return the ticks 1, 2 and 5 times the powers of ten within the range, or only the powers if those are too many."""
    fine = [factor * 10**power for power in range(9) for factor in (1, 2, 5)]
    inside = [tick for tick in fine if steps[0] <= tick <= steps[-1]]
    return inside if len(inside) <= max_ticks else [tick for tick in inside if str(tick).strip("0") == "1"]


def short(steps: int) -> str:
    """Format a number of steps, such as 500, 2k or 1M."""
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if steps >= unit:
            return f"{steps / unit:g}{letter}"
    return str(steps)


def add_legend(figure: Figure, *all_axes: Axes) -> None:
    """Add one legend above all axes that lists every algorithm once."""
    lines = {str(line.get_label()): line for axes in all_axes for line in axes.get_lines()}
    labels = [name for name in NAMES.values() if name in lines]
    handles = [lines[label] for label in labels]
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI)
    write_whole(path, png.getvalue())
    plt.close(figure)


# A backend without windows: servers have no display
matplotlib.use("Agg")
