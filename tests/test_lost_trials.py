"""Searches in which something goes wrong: environments that raise, workers that are killed, settings that cannot work."""

import argparse
import re
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from tiny import SETTINGS, Drift

from sb3_mbmpo.zoo.search_space import suggest
from tuning import lost_trials, optimize, report, studies, trials

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize"),
]

ROOT = Path(__file__).parent.parent
STUDY = dict(
    env="Breaking-v0",
    config={"policy": "MlpPolicy"} | {key: value for key, value in SETTINGS.items() if key != "seed"},
    n_timesteps=40,
    names=["gae_lambda", "inner_lr"],
    objective="last",
    n_seeds=1,
    n_evaluations=1,
    n_eval_episodes=1,
)


class Breaking(Drift):
    """An environment that raises the next of ``errors`` at its 30th step, which is after the first fit."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - as Gymnasium has it
    errors: list = []  # noqa: RUF012 - set by the tests

    def step(self, action):
        if self.n_steps == 30 and self.errors:
            raise self.errors.pop(0)
        return super().step(action)


class BreakingElsewhere(Drift):
    """Does ``faults``, one after the other, each where it says."""

    metadata = Breaking.metadata
    faults: list = []  # noqa: RUF012 - the tests' way in

    def __init__(self):
        super().__init__()
        self.do("__init__")

    def do(self, place):
        if self.faults and self.faults[0][0] == place:
            fault = self.faults.pop(0)[1]
            if isinstance(fault, BaseException):
                raise fault
            return fault
        return None

    def reset(self, **kwargs):
        self.do("reset")
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, *rest = super().step(action)
        obs[0] = self.do("observation") or obs[0]
        return obs, self.do("reward") or reward, *rest

    def close(self):
        self.do("close")


gym.register("Breaking-v0", entry_point=Breaking)
gym.register("BreakingElsewhere-v0", entry_point=BreakingElsewhere, disable_env_checker=True)
ELSEWHERE = STUDY | {"env": "BreakingElsewhere-v0"}


@pytest.fixture(autouse=True)
def no_messages():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    Breaking.errors, BreakingElsewhere.faults = [], []


@pytest.fixture(params=["study.db", "study.log"])
def url(request, tmp_path):
    return studies.sqlite_url(tmp_path / request.param) if request.param.endswith(".db") else str(tmp_path / request.param)


@pytest.fixture
def journal(tmp_path):
    """Return a journal's URL: databases are slow to create and to write to."""
    return str(tmp_path / "study.log")


def search(url, n_trials=1, settings=STUDY):
    """Run one worker of a search and return the trials that it leaves behind."""
    arguments = argparse.Namespace(storage=url, heartbeat=30, study_name="study", n_trials=n_trials, device="cpu")
    trials.work(arguments, settings, 1)
    return trials_of(url)


def trials_of(url):
    return optuna.load_study(storage=studies.open_storage(url), study_name="study").trials


def states(all_trials):
    return [trial.state.name for trial in all_trials]


# ---------------------------------------------------------------- exceptions


@pytest.mark.parametrize(
    "error", [RuntimeError("the simulator blew up"), ValueError("bad joint"), KeyError("joint"), SystemExit("no licence")]
)
def test_an_exception_in_the_environment_is_marked_and_the_trial_done_again(error, journal):
    Breaking.errors = [error]
    first, second, third = search(journal, n_trials=2)
    assert states([first, second, third]) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert f"{type(error).__name__}: {error}" in first.user_attrs["error"]
    assert second.params == first.params, "the shipped settings are still measured"
    assert "error" not in second.user_attrs
    assert third.params != second.params


@pytest.mark.parametrize(
    ("place", "fault", "named"),
    [
        ("__init__", ValueError("no such map"), "ValueError: no such map"),
        ("__init__", SystemExit(3), "SystemExit: 3"),
        ("reset", ValueError("no such map"), r"reset\(\) raised ValueError: no such map"),
        ("reset", SystemExit("no licence"), r"reset\(\) raised SystemExit: no licence"),
        ("reward", float("nan"), "before anything was learned: .*NaN or infinite reward"),
        ("observation", float("inf"), "before anything was learned: .*NaN or infinite observation"),
    ],
)
def test_wherever_an_environment_fails_its_trial_is_done_again(place, fault, named, journal):
    BreakingElsewhere.faults = [(place, fault)]
    first, second = search(journal, settings=ELSEWHERE)
    assert states([first, second]) == ["FAIL", "COMPLETE"]
    assert re.search(named, first.user_attrs["error"])
    assert second.params == first.params


