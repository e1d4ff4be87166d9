"""What all processes of a search, and the report on it, must agree on: where the study is, and what a trial trains."""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend
from optuna.trial import FrozenTrial, TrialState

from sb3_mbmpo.search_space import DEFAULTS, convert, nearest_point, part_of_space
from sb3_mbmpo.zoo import ENV_ENTRIES
from tuning.lost_trials import queue_again

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# A machine is dead when it has not been heard of for so many heartbeats
MISSED_HEARTBEATS = 5
# Seconds that a process which has just created a study may need until it is described
CREATION_TIME = 10
# Seconds that a process waits for its turn at an SQLite database
SQLITE_TIMEOUT = 60

# What one number says about a learning curve. The last return is what users get; single evaluations are noisy, and a
# search over many trials finds the luckiest
OBJECTIVES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda curve: curve[-1],
    "best": max,
    "auc": statistics.fmean,
}

# Heartbeats have been experimental, and in use, since Optuna 2.9
warnings.filterwarnings("ignore", category=ExperimentalWarning)


class SearchError(Exception):
    """Ends a process of the search: with other trials, the same would happen."""


class DamagedStudyError(SearchError):
    """The file of the study cannot be read."""


class SettingsError(SearchError, ValueError):
    """No trial can be trained with the settings of the study."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where the study is."""
    parser.add_argument("--env", default="Pendulum-v1", help="environment id, or another entry of zoo_configs/mbmpo.yml")
    parser.add_argument("--study-name", help="by default the name of --env")
    parser.add_argument("--output", type=Path, help="folder of the report; by default runs/tuning/STUDY_NAME")
    parser.add_argument(
        "--storage",
        help="an Optuna URL (sqlite:///FILE, postgresql+psycopg2://USER@HOST/DATABASE, mysql+pymysql://..., "
        "redis://... or a journal FILE.log); by default study.db in the folder of the report",
    )


def complete(arguments: argparse.Namespace) -> argparse.Namespace:
    """
    :return: the arguments with the defaults that depend on one another, and the folder made
    :raises ValueError: if there can be no such folder
    """
    arguments.study_name = arguments.study_name or arguments.env
    arguments.output = arguments.output or Path("runs") / "tuning" / arguments.study_name
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        arguments.storage = arguments.storage or sqlite_url(arguments.output / "study.db")
    except (OSError, UnicodeEncodeError) as error:
        folder = str(arguments.output)
        raise ValueError(f"{folder!r} cannot be the folder of the report ({error}): give another --output.") from error
    return arguments


def sqlite_url(path: Path) -> str:
    """
    :param path: any name that the system allows: "?" begins the options of a URL
    :return: Optuna's URL of the database
    :raises ValueError: if there is none
    """
    url = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
    if sqlalchemy.make_url(url).database != str(path):  # SQLAlchemy 2.0
        raise ValueError(f"No URL names {str(path)!r}: give another --output, or --storage, or install SQLAlchemy 2.1.")
    return url.replace("{", "{{").replace("}", "}}")  # Optuna fills in a template


def open_storage(url: str, heartbeat: int = 30) -> BaseStorage:
    """
    :param url: see ``--storage``
    :param heartbeat: seconds between two signs of life of a running trial. Journals have none: a trial whose process was
        killed stays "running" in them, and another one is started in its place
    :return: what all processes of a search share
    :raises ValueError: if an SQLite database is not in order, or in memory
    """
    if url.endswith(".log"):
        return JournalStorage(JournalFileBackend(url.removeprefix("journal://")))
    if url.startswith(("redis://", "rediss://")):
        return JournalStorage(JournalRedisBackend(url))
    is_sqlite = url.startswith("sqlite")
    if is_sqlite and storage_file(url) is None:
        raise ValueError(f"{url} is in the memory of one process, and lost with it: name a file, as in sqlite:///study.db.")
    storage = RDBStorage(
        url,
        # Between two evaluations, a server may have closed the connection
        engine_kwargs={"pool_pre_ping": True, "connect_args": {"timeout": SQLITE_TIMEOUT} if is_sqlite else {}},
        heartbeat_interval=heartbeat,
        grace_period=MISSED_HEARTBEATS * heartbeat,
        heartbeat_stale_trial_callback=queue_again,
    )
    if is_sqlite:
        with storage.engine.connect() as connection:
            found = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar()
        if found != "ok":
            raise ValueError(found)
        sqlalchemy.event.listen(storage.engine, "begin", lock_before_reading)
    return storage


