"""What a study found: ``python -m tuning.report --env Pendulum-v1`` writes report.html, figures as PNG, and best.yml."""

import argparse
import datetime
import html
import io
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
import plotly.graph_objects as go
import yaml
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from sb3_mbmpo.atomic import write_whole
from sb3_mbmpo.search_space import as_trained
from tuning.studies import (
    SearchError,
    add_arguments,
    complete,
    damage_named,
    evaluation_steps,
    finished,
    open_storage,
    trial_entry,
)

# The best trials of the table and of the curves; the most important hyperparameters of the parallel coordinates
N_TRIALS, N_CURVES, N_COORDINATES = 10, 5, 8
STYLE = """body { font: 15px sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .2em .6em; text-align: right; white-space: nowrap } th:first-child, td:first-child { text-align: left }
tr:nth-child(even) { background: #f2f2f2 } pre { background: #f2f2f2; padding: 1em; overflow-x: auto }"""


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """:return: trials that were not pruned, the best first"""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(trials, key=lambda trial: trial.value or 0.0, reverse=True)


# ---------------------------------------------------------------- figures


def with_short_names(study: optuna.Study) -> optuna.Study:
    """:return: a copy for Optuna's figures, which cut names of 20 letters or more"""
    copy = optuna.create_study(direction="maximize")
    for trial in study.get_trials():
        trial.params = {name.replace("_kwargs.", "."): value for name, value in trial.params.items()}
        trial.distributions = {name.replace("_kwargs.", "."): value for name, value in trial.distributions.items()}
        copy.add_trial(trial)
    return copy


def most_important(study: optuna.Study) -> dict[str, Any]:
    """:return: the argument that restricts a figure to the hyperparameters that decide most"""
    return {"params": list(optuna.importance.get_param_importances(study))[:N_COORDINATES]}


# File name: (heading, Optuna's function of this name in both of its backends, its further arguments)
FIGURES: dict[str, tuple[str, str, Callable[[optuna.Study], dict[str, Any]]]] = {
    "history": ("History", "plot_optimization_history", lambda study: {}),
    "importances": ("Importances of the hyperparameters", "plot_param_importances", lambda study: {}),
    "parallel_coordinate": (
        "Parallel coordinates: the most important hyperparameters",
        "plot_parallel_coordinate",
        most_important,
    ),
}


def draw(study: optuna.Study, folder: Path) -> str:
    """
    :param study: has at least one complete trial
    :param folder: receives a PNG a figure
    :return: the figures as HTML that needs no network
    """
    matplotlib.use("Agg")
    # Matplotlib's and Plotly's versions of each
    drawn: dict[str, tuple[str, Figure, go.Figure]] = {}
    short, value = with_short_names(study), f"{study.user_attrs['settings']['objective']} return"
    for name, (heading, function, further) in FIGURES.items():
        arguments = {"target_name": value, **further(short)}
        axes = getattr(visualization.matplotlib, function)(short, **arguments)
        drawn[name] = heading, axes.figure, getattr(visualization, function)(short, **arguments)
    make_coordinates_legible(*drawn["parallel_coordinate"][1:])
    drawn["curves"] = draw_curves(study)

    parts: list[str] = []
    for name, (heading, figure, interactive) in drawn.items():
        figure.axes[0].set_title(heading)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=120, bbox_inches="tight")
        write_whole(folder / f"{name}.png", png.getvalue())
        plt.close(figure)
        interactive.update_layout(title=None, margin={"t": 40})
        # The first figure brings the library for all
        parts.append(f"<h2>{heading}</h2>" + interactive.to_html(full_html=False, include_plotlyjs=not parts))
    return "\n".join(parts)


def make_coordinates_legible(figure: Figure, interactive: go.Figure) -> None:
    """An axis with its numbers for each hyperparameter needs room; the worst trial's line is white."""
    figure.set_size_inches(16, 6)
    for axes in figure.axes:
        axes.grid(False)
        axes.spines[:].set_color("grey")
    interactive.update_layout(plot_bgcolor="gainsboro")


def draw_curves(study: optuna.Study) -> tuple[str, Figure, go.Figure]:
    """:return: heading and figures of what the best trials returned, mean over the seeds, after how many real steps"""
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
    interactive.update_layout(xaxis_title="real steps", yaxis_title="return", showlegend=True)
    return "Returns of the best trials, the best first", figure, interactive


