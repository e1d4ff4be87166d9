"""What all workers of a search and the report must agree on: where the study is stored and what a trial trains."""

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

from sb3_mbmpo.zoo import ENV_ENTRIES, merge
from sb3_mbmpo.zoo.search_space import DEFAULTS, convert, nearest_point, part_of_space
from tuning.lost_trials import queue_again

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# A machine counts as dead after this many missed heartbeats
MISSED_HEARTBEATS = 5
# Seconds that a process may take between creating a study and storing its settings
CREATION_TIME = 10
# Seconds that a process waits for the lock of an SQLite database
SQLITE_TIMEOUT = 60

# Ways to score a learning curve. The last return is what users get. Single evaluations are noisy, so "best" favours the
# luckiest one when a search runs many trials
OBJECTIVES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda curve: curve[-1],
    "best": max,
    "auc": statistics.fmean,
}

# Optuna has called heartbeats experimental since 2.9, although they are widely used
warnings.filterwarnings("ignore", category=ExperimentalWarning)


class SearchError(Exception):
    """An error that stops a worker of the search, because every other trial would fail in the same way."""


class DamagedStudyError(SearchError):
    """An error for a study file that cannot be read."""


class SettingsError(SearchError, ValueError):
    """An error for study settings with which no trial can be trained."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that locate the study."""
    parser.add_argument("--env", default="Pendulum-v1", help="environment id, or another entry of zoo_configs/mbmpo.yml")
    parser.add_argument("--study-name", help="default: the value of --env")
    parser.add_argument("--output", type=Path, help="folder for the report; default: runs/tuning/STUDY_NAME")
    parser.add_argument(
        "--storage",
        help="an Optuna URL (sqlite:///FILE, postgresql+psycopg2://USER@HOST/DATABASE, mysql+pymysql://..., "
        "redis://... or a journal FILE.log); default: study.db in the folder of the report",
    )


def complete(arguments: argparse.Namespace) -> argparse.Namespace:
    """
    Fill in the defaults that depend on other arguments, and create the output folder.

    :raises ValueError: if the folder cannot be created
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
    Return the URL under which Optuna opens an SQLite database.

    :param path: any file name that the operating system allows, even with characters such as "?" that are special in a URL
    :return: URL of the database
    :raises ValueError: if no URL can express the path
    """
    url = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
    if sqlalchemy.make_url(url).database != str(path):  # SQLAlchemy 2.0
        raise ValueError(f"No URL can express {str(path)!r}: give another --output, or --storage, or install SQLAlchemy 2.1.")
    return url.replace("{", "{{").replace("}", "}}")  # Optuna treats the URL as a format string


def open_storage(url: str, heartbeat: int = 30) -> BaseStorage:
    """
    Open the storage that all workers of a search share.

    :param url: see ``--storage``
    :param heartbeat: seconds between two heartbeats of a running trial. Journals have none: there, a trial whose worker was
        killed stays "running", and another trial is started in its place
    :return: the storage
    :raises ValueError: if an SQLite database fails its integrity check, or is in memory
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
        # A server may close the connection between two evaluations
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
    Turn any error from reading a damaged study file into one that names the file and the remedy.

    A truncated or overwritten file can make Optuna raise almost anything, so every exception type is caught.

    :param url: URL of the storage that is read in the block
    :raises DamagedStudyError: if the storage is a file that cannot be read
    :raises SearchError: if the storage is a file that cannot be opened
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
            f"{file} is damaged or not a study ({type(error).__name__}: {what}). Restore an earlier copy, or start a new "
            "study with another --storage or --output."
        ) from error


def repair_journal(url: str) -> None:
    """
    Remove an incomplete last line, left by a killed process or a full disk, from a journal.

    Otherwise, Optuna would append the next record to it.

    :param url: URL of any storage; storages other than journals are left alone
    """
    file = Path(url.removeprefix("journal://"))
    if not url.endswith(".log") or not file.is_file() or _ends_with_a_line(file):
        return
    lock = JournalFileSymlinkLock(str(file))
    lock.acquire()
    try:
        if not _ends_with_a_line(file):  # otherwise another process was just writing the line
            length = file.read_bytes().rfind(b"\n") + 1
            os.truncate(file, length)
            warnings.warn(f"{file} ended with an incomplete line, now removed: the record being written there is lost.")
    finally:
        lock.release()


def _ends_with_a_line(file: Path) -> bool:
    return file.read_bytes()[-1:] in (b"", b"\n")


def storage_file(url: str) -> str | None:
    """Return the file of a journal or of an SQLite database, or None if the storage is a server or in memory."""
    if url.endswith(".log"):
        return url.removeprefix("journal://")
    file = sqlalchemy.make_url(url).database if url.startswith("sqlite") else None
    return None if file in ("", ":memory:") else file


def lock_before_reading(connection: sqlalchemy.Connection) -> None:
    """
    Make SQLite transactions take the write lock before they read.

    Optuna reads a trial's state and then changes it. Other databases make this atomic by locking the row that is read. SQLite
    has no row locks, so two workers that both read "waiting" would both run the trial.
    """
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def open_study(storage: BaseStorage, name: str, settings: Mapping[str, Any]) -> optuna.Study:
    """
    Create a study or join an existing one.

    The first trial of a new study is the unchanged configuration.

    :param storage: storage of the study
    :param name: name of the study
    :param settings: what a trial trains; stored with the study
    :return: the study
    :raises SettingsError: if the study exists with other settings, another search space or of another kind, which would make
        values incomparable
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
            # The search should never end with something worse than the current configuration
            study.enqueue_trial(nearest_point(merge(DEFAULTS, settings["config"]), space, space))
        study.set_user_attr("settings", dict(settings))
        return study
    advice = "to continue it, or start a new study with --study-name."
    if differences := _differences(_flat(known), _flat(settings)):
        raise SettingsError(f"The study {name!r} has other settings, (its, yours): {differences}. Use the same ones {advice}")
    of_trials = {key: value for trial in study.get_trials(deepcopy=False) for key, value in trial.distributions.items()}
    if differences := _differences(of_trials, {key: space.get(key) for key in of_trials}):
        raise SettingsError(
            f"The study {name!r} was created with another search space, (its, yours): {differences}. Use the version of "
            f"sb3_mbmpo that created it {advice}"
        )
    return study


