"""What a study found: ``python -m tuning.report --env Pendulum-v1`` writes report.html, figures as PNG, and best.yml."""

import argparse
import datetime
import html
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
import yaml
from optuna import visualization
from optuna.trial import FrozenTrial, TrialState

from tuning.studies import add_arguments, complete, finished, open_storage, trial_entry

N_CURVES, N_ROWS = 5, 20
STYLE = """body { font: 15px sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .2em .6em; text-align: right; white-space: nowrap }
tr:nth-child(even) { background: #f2f2f2 } pre { background: #f2f2f2; padding: 1em }"""


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """:return: trials that were not pruned, the best first"""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(trials, key=lambda trial: trial.value or 0.0, reverse=True)


def best_curves(study: optuna.Study) -> optuna.Study:
    """:return: a study of the best trials alone, in this order: its steps are real steps, its values means over the seeds"""
    settings = study.user_attrs["settings"]
    n_evaluations = settings["n_evaluations"]
    curves = optuna.create_study(direction="maximize")
    for trial in complete_trials(study)[:N_CURVES]:
        mean = np.reshape([trial.intermediate_values[i] for i in sorted(trial.intermediate_values)], (-1, n_evaluations)).mean(
            0
        )
        steps = [settings["n_timesteps"] * (i + 1) // n_evaluations for i in range(n_evaluations)]
        values = dict(zip(steps, mean.tolist(), strict=True))
        curves.add_trial(optuna.create_trial(value=trial.value, intermediate_values=values))
    return curves


# File name: (heading, Optuna's function of this name in both of its backends, what it draws)
FIGURES: dict[str, tuple[str, str, Callable[[optuna.Study], optuna.Study]]] = {
    "history": ("History", "plot_optimization_history", lambda study: study),
    "importances": ("Importances", "plot_param_importances", lambda study: study),
    "parallel_coordinate": ("Parallel coordinates", "plot_parallel_coordinate", lambda study: study),
    "curves": ("Returns of the best trials (0 is the best) against real steps", "plot_intermediate_values", best_curves),
}


def draw(study: optuna.Study, folder: Path) -> str:
    """
    :param study: has at least one complete trial
    :param folder: receives a PNG a figure
    :return: the figures as HTML that needs no network
    """
    from matplotlib import pyplot as plt

    matplotlib.use("Agg")
    parts: list[str] = []
    for name, (heading, function, prepare) in FIGURES.items():
        drawn = prepare(study)
        interactive = getattr(visualization, function)(drawn).update_layout(title=heading, showlegend=name == "curves")
        # The first figure brings the library for all
        parts.append(interactive.to_html(full_html=False, include_plotlyjs=not parts))
        axes = getattr(visualization.matplotlib, function)(drawn)
        axes.figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        plt.close(axes.figure)
    return "\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """:return: HTML"""

    def line(tag: str, cells: Sequence[Any]) -> str:
        texts = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def trial_table(study: optuna.Study) -> str:
    """:return: HTML of the best trials and their hyperparameters"""
    trials = complete_trials(study)[:N_ROWS]
    names = sorted({name for trial in trials for name in trial.params})
    rows = [
        [trial.number, trial.value, str(trial.duration).split(".")[0], *(trial.params.get(name, "") for name in names)]
        for trial in trials
    ]
    return table(["trial", "value", "duration", *names], rows)


def best_entry(study: optuna.Study) -> str:
    """:return: the best trial as YAML, ready for zoo_configs/mbmpo.yml"""
    settings, trial = study.user_attrs["settings"], complete_trials(study)[0]
    seeds = "seed 0" if settings["n_seeds"] == 1 else f"seeds 0 to {settings['n_seeds'] - 1}"
    comment = (
        f"# {seeds}, {settings['n_timesteps']} real steps, {settings['objective']} return {trial.value:.1f} "
        f"({settings['n_eval_episodes']} episodes an evaluation), {datetime.date.today()}.\n"
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
    parts = [f"<h1>{html.escape(study.study_name)}</h1>", table(["trials", "number"], sorted(counts.items()))]
    if complete_trials(study):
        best = best_entry(study)
        (folder / "best.yml").write_text(best)
        with warnings.catch_warnings():
            # Importances of few trials are poor; and the matplotlib backend calls itself experimental
            warnings.simplefilter("ignore")
            figures = draw(study, folder)
        parts += [
            "<h2>Best entry</h2>",
            f"<pre>{html.escape(best)}</pre>",
            "<h2>Best trials</h2>",
            trial_table(study),
            figures,
        ]
    else:
        parts.append("<p>No trial is complete: all were pruned, or none has ended yet.</p>")
    path = folder / "report.html"
    head = f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(study.study_name)}</title>"
    path.write_text(f"{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>")
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report on a study, whether it is still running or not."""
    parser = argparse.ArgumentParser(prog="python -m tuning.report", description=__doc__)
    add_arguments(parser)
    arguments = complete(parser.parse_args(argv))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(storage=open_storage(arguments.storage), study_name=arguments.study_name)
    print(f"Report: {write_report(study, arguments.output)}")


if __name__ == "__main__":
    main()
