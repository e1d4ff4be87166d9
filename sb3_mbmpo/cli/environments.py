"""The list of environments with settings of their own, and of what these have been measured to reach: ``--list``.

Nothing is written down twice: the settings are those of zoo_configs/mbmpo.yml, the returns those of docs/results.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import sb3_mbmpo
from sb3_mbmpo.zoo import config_file
from sb3_mbmpo.zoo.config import entries


class Measured(NamedTuple):
    """
    Returns of an entry of zoo_configs/mbmpo.yml.

    :param real_steps: after which they were measured
    :param returns: one per seed, ascending
    :param cpu_seconds: median of the processor time of the training
    """

    real_steps: int
    returns: list[float]
    cpu_seconds: float


def results_folder() -> Path:
    """Return the folder of the measured learning curves: in the source tree's ``docs``, or in the installed package."""
    package = Path(sb3_mbmpo.__file__).parent
    in_source_tree = package.parent / "docs" / "results" / "runs"
    return in_source_tree if in_source_tree.exists() else package / "results"


class Evaluation(NamedTuple):
    """One row of a learning curve: return and processor time after some real steps."""

    real_steps: int
    mean_return: float
    cpu_seconds: float


def read_curves(files: Iterable[Path]) -> dict[str, list[Evaluation]]:
    """
    Read learning curves.

    :param files: one CSV file per run, as ``tuning.results`` writes them
    :return: the evaluations of all runs with the same settings, by name of the settings
    """
    curves: dict[str, list[Evaluation]] = defaultdict(list)
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                steps, value, seconds = int(row["real_steps"]), float(row["mean_return"]), float(row["cpu_seconds"])
                curves[row["settings"]].append(Evaluation(steps, value, seconds))
    return curves


def measured(entry: str, budget: int, curves: Mapping[str, Sequence[Evaluation]]) -> Measured | None:
    """
    Find the returns of an entry at the end of its budget.

    :param entry: name of the entry
    :param budget: its number of real steps
    :param curves: what ``read_curves`` returns
    :return: the returns at the last evaluation within the budget that most runs have reached; None if there is no run
    """
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    # Runs with other settings name what they have changed
    for row in curves.get(f"zoo_configs/mbmpo.yml: {entry}", ()):
        if row.real_steps <= budget:
            found[row.real_steps].append((row.mean_return, row.cpu_seconds))
    if not found:
        return None
    real_steps = max(found, key=lambda steps: (len(found[steps]), steps))
    returns, seconds = zip(*found[real_steps], strict=True)
    return Measured(real_steps, sorted(returns), median(seconds))


def listing() -> str:
    """Return the list as text, in lines of at most 80 characters."""
    configs, curves = entries(), read_curves(results_folder().glob("mbmpo-*.csv"))
    lines = [f"{'environment':<26}{'real steps':>11}{'return':>10}{'worst, best seed':>18}{'seeds':>7}{'time':>8}"]
    for entry, settings in configs.items():
        if entry == "default":
            continue
        budget = int(settings["n_timesteps"])
        line, found = f"{entry:<26}{budget:>11,}", measured(entry, budget, curves)
        if found is None:
            lines.append(f"{line}{'not measured':>14}")
            continue
        low, high = (_number(found.returns[i]) for i in (0, -1))
        lines.append(
            f"{line}{_number(median(found.returns)):>10}{f'{low}, {high}':>18}{len(found.returns):>7}"
            f"{_duration(found.cpu_seconds):>8}"
        )
        if found.real_steps < budget:
            lines.append(f"{'':<26}{f'measured after {found.real_steps:,} of them':>11}")
    return "\n".join(
        [
            *lines,
            "",
            "Return: mean of deterministic episodes after training, median of the seeds.",
            "Time: of training, on one processor core.",
            f"Any other environment id gets {int(configs['default']['n_timesteps']):,} real steps and MBMPO's defaults.",
            f"All settings: {config_file()}",
        ]
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
