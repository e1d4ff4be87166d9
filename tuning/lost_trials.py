"""Trials that nobody works on any more, because their process was killed or their environment raised: found, and queued again.

Databases keep signs of life of running trials (``--heartbeat``), but only of those that have given one, and journals keep
none. So each trial also names a lock that its process holds: on the same machine, any other can tell whether it is alive.
"""

import datetime
import platform
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

# A trial is tried again at most so often
MAX_RETRIES = 3
# What a trial says of its process: {"host": name of the machine, "lock": path of a file}
WORKER = "worker"


@contextmanager
def signed(trial: optuna.Trial) -> Iterator[None]:
    """
    Tell other processes that this one works on the trial, as long as it does: the lock ends with it, however it ends.

    SQLite's locks are the ones that the standard library has on every system.
    """
    path = Path(tempfile.gettempdir()) / f"mbmpo-trial-{uuid.uuid4().hex}.lock"
    with closing(sqlite3.connect(path, isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        trial.set_user_attr(WORKER, {"host": platform.node(), "lock": str(path)})
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_here(trial: FrozenTrial) -> bool:
    """:return: whether its process was started on this machine"""
    worker = trial.user_attrs.get(WORKER)
    return worker is not None and worker["host"] == platform.node()


def is_lost(trial: FrozenTrial, grace: float) -> bool:
    """
    :param trial: a running one
    :param grace: seconds after which one that does not name its process has none
    :return: whether its process is known to be dead; of those of other machines, nothing is known here
    """
    if is_here(trial):
        return not _is_locked(trial.user_attrs[WORKER])
    started = trial.datetime_start
    return WORKER not in trial.user_attrs and (started is None or (datetime.datetime.now() - started).total_seconds() > grace)


def _is_locked(worker: Mapping[str, str]) -> bool:
    path = Path(worker["lock"])
    if not path.exists():
        return False
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:  # locked; or another user's, who will know
            return True
        path.unlink(missing_ok=True)  # the process that was to do it is dead
    return False


def queue_again(study: optuna.Study, trial: FrozenTrial, max_retries: int = MAX_RETRIES) -> None:
    """
    Let the next free process do a trial once more, with what is known of its hyperparameters.

    :param study: of the trial
    :param trial: has failed
    :param max_retries: nothing happens if it has been tried again so often
    """
    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    if len(history) <= max_retries:
        _queue(study, trial, {"failed_trial": trial.number, **trial.system_attrs, "retry_history": history})


def hand_back(trial: optuna.Trial) -> None:
    """Queue a trial again that is not to blame for its end: it does not count as a retry."""
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    _queue(trial.study, frozen, dict(frozen.system_attrs))


def _queue(study: optuna.Study, trial: FrozenTrial, system_attrs: dict[str, object]) -> None:
    # Not its user attributes: they name a process and an error that the new one has nothing to do with
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            system_attrs=system_attrs,
        )
    )


def reap(study: optuna.Study, grace: float) -> None:
    """
    Mark the running trials whose process was killed as failed, and queue them again.

    :param study: shared by all processes
    :param grace: as in ``is_lost``
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_lost(trial, grace):
            # Not if another process has been faster: then it is queued already
            with suppress(UpdateFinishedTrialError, ValueError):
                study.tell(trial.number, state=TrialState.FAIL)
                queue_again(study, trial)
