"""Finding and reading the files of a run: model, log, evaluations, statistics of VecNormalize."""

import csv
import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.logger import (
    Figure,
    FormatUnsupportedError,
    HParam,
    Image,
    KVWriter,
    Video,
    filter_excluded_keys,
)

from sb3_mbmpo.common.atomic import write_whole
from sb3_mbmpo.common.save_util import read_npz
from sb3_mbmpo.mbmpo import MBMPO

# The logger's key of the number of real steps
STEPS = "time/total_timesteps"
# The remedy for a damaged log
LEAVE_OUT = "Repair it, or move it away to go on without it."
# Further models that rl_zoo3 and SB3's callbacks write beside the final one
PARTIAL_MODELS = ("best_model.zip", "rl_model_*_steps.zip")


def run_folder(model: Path) -> Path:
    """
    Return the folder of a run's other files.

    :param model: the model's file
    :return: the folder. Only ".zip" is removed from the name, so "lr0.001.zip" and "lr0.003.zip" have different folders
    """
    stem = model.name.removesuffix(".zip")
    return model.with_name(stem if stem != model.name else f"{stem}_files")


class RunFiles(NamedTuple):
    """
    The files of a run.

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
    Find the files of a run.

    :param path: a model, or the folder of a run: of ``python -m sb3_mbmpo train``, of rl_zoo3, or any that holds one model
    :return: the model, and the files beside it or in the folder of its name
    :raises ValueError: if there is no model, or more than one candidate
    """
    model = _find_model(path)
    folders = (run_folder(model), model.parent)

    def find(name: str) -> Path | None:
        return next((folder / name for folder in folders if (folder / name).is_file()), None)

    # rl_zoo3 stores the statistics in a folder of the environment's name, including those for best_model.zip
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
        raise ValueError(f"A report is about one model, but {path} has {names}: give the model's zip file.")
    return models[0]


