"""The figures of the page: learning curves of all runs, medians at fixed budgets, and who is ahead where."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tuning.results.files import csv_file
from tuning.results.records import read_rows
from tuning.results.runs import OURS, Run

NAMES = {OURS: "MB-MPO", "sac": "SAC", "crossq": "CrossQ", "tqc": "TQC", "ppo": "PPO", "trpo": "TRPO", "dqn": "DQN"}


# Kinds of time: their columns. On a machine with other work to do, wall time says more of that than of the training
TIMES = {"processor": "cpu_seconds", "wall": "wall_seconds"}


class Curve(NamedTuple):
    """
    What a run has measured so far.

    :param seed: of the training
    :param returns: mean return of the evaluation episodes after so many real steps
    :param seconds: time of the training until then
    :param rows: of its file
    """

    seed: int
    returns: dict[int, float]
    seconds: dict[int, float]
    rows: list[dict[str, str]]


# Of one environment: algorithm as rl_zoo3 names it, ours first: its curves, by seed
Curves = dict[str, list[Curve]]


def read_curves(runs: Sequence[Run], output: Path, time: str) -> dict[str, Curves]:
    """
    :param runs: of the queue, whose order stays
    :param output: folder of the CSV files
    :param time: which one the curves are to have, of ``TIMES``
    :return: by environment, the curves of the runs that have any rows; without those of ablations
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
    :param runs: of the queue, whose order stays
    :param output: folder of the CSV files
    :return: by environment and variant (an empty one: ours as they are), by seed, the mean return after so many real steps
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
    """:return: the rows of all runs in an environment, or of one algorithm's"""
    return [row for name, of_algo in curves.items() if algo in (None, name) for curve in of_algo for row in curve.rows]


def at(curves: Sequence[Curve], step: int) -> list[float]:
    """:return: the returns of all seeds after so many real steps, of those that were evaluated there"""
    return [curve.returns[step] for curve in curves if step in curve.returns]


def budgets(curves: Curves) -> list[int]:
    """:return: all real steps at which somebody was evaluated"""
    return sorted({step for of_algo in curves.values() for curve in of_algo for step in curve.returns})


def medians(curves: Curves, step: int) -> dict[str, float]:
    """:return: by algorithm, the median over the seeds after so many real steps"""
    returns = {algo: at(of_algo, step) for algo, of_algo in curves.items()}
    return {algo: statistics.median(values) for algo, values in returns.items() if values}


def median_seconds(curves: Sequence[Curve], step: int) -> float | None:
    """:return: time of the training until then, median over the seeds; None if none was evaluated there"""
    seconds = [curve.seconds[step] for curve in curves if step in curve.seconds]
    return statistics.median(seconds) if seconds else None


class Verdict(NamedTuple):
    """
    Where our median is, beside those of all peers that were evaluated at the same real steps.

    :param ahead: real steps at which it is above all of them
    :param level: ... at which it equals the best of them
    :param behind: ... at which it is below that of these peers
    """

    ahead: list[int]
    level: list[int]
    behind: dict[int, list[str]]


def judge(curves: Curves) -> Verdict:
    """:return: who is ahead, by medians; real steps at which only one side was evaluated do not count"""
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
    """:return: what was trained, in words, by algorithm and the environments' settings that have it in common"""
    found: dict[tuple[str, str], list[str]] = {}
    for environment, of_environment in curves.items():
        for algo in of_environment:
            for settings in sorted({row["settings"] for row in all_rows(of_environment, algo)}):
                found.setdefault((algo, settings), []).append(environment)
    return found