def _known_settings(study: optuna.Study) -> Mapping[str, Any] | None:
    """Return the settings stored with the study, or None if the process that created it was killed before it stored them."""
    for _ in range(10 * CREATION_TIME):
        if "settings" in study.user_attrs:
            break
        time.sleep(0.1)
    known: Mapping[str, Any] | None = study.user_attrs.get("settings")
    return known


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries into one whose keys have the form "a.b.c"."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {key: (theirs.get(key), ours.get(key)) for key in sorted(theirs.keys() | ours.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the settings as they will read when they come back from a storage.

    :raises ValueError: if the settings cannot be stored as JSON
    """
    try:
        stored: dict[str, Any] = json.loads(json.dumps(settings))
    except TypeError as error:
        raise ValueError(f"Settings must be numbers, strings, lists and dictionaries: {error}.") from error
    return stored


def learning_starts(settings: Mapping[str, Any]) -> int:
    """Return the number of random real steps before the first fit of the models."""
    return int(settings["config"].get("learning_starts", DEFAULTS["learning_starts"]))


def policy_steps(settings: Mapping[str, Any]) -> int:
    """Return the number of real steps after the random ones; 0 or less if there are none."""
    steps: int = settings["n_timesteps"] - learning_starts(settings)
    return steps


def check_training(settings: Mapping[str, Any]) -> None:
    """
    Reject settings with which a training run would end before it learns anything, or be evaluated more often than it learns.

    :raises SettingsError: if all real steps would be random, or there are more evaluations than other steps
    """
    if policy_steps(settings) <= 0:
        raise SettingsError(
            f"All {settings['n_timesteps']} real steps would be random (learning_starts={learning_starts(settings)}), so "
            "nothing would be learned: increase --n-timesteps, or lower learning_starts with --set '{learning_starts: ...}'."
        )
    if policy_steps(settings) < settings["n_evaluations"]:
        raise SettingsError(
            f"{settings['n_evaluations']} evaluations of the {policy_steps(settings)} real steps after the random ones would "
            "say the same over and over: ask for fewer --n-evaluations, or for more --n-timesteps."
        )


def search_space(settings: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Return the search space of the study."""
    return part_of_space(settings["names"], policy_steps(settings))


def evaluation_steps(settings: Mapping[str, Any]) -> list[int]:
    """Return the real steps at which a training run is evaluated, all after the first fit: before, the policy is random."""
    first, n_evaluations = learning_starts(settings), settings["n_evaluations"]
    return [first + policy_steps(settings) * (i + 1) // n_evaluations for i in range(n_evaluations)]


def trial_entry(settings: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return what a trial trains, as an entry of ``zoo_configs/mbmpo.yml``.

    :param settings: settings of the study
    :param params: parameters of the trial
    :return: the entry
    """
    return merge(settings["config"], convert(params))


def split_entry(entry: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split an entry into the part that describes the environment and the arguments of MBMPO."""
    env_entries = {key: value for key, value in entry.items() if key in ENV_ENTRIES}
    return env_entries, {key: value for key, value in entry.items() if key not in ENV_ENTRIES}


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that are complete or pruned."""
    return study.get_trials(deepcopy=False, states=FINISHED)


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that were not pruned, the best first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(trials, key=lambda trial: trial.value or 0.0, reverse=True)


def best_value(study: optuna.Study) -> float | None:
    """Return the value of the best complete trial, or None if there is none yet."""
    values = [trial.value for trial in finished(study) if trial.state == TrialState.COMPLETE and trial.value is not None]
    return max(values, default=None)