class RunLog(NamedTuple):
    """
    The log of a run, and its model.

    :param progress: columns of progress.csv; empty if there is none
    :param evaluations: real steps (E,) and mean returns (E,) of evaluations.npz; empty if there is none
    :param model: the trained model
    """

    progress: Mapping[str, np.ndarray]
    evaluations: tuple[np.ndarray, np.ndarray]
    model: MBMPO

    def column(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """
        Return the values of one column of the log.

        :param key: a key of the logger
        :return: real steps and values of the rows that have both
        """
        if key not in self.progress or STEPS not in self.progress:
            return np.zeros(0), np.zeros(0)
        steps, values = self.progress[STEPS], self.progress[key]
        known = np.isfinite(steps) & np.isfinite(values)
        return steps[known], values[known]

    def evaluation(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the real steps and mean returns of the evaluations during the run."""
        return self.evaluations if len(self.evaluations[0]) > 0 else self.column("eval/mean_reward")

    def has_imagined_returns(self) -> bool:
        """Tell whether the log has the returns of imagined rollouts."""
        return len(self.column("imagined/ep_rew_mean")[0]) > 0


def read_run(files: RunFiles, model: MBMPO) -> RunLog:
    """
    Read the log of a run.

    :param files: the files of the run
    :param model: the model, loaded from them
    :return: the log and the model
    :raises ValueError: if the log or the evaluations are damaged
    """
    progress = {} if files.progress is None else read_progress(files.progress)
    evaluations = (np.zeros(0), np.zeros(0)) if files.evaluations is None else read_evaluations(files.evaluations)
    return RunLog(progress, evaluations, model)


def read_evaluations(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """
    Read the evaluations that SB3's ``EvalCallback`` has written.

    :param path: evaluations.npz
    :return: real steps (E,) and mean returns (E,)
    :raises ValueError: if the file is something else, or damaged
    """
    arrays = read_npz(path)
    if not {"timesteps", "results"} <= arrays.keys():
        raise ValueError(f"{path} lacks `timesteps` or `results`: it is not a file of SB3's `EvalCallback`. {LEAVE_OUT}")
    steps, results = arrays["timesteps"], arrays["results"]
    if not all(np.issubdtype(array.dtype, np.number) for array in (steps, results)):
        raise ValueError(f"{path} has `timesteps` of {steps.dtype} and `results` of {results.dtype}: no numbers. {LEAVE_OUT}")
    if steps.ndim != 1 or results.ndim != 2 or len(steps) != len(results):
        raise ValueError(f"{path} has `timesteps` {steps.shape} and `results` {results.shape}, which do not belong together.")
    return steps, results.mean(axis=1)


# ---------------------------------------------------------------- progress.csv

CHECKSUM = "checksum"


def _checksum(cells: Mapping[str, str]) -> str:
    """Return a hash of the non-empty cells of a row, so that a new column does not change it."""
    text = json.dumps(sorted((key, cell) for key, cell in cells.items() if cell != "" and key != CHECKSUM))
    return f"{zlib.crc32(text.encode()):08x}"


class RunLogFile(KVWriter):
    """
    Writer of progress.csv in the format of SB3's logger, but complete at any time, with checksums, and continued with the run.

    :param path: the file
    :param last_step: real steps of the resumed run, 0 for a new one; rows of later steps are dropped, as they will be repeated
    :param held: write nothing before ``release``, so that the log of an older run stays as long as its model
    :raises ValueError: if the log of the resumed run is damaged
    """

    def __init__(self, path: Path, last_step: int = 0, *, held: bool = False) -> None:
        self.path, self.held = path, held
        known = _read_rows(path) if last_step > 0 and path.exists() else []
        self.rows = [row for row in known if float(row.get(STEPS) or 0) <= last_step]

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """See ``KVWriter``."""
        values = filter_excluded_keys(key_values, key_excluded, "csv")
        if any(isinstance(value, (Video, Figure, Image, HParam)) for value in values.values()):
            raise FormatUnsupportedError(["csv"], "video, figure, image or hparam")
        self.rows.append({key: str(value) for key, value in values.items()})
        if not self.held:
            self._write_file()

    def release(self) -> None:
        """Write the rows that were held back, if they were."""
        if self.held:
            self.held = False
            self._write_file()

    def _write_file(self) -> None:
        text = io.StringIO()
        columns = dict.fromkeys(key for row in self.rows for key in row)
        writer = csv.DictWriter(text, [*columns, CHECKSUM], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, CHECKSUM: _checksum(row)} for row in self.rows)
        write_whole(self.path, text.getvalue())

    def close(self) -> None:
        """See ``KVWriter``. No file is open between two rows."""


def _read_rows(path: Path) -> list[dict[str, str]]:
    """
    Read the rows of a log, except an incomplete last one.

    :param path: the file
    :return: the cells of each row, without its checksum
    :raises ValueError: if a row does not match its checksum, or the file is not a table
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table of comma-separated values ({error}). {LEAVE_OUT}") from error
    if not table:
        return []
    header, *lines = table
    if not text.endswith("\n"):  # SB3's logger was killed in the middle of a row
        lines = lines[:-1]
    rows = []
    for number, line in enumerate(lines, 2):
        row = dict(zip(header, line, strict=False))
        if len(line) != len(header) or (CHECKSUM in header and row.pop(CHECKSUM) != _checksum(row)):
            raise ValueError(f"Row {number} of {path} is damaged. {LEAVE_OUT}")
        rows.append(row)
    return rows


def read_progress(path: Path) -> dict[str, np.ndarray]:
    """
    Read a log.

    :param path: progress.csv, written by this package's command line or by SB3's logger
    :return: one column per key, NaN where a row has no number
    :raises ValueError: if the file is damaged
    """

    def number(text: str) -> float:
        try:
            return float(text or "nan")
        except ValueError:
            return float("nan")

    rows = _read_rows(path)
    return {key: np.array([number(row[key]) for row in rows]) for key in (rows[0] if rows else {})}
