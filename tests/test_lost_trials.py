"""Searches whose workers are killed or share a study: no trial is lost, and none is run twice."""

import subprocess
import sys
import threading
from pathlib import Path

import optuna
from optuna.trial import TrialState
from tiny_study import QUIET, STUDY, search, states

from tuning import lost_trials, studies, trials

pytestmark = QUIET

ROOT = Path(__file__).parent.parent

KILLED = """
import os, signal, sys
import optuna
from tuning import lost_trials, studies
study = optuna.load_study(storage=studies.open_storage(sys.argv[1]), study_name="study")
def killed(trial):
    with lost_trials.signed(trial):
        trial.suggest_float("x", 0, 1)
        os.kill(os.getpid(), signal.SIGKILL)
study.optimize(killed, n_trials=1)
"""


def test_a_killed_process_leaves_no_running_trial(url):
    study = studies.open_study(studies.open_storage(url), "study", STUDY | {"names": []})
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, url], cwd=ROOT, check=False, timeout=60)
    assert ended.returncode < 0
    assert states(study.trials) == ["RUNNING"]
    lock = Path(study.trials[0].user_attrs["worker"]["lock"])
    assert lock.exists()
    for _ in range(2):  # the second time, nothing is left to do
        lost_trials.reap(study, grace=60)
        assert states(study.trials) == ["FAIL", "WAITING"]
    assert study.trials[1].params == study.trials[0].params != {}
    assert "worker" not in study.trials[1].user_attrs
    assert not lock.exists()


def test_a_live_process_is_not_taken_for_dead(url):
    study = studies.open_study(studies.open_storage(url), "study", STUDY)
    trial = study.ask()
    with lost_trials.signed(trial):
        lost_trials.reap(study, grace=0)
        assert states(study.trials) == ["RUNNING"]
        assert not trials.wait_for_a_trial(study, 0, has_heartbeat=True)
    lost_trials.reap(study, grace=0)
    assert states(study.trials) == ["FAIL", "WAITING"]


def test_the_trials_of_a_search_name_their_process(journal, monkeypatch):
    seen = []

    def learning_curve(trial, *_):
        (running,) = trial.study.get_trials(states=(TrialState.RUNNING,))
        seen.append((lost_trials.is_here(running), lost_trials.is_lost(running, grace=0)))
        return [1.0]

    monkeypatch.setattr(trials, "learning_curve", learning_curve)
    search(journal)
    assert seen == [(True, False)]


def test_of_other_machines_nothing_is_known_and_a_trial_without_a_name_is_lost_after_a_while(url):
    study = studies.open_study(studies.open_storage(url), "study", STUDY)
    study.ask().set_user_attr("worker", {"host": "elsewhere", "lock": "/nowhere"})
    study.ask()
    lost_trials.reap(study, grace=60)
    assert states(study.trials) == ["RUNNING", "RUNNING"]
    lost_trials.reap(study, grace=0)
    assert states(study.trials) == ["RUNNING", "FAIL", "WAITING"]


def test_a_journal_waits_for_the_trials_of_this_machine_only(journal):
    study = studies.open_study(studies.open_storage(journal), "study", STUDY)
    study.ask().set_user_attr("worker", {"host": "elsewhere", "lock": "/nowhere"})
    assert trials.wait_for_a_trial(study, 1, has_heartbeat=False), "the running one may be dead"
    waits = threading.Event()
    with lost_trials.signed(study.ask()):
        waiting = threading.Thread(
            target=lambda: (trials.wait_for_a_trial(study, 1, has_heartbeat=False), waits.set()), daemon=True
        )
        waiting.start()
        assert not waits.wait(0.3)
    assert waits.wait(5), "its process has died"
    waiting.join()


def test_each_waiting_trial_is_taken_once(tmp_path):
    """Four workers, as far as the database can tell, ask for a trial while two are waiting; 8 times."""
    url = studies.sqlite_url(tmp_path / "study.db")
    study = optuna.create_study(storage=studies.open_storage(url), study_name="study")
    others = [optuna.load_study(storage=studies.open_storage(url), study_name="study") for _ in range(4)]
    taken, barrier = [], threading.Barrier(len(others))

    def take(other):
        barrier.wait()
        taken.append(other.ask().number)

    for round_ in range(8):
        for k in range(2):
            study.enqueue_trial({"x": 2 * round_ + k})
        threads = [threading.Thread(target=take, args=(other,)) for other in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(taken) == list(range(32))


def test_a_study_whose_creator_was_killed_still_begins_with_the_configuration(url, monkeypatch):
    monkeypatch.setattr(studies, "CREATION_TIME", 0)
    storage = studies.open_storage(url)
    optuna.create_study(storage=storage, study_name="study", direction="maximize")
    study = studies.open_study(storage, "study", STUDY)
    assert study.user_attrs["settings"] == STUDY
    assert study.trials[0].system_attrs["fixed_params"]["gae_lambda"] == 0.6
    assert len(studies.open_study(storage, "study", STUDY).trials) == 1
