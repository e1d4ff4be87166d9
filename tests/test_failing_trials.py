"""Searches in whose trials something fails: an environment, a model, an evaluation."""

import re

import gymnasium as gym
import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from tiny import SETTINGS, Drift
from tiny_study import QUIET, STUDY, Breaking, search, states, trials_of

from sb3_mbmpo.zoo.search_space import suggest
from tuning import lost_trials, optimize, studies, trials

pytestmark = QUIET


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


gym.register("BreakingElsewhere-v0", entry_point=BreakingElsewhere, disable_env_checker=True)
ELSEWHERE = STUDY | {"env": "BreakingElsewhere-v0"}


@pytest.fixture(autouse=True)
def no_faults_of_other_tests():
    yield
    Breaking.errors, BreakingElsewhere.faults = [], []


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
