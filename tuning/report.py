"""Report on a study: ``python -m tuning.report --env Pendulum-v1`` writes report.html, plots as PNG files, and best.yml."""

import argparse
import datetime
import html
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import yaml
from sqlalchemy.exc import SQLAlchemyError

from sb3_mbmpo.common.atomic import write_whole
from sb3_mbmpo.common.html_page import NARROW, page
from sb3_mbmpo.zoo.search_space import as_trained
from tuning.plots import draw, short_name
from tuning.studies import (
    SearchError,
    add_arguments,
    complete,
    complete_trials,
    damage_named,
    finished,
    open_storage,
    trial_entry,
)

# Number of trials in the table
N_TRIALS = 10
STYLE = f"""body {{ font: 15px/1.45 sans-serif }} table {{ display: block; overflow-x: auto; font-size: 14px }}
td, th {{ padding: .2em .5em; text-align: right; white-space: nowrap }} img {{ width: 100% }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: inherit }}
pre {{ background: #f2f2f2; padding: 1em; overflow-x: auto }} .note {{ max-width: 50em }}
@media (max-width: {NARROW}px) {{ table {{ font-size: 13px }} }}"""


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
        rows.append([short_name(name), *(as_trained(trial.params.get(name, "")) for trial in trials)])
    return table(["trial", *(trial.number for trial in trials)], rows)


def error_table(study: optuna.Study) -> str:
    """Return an HTML table of the errors that ended trials early, or an empty string if there are none."""
    errors = Counter(trial.user_attrs["error"] for trial in study.get_trials(deepcopy=False) if "error" in trial.user_attrs)
    return table(["pruned or failed because of", "trials"], errors.most_common()) if errors else ""


def meaning(settings: Mapping[str, Any]) -> str:
    """Return a sentence that explains the value of a trial."""
    n_episodes = settings["n_eval_episodes"]
    return (
        f"Value of a trial: the {settings['objective']} return of {settings['n_evaluations']} evaluations of "
        f"{n_episodes} deterministic episode{'s' if n_episodes > 1 else ''} each, within {settings['n_timesteps']:,} real "
        f"steps; {_seeds(settings)}."
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
        f"<p class='note'>{html.escape(meaning(study.user_attrs['settings']))}</p>",
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
    write_whole(path, page(f"Hyperparameter search: {study.study_name}", STYLE, parts))
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