@contextmanager
def damage_named(url: str) -> Iterator[None]:
    """
    A file that was truncated or overwritten fails in as many ways as it has bytes: say which one it is, and what to do.

    :param url: of a storage that is read in the block
    :raises DamagedStudyError: if it is a file that makes no sense
    :raises SearchError: if it is a file that cannot be opened
    """
    try:
        yield
    except Exception as error:
        file = storage_file(url)
        if file is None or isinstance(error, SearchError):
            raise
        what = str(error).partition("\n")[0]
        if isinstance(error, (OSError, sqlalchemy.exc.OperationalError)):
            raise SearchError(
                f"{file} cannot be used ({what}). Its folder has to be there, both have to be yours to write, on a disk with "
                "room, and no other process may keep the file locked; or give another --storage."
            ) from error
        raise DamagedStudyError(
            f"{file} is damaged, or no study ({type(error).__name__}: {what}). Take an earlier copy of it, or begin "
            "another study with another --storage or --output."
        ) from error


def mend_journal(url: str) -> None:
    """
    Remove a last line that a killed process or a full disk left incomplete: the next one would be appended to it.

    :param url: of any storage
    """
    file = Path(url.removeprefix("journal://"))
    if not url.endswith(".log") or not file.is_file() or _ends_with_a_line(file):
        return
    lock = JournalFileSymlinkLock(str(file))
    lock.acquire()
    try:
        if not _ends_with_a_line(file):  # else another process was just writing it
            length = file.read_bytes().rfind(b"\n") + 1
            os.truncate(file, length)
            warnings.warn(f"{file} ended within a line, which is removed: what a process was about to store there is lost.")
    finally:
        lock.release()


def _ends_with_a_line(file: Path) -> bool:
    return file.read_bytes()[-1:] in (b"", b"\n")


def storage_file(url: str) -> str | None:
    """:return: the file of a journal or of an SQLite database; None if the storage is a server, or in memory"""
    if url.endswith(".log"):
        return url.removeprefix("journal://")
    file = sqlalchemy.make_url(url).database if url.startswith("sqlite") else None
    return None if file in ("", ":memory:") else file