@pytest.mark.parametrize("error", [RuntimeError("no window"), SystemExit(1)])
def test_an_environment_that_cannot_be_closed_costs_no_trial(error, journal):
    BreakingElsewhere.faults = [("close", error)]
    with pytest.warns(UserWarning, match=rf"close\(\) raised {type(error).__name__}: {error}: its trial counts"):
        (trial,) = search(journal, settings=ELSEWHERE)
    assert trial.state == TrialState.COMPLETE


def test_what_an_environment_raised_first_is_what_is_named(journal):
    BreakingElsewhere.faults = [("reset", KeyError("joint")), ("close", RuntimeError("no window"))]
    with pytest.warns(UserWarning, match="no window"):
        first, _ = search(journal, settings=ELSEWHERE)
    assert "KeyError: 'joint'" in first.user_attrs["error"]


def test_hyperparameters_that_this_machine_has_no_room_for_end_their_trial_only(journal, monkeypatch):
    def build(policy, env, inner_lr, **kwargs):
        if inner_lr != SETTINGS["inner_lr"]:  # that of the configuration, which the space lacks
            raise ValueError("would need 99 GiB")

    monkeypatch.setattr(trials, "MBMPO", build)
    found = search(journal, n_trials=2)
    assert states(found) == ["PRUNED", "PRUNED"]
    assert [trial.user_attrs["error"] for trial in found] == ["would need 99 GiB"] * 2


def test_a_trial_that_always_fails_is_given_up_and_the_search_goes_on(journal, monkeypatch):
    hopeless = []

    def learning_curve(trial, *_):
        hopeless.append(trial.params)
        if trial.params == hopeless[0]:
            raise MemoryError("too large")
        return [1.0]

    monkeypatch.setattr(trials, "learning_curve", learning_curve)
    found = search(journal)
    assert states(found) == ["FAIL"] * (1 + lost_trials.MAX_RETRIES) + ["COMPLETE"]
    assert [trial.params for trial in found[:-1]] == [found[0].params] * (1 + lost_trials.MAX_RETRIES)
    assert [trial.system_attrs.get("retry_history", []) for trial in found[:4]] == [[], [0], [0, 1], [0, 1, 2]]


def test_a_search_in_which_every_trial_fails_ends_with_one_sentence(journal, monkeypatch):
    def learning_curve(*_):
        raise OSError("no such simulator")

    monkeypatch.setattr(trials, "learning_curve", learning_curve)
    with pytest.raises(trials.SearchError, match="8 trials in a row failed, the last one with OSError: no such simulator"):
        search(journal)
    assert states(trials_of(journal))[:8] == ["FAIL"] * 8


def test_arguments_that_no_model_takes_end_the_search_and_the_trial_stays(journal):
    with pytest.raises(trials.SearchError, match=r"No model can be created with .*horzion") as raised:
        search(journal, settings=STUDY | {"config": STUDY["config"] | {"horzion": 5}})
    assert "\n" not in str(raised.value)
    assert states(trials_of(journal)) == ["FAIL", "WAITING"]
    assert trials_of(journal)[1].system_attrs["fixed_params"] == trials_of(journal)[0].system_attrs["fixed_params"]


def test_what_no_model_takes_is_found_before_a_study_begins(tmp_path, monkeypatch):
    BreakingElsewhere.faults = [("__init__", OSError("no such map"))]
    with pytest.raises(studies.SettingsError, match=r"'BreakingElsewhere-v0' of \{\} cannot be made: OSError: no such map"):
        trials.check_configuration(ELSEWHERE, "cpu")
    trials.check_configuration(ELSEWHERE, "cpu")
    for changed, named in ({"horzion": 5}, "horzion"), ({"n_models": 3}, "`n_tasks` must be a multiple"):
        with pytest.raises(studies.SettingsError, match=f"No model can be created with .*{named}"):
            trials.check_configuration(STUDY | {"config": STUDY["config"] | changed}, "cpu")
    monkeypatch.setattr(optimize, "check_model", trials.check_configuration)  # in this process
    argv = ["--output", str(tmp_path), "--n-timesteps", "2000", "--set", "{dynamics_kwargs.net_arch: [8]}"]
    with pytest.raises(SystemExit, match=r"No model can be created with .*dynamics_kwargs\.net_arch") as ended:
        optimize.main(argv)
    assert "\n" not in str(ended.value)
    assert optuna.get_all_study_names(studies.sqlite_url(tmp_path / "study.db")) == []


