"""What all processes of a search, and the report on it, must agree on: where the study is, and what a trial trains."""

import argparse
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from optuna.trial import FrozenTrial, TrialState

from sb3_mbmpo.search_space import DEFAULTS, convert, nearest_point
from sb3_mbmpo.zoo import ENV_ENTRIES

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
# A machine is dead when it has not been heard of for so many heartbeats. Its trial is tried again at most so many times
MISSED_HEARTBEATS = 5
MAX_RETRIES = 3

# What one number says about a learning curve. The last return is what users get; single evaluations are noisy, and a
# search over many trials finds the luckiest
OBJECTIVES: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda curve: curve[-1],
    "best": max,
    "auc": statistics.fmean,
}

# Heartbeats have been experimental, and in use, since Optuna 2.9
warnings.filterwarnings("ignore", category=ExperimentalWarning)


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
    """:return: the arguments with the defaults that depend on one another, and the folder made"""
    arguments.study_name = arguments.study_name or arguments.env
    arguments.output = arguments.output or Path("runs") / "tuning" / arguments.study_name
    arguments.output.mkdir(parents=True, exist_ok=True)
    arguments.storage = arguments.storage or f"sqlite:///{arguments.output / 'study.db'}"
    return arguments


def open_storage(url: str, heartbeat: int = 30) -> BaseStorage:
    """
    :param url: see ``--storage``
    :param heartbeat: seconds between two signs of life of a running trial. Journals have none: a trial whose process was
        killed stays "running" in them, and another one is started in its place
    :return: what all processes of a search share
    """
    if url.endswith(".log"):
        return JournalStorage(JournalFileBackend(url.removeprefix("journal://")))
    if url.startswith(("redis://", "rediss://")):
        return JournalStorage(JournalRedisBackend(url))
    return RDBStorage(
        url,
        # Between two evaluations, a server may have closed the connection
        engine_kwargs={"pool_pre_ping": True},
        heartbeat_interval=heartbeat,
        grace_period=MISSED_HEARTBEATS * heartbeat,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES),
    )


def open_study(storage: BaseStorage, name: str, settings: Mapping[str, Any]) -> optuna.Study:
    """
    Create a study, whose first trial is the configuration as it is, or join it.

    :param storage: where it is
    :param name: what it is called there
    :param settings: what a trial trains; part of the study
    :return: the study
    :raises ValueError: if it exists with other settings: its values could not be compared
    """
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    except DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=name)
    else:
        # A search that ends with worse than what there was would be worth nothing
        study.enqueue_trial(nearest_point(merge(DEFAULTS, settings["config"]), settings["names"]))
    known = study.user_attrs.get("settings")
    if known is None:
        study.set_user_attr("settings", dict(settings))
    elif known != settings:
        differences = {key: (known.get(key), value) for key, value in settings.items() if known.get(key) != value}
        raise ValueError(
            f"The study {name!r} has other settings, (its, yours): {differences}. Take the same ones to go on with it, or "
            "begin another with --study-name."
        )
    return study


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
