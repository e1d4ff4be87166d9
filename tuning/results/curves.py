"""The numbers on the page: learning curves of all runs, medians at fixed budgets, and which algorithm is ahead where."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tuning.results.files import csv_file
from tuning.results.records import read_rows
from tuning.results.runs import OURS, Run

NAMES = {OURS: "MB-MPO", "sac": "SAC", "crossq": "CrossQ", "tqc": "TQC", "ppo": "PPO", "trpo": "TRPO", "dqn": "DQN"}


# Kind of time: its column. On a busy machine, wall time says more about the other load than about the training
TIMES = {"processor": "cpu_seconds", "wall": "wall_seconds"}


class Curve(NamedTuple):
    """
    The measurements of a run so far.

    :param seed: seed of the training
    :param returns: mean return of the evaluation episodes, by the number of real steps
    :param seconds: training time, by the number of real steps
    :param rows: rows of the run's CSV file
    """

    seed: int
    returns: dict[int, float]
    seconds: dict[int, float]
    rows: list[dict[str, str]]


# The curves of one environment by algorithm (rl_zoo3's names, ours first), in the order of their seeds
Curves = dict[str, list[Curve]]


def read_curves(runs: Sequence[Run], output: Path, time: str) -> dict[str, Curves]:
    """
    Read the learning curves of all runs that have rows, except ablations.

    :param runs: runs of the queue; the environments keep their order
    :param output: folder of the CSV files
    :param time: kind of time that the curves get, a key of ``TIMES``
    :return: curves by environment
    """
    curves: dict[str, Curves] = {}
    for run in sorted(runs, key=lambda run: (list(NAMES).index(run.algo), run.seed)):
        if run.variant:
            continue
        rows = read_rows(csv_file(output, run))
        if rows:
            returns = {int(row["real_steps"]): float(row["mean_return"]) for row in rows}
            seconds = {int(row["real_steps"]): float(row[TIMES[time]]) for row in rows}
            of_environment = curves.setdefault(run.environment, {})
            of_environment.setdefault(run.algo, []).append(Curve(run.seed, returns, seconds, rows))
    order = [run.environment for run in runs]
    return dict(sorted(curves.items(), key=lambda item: order.index(item[0])))


def read_ablations(runs: Sequence[Run], output: Path) -> dict[str, dict[str, dict[int, dict[int, float]]]]:
    """
    Read the mean returns of the ablations, and of the unchanged settings beside them.

    :param runs: runs of the queue; the variants keep their order
    :param output: folder of the CSV files
    :return: mean returns by environment, variant (empty for the unchanged settings), seed and number of real steps
    """
    ablated = {run.environment for run in runs if run.variant}
    found: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
    ours = [run for run in runs if run.environment in ablated and run.algo == OURS]
    for run in sorted(ours, key=lambda run: run.variant != ""):
        rows = read_rows(csv_file(output, run))
        if rows:
            returns = {int(row["real_steps"]): float(row["mean_return"]) for row in rows}
            found.setdefault(run.environment, {}).setdefault(run.variant, {})[run.seed] = returns
    return {environment: variants for environment, variants in found.items() if set(variants) != {""}}


def all_rows(curves: Curves, algo: str | None = None) -> list[dict[str, str]]:
    """Return the rows of all runs in an environment, or only those of one algorithm."""
    return [row for name, of_algo in curves.items() if algo in (None, name) for curve in of_algo for row in curve.rows]


def at(curves: Sequence[Curve], step: int) -> list[float]:
    """Return the returns at a number of real steps, for the seeds that were evaluated there."""
    return [curve.returns[step] for curve in curves if step in curve.returns]


def budgets(curves: Curves) -> list[int]:
    """Return all numbers of real steps at which any run was evaluated."""
    return sorted({step for of_algo in curves.values() for curve in of_algo for step in curve.returns})


def medians(curves: Curves, step: int) -> dict[str, float]:
    """Return each algorithm's median return over the seeds at a number of real steps."""
    returns = {algo: at(of_algo, step) for algo, of_algo in curves.items()}
    return {algo: statistics.median(values) for algo, values in returns.items() if values}


def median_seconds(curves: Sequence[Curve], step: int) -> float | None:
    """Return the median training time over the seeds at a number of real steps, or None if no seed was evaluated there."""
    seconds = [curve.seconds[step] for curve in curves if step in curve.seconds]
    return statistics.median(seconds) if seconds else None


class Verdict(NamedTuple):
    """
    Our median compared with those of all peers that were evaluated at the same numbers of real steps.

    :param ahead: real steps at which our median is above all of theirs
    :param level: real steps at which it equals the best of theirs
    :param behind: real steps at which it is below theirs, with the names of these peers
    """

    ahead: list[int]
    level: list[int]
    behind: dict[int, list[str]]


def judge(curves: Curves) -> Verdict:
    """Compare the medians of MBMPO and its peers, ignoring real steps at which only one side was evaluated."""
    verdict = Verdict([], [], {})
    for step in budgets(curves):
        peers = medians(curves, step)
        ours = peers.pop(OURS, None)
        if ours is None or not peers:
            continue
        better = [algo for algo, value in peers.items() if value > ours]
        if better:
            verdict.behind[step] = better
        else:
            (verdict.level if ours in peers.values() else verdict.ahead).append(step)
    return verdict


def settings_of(curves: Mapping[str, Curves]) -> dict[tuple[str, str], list[str]]:
    """Return the environments that share the same algorithm and the same settings text."""
    found: dict[tuple[str, str], list[str]] = {}
    for environment, of_environment in curves.items():
        for algo in of_environment:
            for settings in sorted({row["settings"] for row in all_rows(of_environment, algo)}):
                found.setdefault((algo, settings), []).append(environment)
    return found