# ---------------------------------------------------------------- tables


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """:return: HTML"""

    def line(tag: str, cells: Sequence[Any]) -> str:
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def trial_table(study: optuna.Study) -> str:
    """:return: HTML of the best trials, a column each, and their hyperparameters"""
    trials = complete_trials(study)[:N_TRIALS]
    rows: list[list[Any]] = [["value", *(trial.value for trial in trials)]]
    rows.append(["duration", *(str(trial.duration).split(".")[0] for trial in trials)])
    for name in sorted({name for trial in trials for name in trial.params}):
        rows.append([name, *(as_trained(trial.params.get(name, "")) for trial in trials)])
    return table(["trial", *(trial.number for trial in trials)], rows)


def error_table(study: optuna.Study) -> str:
    """:return: HTML of why trials ended early, empty if none gives a reason"""
    errors = Counter(trial.user_attrs["error"] for trial in study.get_trials(deepcopy=False) if "error" in trial.user_attrs)
    return table(["pruned or failed because of", "trials"], errors.most_common()) if errors else ""


def meaning(settings: Mapping[str, Any]) -> str:
    """:return: what the value of a trial is"""
    return (
        f"Value of a trial: the {settings['objective']} return of {settings['n_evaluations']} evaluations of "
        f"{settings['n_eval_episodes']} deterministic episodes each, in {settings['n_timesteps']:,} real steps; "
        f"{_seeds(settings)}."
    )


def _seeds(settings: Mapping[str, Any]) -> str:
    return "seed 0" if settings["n_seeds"] == 1 else f"mean over seeds 0 to {settings['n_seeds'] - 1}"


def best_entry(study: optuna.Study) -> str:
    """:return: the best trial as YAML, ready for zoo_configs/mbmpo.yml"""
    settings, trial = study.user_attrs["settings"], complete_trials(study)[0]
    comment = (
        f"# {settings['objective'].capitalize()} return {trial.value:.1f} in {settings['n_timesteps']} real steps, "
        f"{_seeds(settings)}. {datetime.date.today()}\n"
        f"# The best of {len(finished(study))} trials of tuning.optimize: on other seeds it will rather do worse.\n"
    )
    entry = trial_entry(settings, trial.params)
    return comment + yaml.safe_dump({settings["env"]: entry}, sort_keys=False, default_flow_style=None)


def write_report(study: optuna.Study, folder: Path) -> Path:
    """
    :param study: with or without complete trials
    :param folder: receives the HTML file, the PNG files and best.yml
    :return: the HTML file
    """
    counts = Counter(trial.state.name.lower() for trial in study.get_trials(deepcopy=False))
    parts = [
        f"<h1>{html.escape(study.study_name)}</h1>",
        f"<p>{html.escape(meaning(study.user_attrs['settings']))}</p>",
        table(["trials", "number"], sorted(counts.items())),
        error_table(study),
    ]
    if complete_trials(study):
        best = best_entry(study)
        write_whole(folder / "best.yml", best)
        with warnings.catch_warnings():
            # Importances of few trials are poor; and the matplotlib backend calls itself experimental
            warnings.simplefilter("ignore")
            figures = draw(study, folder)
        parts += [
            "<h2>Best trials</h2>",
            trial_table(study),
            "<h2>The best one as an entry of zoo_configs/mbmpo.yml</h2>",
            f"<pre>{html.escape(best)}</pre>",
            figures,
        ]
    else:
        parts.append("<p>No trial is complete: all were pruned, or none has ended yet.</p>")
    path = folder / "report.html"
    head = f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(study.study_name)}</title>"
    write_whole(path, f"{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report on a study, whether it is still running or not."""
    parser = argparse.ArgumentParser(prog="python -m tuning.report", description=__doc__)
    add_arguments(parser)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        arguments = complete(parser.parse_args(argv))
        with damage_named(arguments.storage):
            storage = open_storage(arguments.storage)
            if arguments.study_name not in optuna.get_all_study_names(storage):
                raise SearchError(
                    f"There is no study {arguments.study_name!r} in {arguments.storage}: give --study-name or --storage."
                )
            study = optuna.load_study(storage=storage, study_name=arguments.study_name)
            study.get_trials()
            meaning(study.user_attrs["settings"])
    except (SearchError, ValueError, ImportError, OSError, SQLAlchemyError) as error:
        sys.exit(str(error).partition("\n")[0])
    print(f"Report: {write_report(study, arguments.output)}")


if __name__ == "__main__":
    main()