def test_a_model_is_tried_in_a_process_of_its_own():
    with pytest.raises(studies.SettingsError, match=r"No model can be created with .*horzion"):
        optimize.check_model(STUDY | {"env": "Pendulum-v1", "config": STUDY["config"] | {"horzion": 5}}, "cpu")


@pytest.mark.parametrize("mean", [float("nan"), float("-inf")])
def test_an_evaluation_that_is_not_finite_is_no_value(mean, monkeypatch):
    study = studies.open_study(InMemoryStorage(), "study", STUDY)
    monkeypatch.setattr(trials, "evaluate_policy", lambda *_, **__: (mean, 0.0))
    study.optimize(lambda trial: trials.objective(trial, STUDY, "cpu"), n_trials=1, catch=(trials.TrialError,))
    assert study.trials[0].state == TrialState.FAIL
    assert f"the mean return of an evaluation is {mean}" in study.trials[0].user_attrs["error"]


def test_a_trial_that_was_taken_over_does_not_end_the_search(url, monkeypatch):
    def learning_curve(trial, *_):
        if trial.number == 0:  # another machine has taken this one for dead
            trial.study.tell(trial.number, state=TrialState.FAIL)
            trial.report(1.0, 0)
        return [1.0]

    monkeypatch.setattr(trials, "learning_curve", learning_curve)
    assert states(search(url)) == ["FAIL", "COMPLETE"]


