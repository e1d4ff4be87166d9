"""Find trials whose worker was killed or whose environment raised, and queue them again.

Databases record heartbeats of running trials (``--heartbeat``), but only of trials that have sent one, and journals record
none. Each trial therefore also names a lock that its worker holds: any process on the same machine can tell from it whether
the worker is alive.
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

# A failed trial is retried at most this often
MAX_RETRIES = 3
# User attribute that describes a trial's worker: {"host": name of the machine, "lock": path of a file}
WORKER = "worker"


@contextmanager
def signed(trial: optuna.Trial) -> Iterator[None]:
    """
    Hold a lock that tells other processes that this one works on the trial.

    The operating system releases the lock when the process ends, however it ends. SQLite's locks are the only ones that the
    standard library offers on every system.
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
    """Return whether the trial's worker was started on this machine."""
    worker = trial.user_attrs.get(WORKER)
    return worker is not None and worker["host"] == platform.node()


def is_lost(trial: FrozenTrial, grace: float) -> bool:
    """
    Return whether the worker of a trial is known to be dead.

    :param trial: a running trial
    :param grace: seconds after which a trial that does not name its worker counts as lost
    :return: whether the trial is lost; False for workers of other machines, of which nothing is known here
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
        except sqlite3.OperationalError:  # locked, or another user's file: left to that user
            return True
        path.unlink(missing_ok=True)  # the worker that would have removed it is dead
    return False


def queue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """
    Queue a failed trial for the next free worker, with the hyperparameters that were drawn so far.

    After ``MAX_RETRIES`` retries, it is not queued again.

    :param study: study of the trial
    :param trial: the failed trial
    """
    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    if len(history) <= MAX_RETRIES:
        _queue(study, trial, {"failed_trial": trial.number, **trial.system_attrs, "retry_history": history})


def hand_back(trial: optuna.Trial) -> None:
    """Queue a trial again without counting a retry, because its failure was not its own fault."""
    frozen = trial.study.get_trials(deepcopy=False)[trial.number]
    _queue(trial.study, frozen, dict(frozen.system_attrs))


def _queue(study: optuna.Study, trial: FrozenTrial, system_attrs: dict[str, object]) -> None:
    # Without the user attributes: they name the worker and the error of the old trial
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
    Mark running trials whose worker was killed as failed, and queue them again.

    :param study: study shared by all workers
    :param grace: as in ``is_lost``
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_lost(trial, grace):
            # Both errors mean that another process was faster and has queued it already
            with suppress(UpdateFinishedTrialError, ValueError):
                study.tell(trial.number, state=TrialState.FAIL)
                queue_again(study, trial)
