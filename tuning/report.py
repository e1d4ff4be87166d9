"""Report on a study: ``python -m tuning.report --env Pendulum-v1`` writes report.html, plots as PNG files, and best.yml."""

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

from sb3_mbmpo.common.atomic import write_whole
from sb3_mbmpo.zoo.search_space import as_trained
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

# Trials in the table, trials among the curves, and hyperparameters in the parallel coordinates
N_TRIALS, N_CURVES, N_COORDINATES = 10, 5, 8
STYLE = """body { font: 15px sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .2em .6em; text-align: right; white-space: nowrap } th:first-child, td:first-child { text-align: left }
tr:nth-child(even) { background: #f2f2f2 } pre { background: #f2f2f2; padding: 1em; overflow-x: auto }"""


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that were not pruned, the best first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(trials, key=lambda trial: trial.value or 0.0, reverse=True)


# ---------------------------------------------------------------- plots


def with_short_names(study: optuna.Study) -> optuna.Study:
    """Return a copy of the study with shorter parameter names, because Optuna's plots truncate at 20 characters."""
    copy = optuna.create_study(direction="maximize")
    for trial in study.get_trials():
        trial.params = {name.replace("_kwargs.", "."): value for name, value in trial.params.items()}
        trial.distributions = {name.replace("_kwargs.", "."): value for name, value in trial.distributions.items()}
        copy.add_trial(trial)
    return copy


def most_important(study: optuna.Study) -> dict[str, Any]:
    """Return the argument that restricts a plot to the most important hyperparameters."""
    return {"params": list(optuna.importance.get_param_importances(study))[:N_COORDINATES]}


# File name: (heading, name of Optuna's plot function in both of its backends, function that returns further arguments)
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
    Draw all plots, as PNG files and as interactive HTML.

    :param study: study with at least one complete trial
    :param folder: folder for the PNG files
    :return: HTML of the interactive plots; it loads nothing from the network
    """
    matplotlib.use("Agg")
    # Heading, Matplotlib figure and Plotly figure of each plot
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
        # The first plot carries the Plotly library for all of them
        parts.append(f"<h2>{heading}</h2>" + interactive.to_html(full_html=False, include_plotlyjs=not parts))
    return "\n".join(parts)


def make_coordinates_legible(figure: Figure, interactive: go.Figure) -> None:
    """Make room for one labelled axis per hyperparameter, and darken the background: the worst trial's line is white."""
    figure.set_size_inches(16, 6)
    for axes in figure.axes:
        axes.grid(False)
        axes.spines[:].set_color("grey")
    interactive.update_layout(plot_bgcolor="gainsboro")


def draw_curves(study: optuna.Study) -> tuple[str, Figure, go.Figure]:
    """Draw the best trials' returns against real steps, averaged over the seeds, and return heading and figures."""
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
    """Return an HTML table."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def trial_table(study: optuna.Study) -> str:
    """Return an HTML table of the best trials, with one column per trial and one row per hyperparameter."""
    trials = complete_trials(study)[:N_TRIALS]
    rows: list[list[Any]] = [["value", *(trial.value for trial in trials)]]
    rows.append(["duration", *(str(trial.duration).split(".")[0] for trial in trials)])
    for name in sorted({name for trial in trials for name in trial.params}):
        rows.append([name, *(as_trained(trial.params.get(name, "")) for trial in trials)])
    return table(["trial", *(trial.number for trial in trials)], rows)


def error_table(study: optuna.Study) -> str:
    """Return an HTML table of the errors that ended trials early, or an empty string if there are none."""
    errors = Counter(trial.user_attrs["error"] for trial in study.get_trials(deepcopy=False) if "error" in trial.user_attrs)
    return table(["pruned or failed because of", "trials"], errors.most_common()) if errors else ""


def meaning(settings: Mapping[str, Any]) -> str:
    """Return a sentence that explains the value of a trial."""
    return (
        f"Value of a trial: the {settings['objective']} return of {settings['n_evaluations']} evaluations of "
        f"{settings['n_eval_episodes']} deterministic episodes each, within {settings['n_timesteps']:,} real steps; "
        f"{_seeds(settings)}."
    )


def _seeds(settings: Mapping[str, Any]) -> str:
    return "seed 0" if settings["n_seeds"] == 1 else f"mean over seeds 0 to {settings['n_seeds'] - 1}"


def best_entry(study: optuna.Study) -> str:
    """Return the best trial as YAML, ready for zoo_configs/mbmpo.yml."""
    settings, trial = study.user_attrs["settings"], complete_trials(study)[0]
    comment = (
        f"# {settings['objective'].capitalize()} return {trial.value:.1f} in {settings['n_timesteps']} real steps, "
        f"{_seeds(settings)}. {datetime.date.today()}\n"
        f"# The best of {len(finished(study))} trials of tuning.optimize: on other seeds, expect a lower return.\n"
    )
    entry = trial_entry(settings, trial.params)
    return comment + yaml.safe_dump({settings["env"]: entry}, sort_keys=False, default_flow_style=None)


def write_report(study: optuna.Study, folder: Path) -> Path:
    """
    Write the report, the plots and ``best.yml``.

    :param study: study, with or without complete trials
    :param folder: folder for the HTML file, the PNG files and ``best.yml``
    :return: path of the HTML file
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
            # Optuna warns that importances from few trials are unreliable and that its Matplotlib backend is experimental
            warnings.simplefilter("ignore")
            figures = draw(study, folder)
        parts += [
            "<h2>Best trials</h2>",
            trial_table(study),
            "<h2>The best trial as an entry of zoo_configs/mbmpo.yml</h2>",
            f"<pre>{html.escape(best)}</pre>",
            figures,
        ]
    else:
        parts.append("<p>No trial is complete: all were pruned, failed, or are still running.</p>")
    path = folder / "report.html"
    head = f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(study.study_name)}</title>"
    write_whole(path, f"{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report on a study, even while it is still running."""
    parser = argparse.ArgumentParser(prog="python -m tuning.report", description=__doc__)
    add_arguments(parser)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        arguments = complete(parser.parse_args(argv))
        with damage_named(arguments.storage):
            storage = open_storage(arguments.storage)
            if arguments.study_name not in optuna.get_all_study_names(storage):
                raise SearchError(
                    f"There is no study {arguments.study_name!r} in {arguments.storage}: set --study-name or --storage."
                )
            study = optuna.load_study(storage=storage, study_name=arguments.study_name)
            study.get_trials()
            meaning(study.user_attrs["settings"])
    except (SearchError, ValueError, ImportError, OSError, SQLAlchemyError) as error:
        sys.exit(str(error).partition("\n")[0])
    print(f"Report: {write_report(study, arguments.output)}")


if __name__ == "__main__":
    main()