def test_a_trial_that_is_interrupted_before_it_draws_keeps_its_settings(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    study = studies.open_study(InMemoryStorage(), "study", STUDY)
    wanted = study.trials[0].system_attrs["fixed_params"]
    monkeypatch.setattr(trials, "suggest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.optimize(lambda trial: trials.objective(trial, STUDY, "cpu"), n_trials=1)
    assert states(study.trials) == ["FAIL", "WAITING"]
    assert suggest(study.ask(), STUDY["names"]) == wanted


# ---------------------------------------------------------------- killed workers

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
    assert study.trials[0].system_attrs["fixed_params"]["gae_lambda"] == 0.95
    assert len(studies.open_study(storage, "study", STUDY).trials) == 1


# ---------------------------------------------------------------- search space, environments and storages


def settings_of(tmp_path, *options):
    return optimize.study_settings(optimize.parse(["--output", str(tmp_path), *options]))


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        ("{n_meta_steps: 5, inner_lr: 0.1}", {"n_meta_steps", "inner_lr"}),
        ("{dynamics_kwargs: {net_arch: [8]}, policy_kwargs: {}}", {"dynamics_kwargs.net_arch"}),
        ("{n_models: 3, n_tasks: 3}", {"n_models-n_tasks"}),
        ("{n_tasks: 5}", {"n_models-n_tasks"}),
    ],
)
def test_what_is_given_is_not_searched(given, gone, tmp_path):
    everything = settings_of(tmp_path)["names"]
    assert set(everything) - set(settings_of(tmp_path, "--set", given)["names"]) == gone


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        ([], (200, 250, 500, 1000)),  # Pendulum's 2000 steps, of which 1000 are random
        (["--n-timesteps", "1600"], (200, 250, 500)),
        (["--n-timesteps", "1220"], None),
        (["--n-timesteps", "1001", "--n-evaluations", "1"], None),
        (["--n-timesteps", "5000", "--set", "{learning_starts: 50}"], (200, 250, 500, 1000, 2000)),
    ],
)
def test_an_iteration_is_not_longer_than_the_training(options, choices, tmp_path):
    space = studies.search_space(settings_of(tmp_path, *options))
    assert (space["n_steps"].choices if "n_steps" in space else None) == choices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search", "inner_lr", "--set", "{inner_lr: 0.1}"], "Nothing is left to search"),
        (["--n-timesteps", "1000"], r"All 1000 real steps would be random \(learning_starts=1000\)"),
        (["--set", "{env_kwargs: {day: 2026-01-01}}"], "Settings must be numbers, strings"),
        (["--env", "no_such_module:Env-v0"], "no_such_module"),
        (["--env", "sb3_mbmpo.envs:Point3D-v0"], "Point3D"),
        (
            ["--storage", "sqlite:////no/such/folder/study.db"],
            r"/no/such/folder/study\.db cannot be used \(.*unable to open database file\).*Its folder has to be there",
        ),
        (
            ["--storage", "/no/such/folder/study.log"],
            r"/no/such/folder/study\.log cannot be used .*Its folder has to be there",
        ),
        (["--storage", "sqlite://"], "^sqlite.* is in the memory of one process, and lost"),
        (["--storage", "sqlite:///:memory:"], "^sqlite.* is in the memory of one process, and lost"),
    ],
)
def test_searches_that_cannot_work_end_with_one_sentence(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as ended:
        optimize.main(["--output", str(tmp_path), *options])
    assert "\n" not in str(ended.value)
    assert list(tmp_path.iterdir()) == []


def test_a_report_on_no_study_ends_with_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="There is no study 'Pendulum-v1' in sqlite"):
        report.main(["--output", str(tmp_path)])


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "\udcff"])
@pytest.mark.parametrize("main", [optimize.main, report.main])
def test_what_cannot_be_a_folder_is_named(name, main, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"cannot be the folder of the report \(.*give another --output") as ended:
        main([f"--output={tmp_path / name}"])
    assert repr(str(tmp_path / name)) in str(ended.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_report_that_lacks_a_driver_ends_with_one_sentence(tmp_path, monkeypatch):
    def open_storage(url):
        raise ImportError("No module named 'redis'.\nTraceback")

    monkeypatch.setattr(report, "open_storage", open_storage)
    with pytest.raises(SystemExit, match=r"^No module named 'redis'.$"):
        report.main(["--output", str(tmp_path), "--storage", "redis://localhost"])


def test_processes_that_were_killed_are_said_to_be(tmp_path, monkeypatch):
    class Killed:
        Process = staticmethod(lambda **_: Killed())
        exitcode = -9

        def start(self):
            pass

        def is_alive(self):
            return False

    monkeypatch.setattr(optimize, "check_model", lambda *_: None)
    monkeypatch.setattr(optimize.mp, "get_context", lambda _: Killed)
    monkeypatch.setattr(optimize.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"were killed \(exit codes \[-9\]\): the same command resumes the study"):
        optimize.main(["--output", str(tmp_path)])


def test_environments_of_modules_are_found(tmp_path, monkeypatch):
    (tmp_path / "package_of_mine.py").write_text("import gymnasium; gymnasium.register('Mine-v0', entry_point='tiny:Drift')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Point2D-v0", "package_of_mine:Mine-v0"):
        assert settings_of(tmp_path, "--env", name, "--n-timesteps", "3000")["env"] == name
    assert "Mine-v0" in gym.registry


@pytest.mark.parametrize("name", ["what?", "a#b", "50%41", "pkg:Env-v0", "{x}", "a b&c=d"])
def test_any_folder_can_hold_the_study(name, tmp_path):
    arguments = optimize.parse(["--output", str(tmp_path / name)])
    storage = studies.open_storage(arguments.storage)
    optuna.create_study(storage=storage, study_name="study")
    storage.remove_session()
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path(name) / "study.db"]


def test_a_changed_search_space_is_refused_with_one_sentence(url, monkeypatch):
    settings = STUDY | {"names": ["n_steps"], "n_timesteps": 520}
    storage = studies.open_storage(url)
    suggest(studies.open_study(storage, "study", settings).ask(), ["n_steps"], studies.search_space(settings))
    assert len(studies.open_study(storage, "study", settings).trials) == 1
    monkeypatch.setitem(studies.part_of_space.__globals__["SPACE"], "n_steps", optuna.distributions.IntDistribution(1, 9))
    with pytest.raises(ValueError, match=r"another search space.*n_steps.*200, 250, 500.*--study-name") as raised:
        studies.open_study(storage, "study", settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "minimize"]])
def test_a_study_of_another_direction_is_refused(directions, url):
    storage = studies.open_storage(url)
    optuna.create_study(storage=storage, study_name="study", directions=directions)
    with pytest.raises(studies.SettingsError, match=rf"'study' is to {' and '.join(directions)}.*give another --study-name"):
        studies.open_study(storage, "study", STUDY)


