"""The files of a run, wherever they were put: model, log, evaluations, statistics of VecNormalize."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sb3_mbmpo.mbmpo import MBMPO

# What rl_zoo3 and SB3's callbacks leave beside the model at the end of training
PARTIAL_MODELS = ("best_model.zip", "rl_model_*_steps.zip")


class RunFiles(NamedTuple):
    """
    :param model: the zip file
    :param progress: progress.csv, as SB3's logger writes it
    :param evaluations: evaluations.npz, as SB3's ``EvalCallback`` writes it
    :param vec_normalize: vecnormalize.pkl, as rl_zoo3 writes it
    """

    model: Path
    progress: Path | None
    evaluations: Path | None
    vec_normalize: Path | None


def find_run(path: Path) -> RunFiles:
    """
    :param path: a model, or the folder of a run: ``python -m sb3_mbmpo train``'s, rl_zoo3's, or any with one model in it
    :return: the model, and what lies beside it or in the folder of its name
    :raises ValueError: if there is no model, or no telling which
    """
    model = _find_model(path)
    folders = (model.with_suffix(""), model.parent)

    def find(name: str) -> Path | None:
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    # rl_zoo3 keeps the statistics in a folder of the environment's name, also those of best_model.zip
    elsewhere = next(iter(sorted(model.parent.glob("*/vecnormalize.pkl"))), None) if _is_partial(model) else None
    return RunFiles(model, find("progress.csv"), find("evaluations.npz"), find("vecnormalize.pkl") or elsewhere)


def _is_partial(model: Path) -> bool:
    return any(model.match(pattern) for pattern in PARTIAL_MODELS)


def _find_model(path: Path) -> Path:
    folder = path.absolute()  # "." has no name
    beside = folder.with_name(folder.name + ".zip")
    if not path.is_dir():
        found = next((candidate for candidate in (path, beside) if candidate.is_file()), None)
        if found is None:
            raise ValueError(f"There is no model and no folder {path}: give a model's zip file, or the folder of a run.")
        return found
    inside = sorted(path.glob("*.zip"))
    models = [model for model in inside if not _is_partial(model)] or inside or ([beside] if beside.is_file() else [])
    if len(models) != 1:
        names = ", ".join(model.name for model in models) or f"no model in it, and no {beside.name} beside it"
        raise ValueError(f"A report is on one model, and {path} has {names}: give the model's zip file.")
    return models[0]


class RunLog(NamedTuple):
    """
    What a run says of itself.

    :param progress: columns of progress.csv; empty if there is none
    :param evaluations: real steps (E,) and mean returns (E,) of evaluations.npz; empty if there is none
    :param model: the trained model
    """

    progress: Mapping[str, np.ndarray]
    evaluations: tuple[np.ndarray, np.ndarray]
    model: MBMPO

    def column(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """
        :param key: of the logger
        :return: real steps and values of the rows that have both
        """
        if key not in self.progress or "time/total_timesteps" not in self.progress:
            return np.zeros(0), np.zeros(0)
        steps, values = self.progress["time/total_timesteps"], self.progress[key]
        known = np.isfinite(steps) & np.isfinite(values)
        return steps[known], values[known]

    def evaluation(self) -> tuple[np.ndarray, np.ndarray]:
        """:return: real steps and mean returns of evaluations in the course of the run"""
        return self.evaluations if len(self.evaluations[0]) > 0 else self.column("eval/mean_reward")

    def has_imagined_returns(self) -> bool:
        """:return: whether the log has the returns of imagined rollouts"""
        return len(self.column("imagined/ep_rew_mean")[0]) > 0


def read_run(files: RunFiles, model: MBMPO) -> RunLog:
    """
    :param files: of the run
    :param model: loaded from them
    """
    progress = {} if files.progress is None else read_progress(files.progress)
    evaluations = np.zeros(0), np.zeros(0)
    if files.evaluations is not None:
        with np.load(files.evaluations) as data:
            evaluations = data["timesteps"], data["results"].mean(axis=1)
    return RunLog(progress, evaluations, model)


def read_progress(path: Path) -> dict[str, np.ndarray]:
    """
    :param path: progress.csv, as SB3's logger writes it
    :return: a column a key, NaN where a row has no number
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def number(text: str | None) -> float:
        try:
            return float(text or "nan")
        except ValueError:
            return float("nan")

    return {key: np.array([number(row[key]) for row in rows]) for key in (rows[0] if rows else {})}
