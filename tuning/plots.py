"""Plots of a study, as PNG files and as interactive HTML."""

import html
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
import plotly.graph_objects as go
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna import visualization
from optuna.distributions import BaseDistribution, CategoricalDistribution

from sb3_mbmpo.common.atomic import write_whole
from sb3_mbmpo.common.html_page import data_url
from tuning.studies import complete_trials, evaluation_steps

# Trials among the curves, and hyperparameters in the parallel coordinates
N_CURVES, N_COORDINATES = 5, 8
# Importances from fewer trials say more about chance than about hyperparameters
MIN_IMPORTANCES = 20
# On narrow pages, too: legends below the plots, and no toolbar over them
PLOTLY = {"responsive": True, "displaylogo": False, "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"]}


def short_name(name: str) -> str:
    """Return a hyperparameter's name without "_kwargs": "dynamics.batch_size"."""
    return name.replace("_kwargs.", ".")


def with_short_names(study: optuna.Study) -> optuna.Study:
    """Return a copy of the study with shorter parameter names, because Optuna's plots truncate at 20 characters."""
    copy = optuna.create_study(direction="maximize")
    for trial in study.get_trials():
        trial.params = {short_name(name): value for name, value in trial.params.items()}
        trial.distributions = {short_name(name): value for name, value in trial.distributions.items()}
        copy.add_trial(trial)
    return copy


def coordinates(study: optuna.Study) -> tuple[str, list[str]]:
    """
    Choose the hyperparameters of the parallel coordinates.

    :param study: study with at least one complete trial
    :return: heading, and at most ``N_COORDINATES`` names: the most important ones, if there are trials enough to tell
    """
    names = sorted({name for trial in complete_trials(study) for name in trial.params})
    n_all, title = len(names), "Parallel coordinates"
    if has_importances(study):
        names = list(optuna.importance.get_param_importances(study))
    if n_all <= N_COORDINATES:
        return f"{title}: all hyperparameters", names
    which = "most important" if has_importances(study) else "first"
    return f"{title}: the {which} {N_COORDINATES} of {n_all} hyperparameters", names[:N_COORDINATES]


def has_importances(study: optuna.Study) -> bool:
    """Tell whether there are trials enough for importances, and whether their values differ at all."""
    values = [trial.value for trial in complete_trials(study)]
    return len(values) >= MIN_IMPORTANCES and len(set(values)) > 1


def draw(study: optuna.Study, folder: Path) -> str:
    """
    Draw all plots, as PNG files and as interactive HTML.

    :param study: study with at least one complete trial
    :param folder: folder for the PNG files
    :return: HTML of the interactive plots; it loads nothing from the network
    """
    matplotlib.use("Agg")
    short, value = with_short_names(study), f"{study.user_attrs['settings']['objective']} return"
    parts = [draw_history(short, value, folder)]
    if has_importances(short):
        parts.append(draw_importances(short, folder))
    else:
        n_trials = len(complete_trials(short))
        is_few = n_trials < MIN_IMPORTANCES
        few = f"{n_trials} complete trials are too few to tell" if is_few else "all trials have the same value"
        parts.append(
            f"<h2>Importances of the hyperparameters</h2><p class='note'>Left out: {few}. They are shown from "
            f"{MIN_IMPORTANCES} complete trials on: with fewer, they say more about chance than about hyperparameters.</p>"
        )
    parts += [draw_coordinates(short, value, folder), draw_curves(study, folder)]
    return "\n".join(parts)


def section(name: str, heading: str, figure: Figure, interactive: go.Figure, folder: Path, narrow: bool = False) -> str:
    """
    Write a plot's PNG file, and return its interactive form as HTML.

    :param name: name of the file, without suffix
    :param heading: above the plot
    :param figure: for the file; it is closed
    :param interactive: the same for the page
    :param folder: folder of the file
    :param narrow: whether narrow pages show the file instead of the interactive plot
    :return: HTML
    """
    figure.axes[0].set_title(heading, fontsize=10, wrap=True)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150, bbox_inches="tight")
    write_whole(folder / f"{name}.png", png.getvalue())
    plt.close(figure)
    interactive.update_layout(title=None, margin={"t": 40, "r": 20})
    # The first plot carries the Plotly library for all of them
    content = interactive.to_html(full_html=False, include_plotlyjs=name == "history", config=PLOTLY)
    if narrow:
        image = data_url(png.getvalue(), "image/png")
        content = (
            f"<div class='wide'>{content}</div><div class='narrow'><img alt='{html.escape(heading)}' src='{image}'>"
            "<p class='note'>A line is a trial: the better, the darker; the thick one is the best.</p></div>"
        )
    return f"<h2>{html.escape(heading)}</h2>{content}"