def lock_before_reading(connection: sqlalchemy.Connection) -> None:
    """
    Optuna reads a trial's state and then changes it, which databases keep together by locking the row that is read. SQLite has
    no such locks, and two processes that have both read "waiting" would both do the trial: here, they take turns.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def open_study(storage: BaseStorage, name: str, settings: Mapping[str, Any]) -> optuna.Study:
    """
    Create a study, whose first trial is the configuration as it is, or join it.

    :param storage: where it is
    :param name: what it is called there
    :param settings: what a trial trains; part of the study
    :return: the study
    :raises SettingsError: if it exists with other settings, another search space or of another kind: its values could not be
        compared
    """
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
        directions = " and ".join(direction.name.lower() for direction in study.directions)
        if directions != "maximize":
            raise SettingsError(f"The study {name!r} is to {directions}, not ours: give another --study-name.") from None
        known = _known_settings(study)
        if known is None and any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False)):
            raise SettingsError(f"The study {name!r} has trials of another program: give another --study-name.") from None
    else:
        known = None
    space = search_space(settings)
    if known is None:
        if not study.get_trials(deepcopy=False):
            # A search that ends with worse than what there was would be worth nothing
            study.enqueue_trial(nearest_point(merge(DEFAULTS, settings["config"]), space, space))
        study.set_user_attr("settings", dict(settings))
        return study
    advice = "to go on with it, or begin another with --study-name."
    if differences := _differences(_flat(known), _flat(settings)):
        raise SettingsError(f"The study {name!r} has other settings, (its, yours): {differences}. Take the same ones {advice}")
    of_trials = {key: value for trial in study.get_trials(deepcopy=False) for key, value in trial.distributions.items()}
    if differences := _differences(of_trials, {key: space.get(key) for key in of_trials}):
        raise SettingsError(
            f"The study {name!r} was begun with another search space, (its, yours): {differences}. Take the version of "
            f"sb3_mbmpo that began it {advice}"
        )
    return study


def _known_settings(study: optuna.Study) -> Mapping[str, Any] | None:
    """:return: what the study says of itself; None if the process that created it was killed before it could say anything"""
    for _ in range(10 * CREATION_TIME):
        if "settings" in study.user_attrs:
            break
        time.sleep(0.1)
    known: Mapping[str, Any] | None = study.user_attrs.get("settings")
    return known


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """:return: the entries of nested dictionaries as "a.b.c" """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {key: (theirs.get(key), ours.get(key)) for key in sorted(theirs.keys() | ours.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    :return: the settings as a storage will give them back
    :raises ValueError: if it could not keep them
    """
    try:
        stored: dict[str, Any] = json.loads(json.dumps(settings))
    except TypeError as error:
        raise ValueError(f"Settings must be numbers, strings, lists and dictionaries: {error}.") from error
    return stored


def learning_starts(settings: Mapping[str, Any]) -> int:
    """:return: random real steps before the first fit"""
    return int(settings["config"].get("learning_starts", DEFAULTS["learning_starts"]))


def check_training(settings: Mapping[str, Any]) -> None:
    """:raises SettingsError: if the training would end before it learns, or have more evaluations than steps to learn from"""
    if settings["n_timesteps"] <= learning_starts(settings):
        raise SettingsError(
            f"All {settings['n_timesteps']} real steps would be random (learning_starts={learning_starts(settings)}), nothing "
            "would be learned: ask for more --n-timesteps, or for less with --set '{learning_starts: ...}'."
        )
    n_policy_steps = settings["n_timesteps"] - learning_starts(settings)
    if n_policy_steps < settings["n_evaluations"]:
        raise SettingsError(
            f"{settings['n_evaluations']} evaluations of the {n_policy_steps} real steps after the random ones would say the "
            "same over and over: ask for fewer --n-evaluations, or for more --n-timesteps."
        )


def search_space(settings: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """:return: the hyperparameters that the study searches"""
    return part_of_space(settings["names"], settings["n_timesteps"] - learning_starts(settings))


def evaluation_steps(settings: Mapping[str, Any]) -> list[int]:
    """:return: after how many real steps a training is evaluated: not before the first fit, when the policy is a random one"""
    first, n_evaluations = learning_starts(settings), settings["n_evaluations"]
    return [first + (settings["n_timesteps"] - first) * (i + 1) // n_evaluations for i in range(n_evaluations)]


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """:return: ``base`` with the entries of ``update``, dictionaries within them merged likewise"""
    merged = dict(base)
    for key, value in update.items():
        both_nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_nested else value
    return merged


def trial_entry(settings: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param settings: those of the study
    :param params: of a trial
    :return: what it trains, as an entry of zoo_configs
    """
    return merge(settings["config"], convert(params))


def split_entry(entry: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """:return: the part of an entry that makes the environment, and the arguments of MBMPO"""
    task = {key: value for key, value in entry.items() if key in ENV_ENTRIES}
    return task, {key: value for key, value in entry.items() if key not in ENV_ENTRIES}


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """:return: trials that came to an end, at the last step or pruned"""
    return study.get_trials(deepcopy=False, states=FINISHED)


def best_value(study: optuna.Study) -> float | None:
    """:return: of the best complete trial, None before there is one"""
    values = [trial.value for trial in finished(study) if trial.state == TrialState.COMPLETE and trial.value is not None]
    return max(values, default=None)