def test_trials_of_another_program_are_not_taken_for_ours(url, monkeypatch):
    monkeypatch.setattr(studies, "CREATION_TIME", 0)
    storage = studies.open_storage(url)
    theirs = optuna.create_study(storage=storage, study_name="study", direction="maximize")
    theirs.tell(theirs.ask(), 1e6)
    with pytest.raises(studies.SettingsError, match=r"'study' has trials of another program.*give another --study-name"):
        studies.open_study(storage, "study", STUDY)
    assert theirs.user_attrs == {}


def test_other_settings_are_named_to_the_entry():
    storage = InMemoryStorage()
    studies.open_study(storage, "study", STUDY)
    changed = STUDY | {"config": STUDY["config"] | {"horizon": 77}}
    with pytest.raises(ValueError, match=r"\{'config\.horizon': \(4, 77\)\}"):
        studies.open_study(storage, "study", changed)


# ---------------------------------------------------------------- damaged studies


def damaged(content, how):
    """Return the content of a file after an accident."""
    middle = len(content) // 2
    return {
        "cut": content[: content.rfind(b"\n", 0, middle) + 5],
        "overwritten": content[:middle] + b"x" * 600 + content[middle + 600 :],
        "zeroed": bytes(300) + content[300:],
        "junk": b"[1, 2]\n" * 500,
    }[how]


@pytest.fixture
def command(url, tmp_path):
    """Return the command line of a finished search."""
    argv = ["--env", "Pendulum-v1", "--study-name", "study", "--storage", url, "--output", str(tmp_path)]
    more = ["--n-timesteps", "2000", "--n-trials", "1"]
    settings = optimize.study_settings(optimize.parse([*argv, *more]))
    study = studies.open_study(studies.open_storage(url), "study", settings)
    for _ in range(3):
        study.tell(study.ask(studies.search_space(settings)), state=TrialState.PRUNED)
    return argv, more


@pytest.mark.parametrize("how", ["cut", "overwritten", "zeroed", "junk"])
def test_a_damaged_study_is_named_with_what_to_do(how, url, command, tmp_path):
    if how == "cut" and url.endswith(".log"):
        pytest.skip("a truncated journal is still a valid one, see below")
    argv, more = command
    file = tmp_path / ("study.log" if url.endswith(".log") else "study.db")
    file.write_bytes(damaged(file.read_bytes(), how))
    before = file.read_bytes()
    for main, options in ((report.main, argv), (optimize.main, [*argv, *more])):
        with pytest.raises(SystemExit) as end:
            main(options)
        assert str(file) in str(end.value)
        assert "another --storage" in str(end.value) or "give --study-name or --storage" in str(end.value)
        assert "\n" not in str(end.value)
    assert file.read_bytes()[:300] == before[:300]


def test_a_database_whose_index_misses_a_row_is_named(tmp_path):
    url = studies.sqlite_url(tmp_path / "study.db")
    optuna.create_study(storage=studies.open_storage(url), study_name="a_name_of_its_own")
    content = (tmp_path / "study.db").read_bytes()
    before, name, after = content.rpartition(b"a_name_of_its_own")
    (tmp_path / "study.db").write_bytes(before + name.replace(b"its", b"hit") + after)
    with (
        pytest.raises(studies.DamagedStudyError, match=r"study\.db is damaged.*missing from index"),
        studies.damage_named(url),
    ):
        studies.open_storage(url)


def test_a_journal_that_ends_within_a_line_goes_on_without_it(journal):
    study = studies.open_study(studies.open_storage(journal), "study", STUDY)
    study.tell(study.ask(studies.search_space(STUDY)), state=TrialState.PRUNED)
    whole = Path(journal).read_bytes()
    studies.mend_journal(journal)
    assert Path(journal).read_bytes() == whole, "nothing to repair"
    Path(journal).write_bytes(whole + b'{"op_code":4,"work')
    with pytest.warns(UserWarning, match=r"study\.log ended with an incomplete line, now removed"):
        studies.mend_journal(journal)
    assert Path(journal).read_bytes() == whole
    assert not Path(f"{journal}.lock").exists()
    trials_of(journal)
    search(journal, n_trials=1)