LEGEND_BELOW = {"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0}


def draw_history(study: optuna.Study, value: str, folder: Path) -> str:
    """Draw the value of each trial, and the best one so far."""
    axes: Axes = visualization.matplotlib.plot_optimization_history(study, target_name=value)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    interactive = visualization.plot_optimization_history(study, target_name=value)
    interactive.update_xaxes(tick0=0, dtick=trial_ticks(len(study.get_trials(deepcopy=False))), tickformat="d")
    interactive.update_layout(legend=LEGEND_BELOW)
    return section("history", "History", figure_of(axes), interactive, folder)


def figure_of(axes: Axes) -> Figure:
    """Return the figure of axes that are in no subfigure."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def trial_ticks(n_trials: int) -> int:
    """Return the distance between the ticks of an axis of trials: 1, 2, 5, 10, ..., so that there are at most 10 of them."""
    steps = (factor * int(10**power) for power in itertools.count() for factor in (1, 2, 5))
    return next(step for step in steps if n_trials <= 10 * step)


def draw_importances(study: optuna.Study, folder: Path) -> str:
    """Draw the importances of the hyperparameters."""
    axes: Axes = visualization.matplotlib.plot_param_importances(study)
    interactive = visualization.plot_param_importances(study)
    interactive.update_yaxes(automargin=True, title=None)
    largest = max(optuna.importance.get_param_importances(study).values())
    interactive.update_xaxes(title="importance", range=[0, 1.25 * largest])  # room for the numbers beside the bars
    return section("importances", "Importances of the hyperparameters", figure_of(axes), interactive, folder)


def draw_coordinates(study: optuna.Study, value: str, folder: Path) -> str:
    """Draw a line through the hyperparameters and the value of each trial: across wide pages, down narrow ones."""
    heading, names = coordinates(study)
    interactive = visualization.plot_parallel_coordinate(study, params=names, target_name=value)
    # Whole names, which Optuna truncates; the background darker than the worst trial's line, which is white
    labels = interactive.layout.xaxis.ticktext or ()  # None in Optuna 4
    interactive.update_xaxes(ticktext=[whole_name(label, names) for label in labels], automargin=True)
    interactive.update_layout(plot_bgcolor="gainsboro")
    return section("parallel_coordinate", heading, coordinates_down(study, names, value), interactive, folder, narrow=True)


def whole_name(label: str, names: Sequence[str]) -> str:
    """Return the name of which a label is the beginning, followed by three dots; or the label."""
    return next((name for name in names if label.endswith("...") and name.startswith(label[:-3])), label)


def coordinates_down(study: optuna.Study, names: Sequence[str], value: str) -> Figure:
    """
    Draw parallel coordinates from top to bottom, so that they are legible in a narrow column.

    :param study: study with at least one complete trial
    :param names: hyperparameters
    :param value: name of a trial's value
    :return: a figure with one horizontal axis for the value, and one per hyperparameter
    """
    trials = complete_trials(study)[::-1]  # the best one is drawn last
    values = np.array([trial.value for trial in trials], dtype=float)
    figure, axes = plt.subplots(figsize=(4.4, 0.75 * (len(names) + 1) + 0.6), layout="constrained")
    scale = Normalize(values.min(), max(values.max(), values.min() + 1e-9))
    # By rank: one hopeless trial would leave a single colour to all others
    colours = colormaps["viridis_r"](np.linspace(0, 1, len(trials)))
    rows = [scale(values)]
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    labels = [(value, [(0.0, low), (1.0, high)])]
    for name in names:
        given = [(trial.params.get(name), trial.distributions.get(name)) for trial in trials]
        places, ticks = places_on_axis(given)
        rows.append(places)
        labels.append((name, ticks))
    table = np.stack(rows)  # (hyperparameters + 1, trials)
    for i, column in enumerate(table.T):
        axes.plot(column, range(len(table)), color=colours[i], linewidth=2.5 if i == len(trials) - 1 else 0.9, alpha=0.9)
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
    for row, (name, ticks) in enumerate(labels):
        axes.axhline(row, color="grey", linewidth=0.8, zorder=0)
        axes.text(0, row - 0.14, name, fontsize=9, fontweight="bold", va="bottom", bbox=behind)
        for place, text in ticks:
            side = "left" if place < 0.1 else "right" if place > 0.9 else "center"
            axes.text(place, row + 0.1, text, fontsize=8, va="top", ha=side, bbox=behind)
    axes.set(xlim=(-0.03, 1.03), ylim=(len(table) - 0.45, -0.5))
    axes.axis("off")
    return figure


def places_on_axis(given: Sequence[tuple[Any, BaseDistribution | None]]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """
    Place the values of a hyperparameter on an axis from 0 to 1.

    :param given: value and distribution of each trial; None where a trial does not have it
    :return: places, NaN where there is no value, and ticks with their texts
    """
    known = [(value, distribution) for value, distribution in given if distribution is not None]
    first = known[0][1]
    if isinstance(first, CategoricalDistribution):
        choices = [choice for choice in first.choices if any(value == choice for value, _ in known)]
        spread = max(len(choices) - 1, 1)
        where = [choices.index(value) / spread if distribution is not None else np.nan for value, distribution in given]
        return np.array(where), [(i / spread, str(choice)) for i, choice in enumerate(choices)]
    numbers = np.array([np.nan if distribution is None else value for value, distribution in given], dtype=float)
    smallest, largest = np.nanmin(numbers), np.nanmax(numbers)
    ticks = [(0.0, f"{smallest:.3g}"), *([(1.0, f"{largest:.3g}")] if largest > smallest else [])]
    if getattr(first, "log", False):
        numbers = np.log(numbers)
    spread = np.nanmax(numbers) - np.nanmin(numbers)
    return (numbers - np.nanmin(numbers)) / (spread or 1.0), ticks


def draw_curves(study: optuna.Study, folder: Path) -> str:
    """Draw the best trials' returns against real steps, averaged over the seeds."""
    settings = study.user_attrs["settings"]
    steps = evaluation_steps(settings)
    figure, axes = plt.subplots()
    interactive = go.Figure()
    for trial in complete_trials(study)[:N_CURVES]:
        reported = [trial.intermediate_values[i] for i in sorted(trial.intermediate_values)]
        curve = np.reshape(reported, (-1, len(steps))).mean(0)
        axes.plot(steps, curve, marker=".", label=f"trial {trial.number}")
        interactive.add_scatter(x=steps, y=curve, name=f"trial {trial.number}")
    axes.legend()
    axes.set(xlabel="real steps", ylabel="return")
    interactive.update_layout(xaxis_title="real steps", yaxis_title="return", showlegend=True, legend=LEGEND_BELOW)
    return section("curves", "Returns of the best trials, the best first", figure, interactive, folder)
