"""The search of tuning/: what a trial trains and reports, several workers on one study, and one of them killed."""

import inspect
import os
import signal
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage, RDBStorage
from optuna.trial import TrialState, create_trial
from tiny_study import PENDULUM

from sb3_mbmpo import MBMPO, zoo
from sb3_mbmpo.zoo.search_space import DEFAULTS, SPACE, convert, nearest_point, suggest
from tuning import optimize, studies, trials

# tuning ignores it at import, which pytest undoes before each test
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- studies


@pytest.mark.parametrize(
    ("url", "kind"),
    [("sqlite:///{}/study.db", RDBStorage), ("{}/study.log", JournalStorage), ("journal://{}/a.log", JournalStorage)],
)
def test_storage_keeps_what_is_finished(url, kind, tmp_path):
    url = url.format(tmp_path)
    storage = studies.open_storage(url)
    assert isinstance(storage, kind)
    studies.open_study(storage, "study", PENDULUM).add_trial(create_trial(value=1.0))
    assert studies.best_value(studies.open_study(studies.open_storage(url), "study", PENDULUM)) == 1.0


def test_a_study_with_other_settings_is_not_mixed_with_ours(study):
    with pytest.raises(ValueError, match=r"n_seeds.*2, 5.*--study-name"):
        studies.open_study(study._storage, "study", PENDULUM | {"n_seeds": 5})


def test_trial_entry_merges_into_the_configuration():
    entry = studies.trial_entry(PENDULUM, {"inner_lr": 0.5, "dynamics_kwargs.max_gradient_steps": 7})
    assert entry == PENDULUM["config"] | {
        "inner_lr": 0.5,
        "dynamics_kwargs": {"net_arch": [8], "max_epochs": 2, "max_gradient_steps": 7},
    }
    assert PENDULUM["config"]["dynamics_kwargs"] == {"net_arch": [8], "max_epochs": 2}


# ---------------------------------------------------------------- first trial


def test_the_first_trial_is_the_configuration(study):
    assert suggest(study.ask(), PENDULUM["names"]) == {"inner_lr": 3e-3, "dynamics_kwargs.max_gradient_steps": 600}
    again = studies.open_study(study._storage, "study", PENDULUM)
    assert suggest(again.ask(), PENDULUM["names"])["inner_lr"] != 3e-3


def test_defaults_of_the_space_are_those_of_the_algorithm():
    model, expected = MBMPO("MlpPolicy", "Pendulum-v1"), dict(DEFAULTS)
    of_policy, of_dynamics = expected.pop("policy_kwargs"), expected.pop("dynamics_kwargs")
    assert {name: getattr(model, name) for name in expected} == expected
    assert of_policy == {"net_arch": model.policy.net_arch["pi"], "log_std_init": model.policy.log_std_init}
    of_fit = inspect.signature(model.dynamics.fit).parameters
    found = {name: of_fit[name].default if name in of_fit else getattr(model.dynamics, name) for name in of_dynamics}
    assert found == of_dynamics


@pytest.mark.parametrize("entry", ["default", "Pendulum-v1", "CartPole-v1", "InvertedPendulum-v5", "HalfCheetah-v5"])
def test_shipped_settings_are_points_of_the_space(entry):
    shipped = zoo.merge(DEFAULTS, zoo.read_config(entry))
    point = nearest_point(shipped)
    assert set(point) == set(SPACE)
    # Without weight decay, 1e-7 is the nearest choice
    assert zoo.merge(shipped, convert(point)) == zoo.merge(shipped, {"dynamics_kwargs": {"weight_decay": 1e-7}})


@pytest.mark.parametrize(
    ("names", "arguments", "point"),
    [
        ("inner_lr n_meta_steps", {"inner_lr": 0.1, "n_meta_steps": 13}, {"inner_lr": 0.03, "n_meta_steps": 15}),
        ("inner_lr n_meta_steps", {"inner_lr": 1e-6, "n_meta_steps": 99}, {"inner_lr": 1e-3, "n_meta_steps": 40}),
        ("horizon", {"horizon": 77}, {}),  # not a choice of the space
        ("learning_rate", {"learning_rate": "lin_1e-3"}, {}),  # a schedule
        ("policy_kwargs.net_arch", {"policy_kwargs": {"net_arch": {"pi": [64, 64]}}}, {}),
        ("dynamics_kwargs.net_arch", {"dynamics_kwargs": {"net_arch": [512, 512]}}, {"dynamics_kwargs.net_arch": "512-512"}),
        ("n_models-n_tasks", {"n_models": 7, "n_tasks": 14}, {"n_models-n_tasks": "7-14"}),
        ("n_models-n_tasks", {"n_models": 1, "n_tasks": 3}, {}),
        ("policy_kwargs.net_arch", {"policy_kwargs": None}, {"policy_kwargs.net_arch": "64-64"}),
    ],
)
def test_nearest_point(names, arguments, point):
    assert nearest_point(arguments, names.split()) == point


# ---------------------------------------------------------------- one trial


@pytest.mark.parametrize(("name", "score"), [("last", lambda c: c[-1]), ("best", max), ("auc", lambda c: sum(c) / len(c))])
def test_objective_is_the_mean_over_seeds(name, score, study):
    trial = study.ask()
    value = trials.objective(trial, PENDULUM | {"objective": name}, "cpu")
    reported = study.trials[0].intermediate_values
    assert list(reported) == list(range(6))
    curves = [[reported[3 * seed + i] for i in range(3)] for seed in range(2)]
    assert curves[0] != curves[1]
    assert value == pytest.approx(statistics.fmean(map(score, curves)))


def test_curve_is_evaluated_at_equal_distances_and_after_the_last_training(study, monkeypatch):
    seen = []
    original = trials.CurveCallback.evaluate

    def evaluate(self):
        seen.append((self.model.num_timesteps, self.model._n_updates))
        original(self)

    monkeypatch.setattr(trials.CurveCallback, "evaluate", evaluate)
    trials.objective(study.ask(), PENDULUM | {"n_seeds": 1}, "cpu")
    assert seen == [(80, 1), (100, 2), (120, 4)]  # trained after 60, 80, 100 and 120 real steps


def test_no_curve_has_a_point_before_the_first_fit(study, monkeypatch):
    seen = []

    def evaluate(self):
        seen.append((self.model.num_timesteps, self.model._n_fits))
        self.curve.append(0.0)

    monkeypatch.setattr(trials.CurveCallback, "evaluate", evaluate)
    # Of seven environments, 63 steps are random instead of the 60 that were asked for
    settings = PENDULUM | {"config": PENDULUM["config"] | {"n_envs": 7}, "n_seeds": 1, "n_evaluations": 30}
    trials.objective(study.ask(), settings, "cpu")
    assert seen[0] == (70, 1)
    assert len(seen) > 5


def test_hopeless_trial_ends_early(study):
    study.pruner = optuna.pruners.ThresholdPruner(lower=0.0)  # Pendulum's returns are negative
    study.optimize(lambda trial: trials.objective(trial, PENDULUM, "cpu"), n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED
    assert len(study.trials[0].intermediate_values) == 1


def test_diverged_trial_is_pruned_with_its_error(study, monkeypatch):
    def learn(self, *args, **kwargs):
        self._n_fits = 1
        raise ValueError("not finite")

    monkeypatch.setattr(MBMPO, "learn", learn)
    study.optimize(lambda trial: trials.objective(trial, PENDULUM, "cpu"), n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED
    assert study.trials[0].user_attrs == {"error": "not finite"}


def test_interrupted_trial_is_queued_again(study, monkeypatch):
    def learn(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(MBMPO, "learn", learn)
    with pytest.raises(KeyboardInterrupt):
        study.optimize(lambda trial: trials.objective(trial, PENDULUM, "cpu"), n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert trials.wait_for_a_trial(study, 0, has_heartbeat=True)
    assert suggest(study.ask(), PENDULUM["names"]) == study.trials[0].params


def test_training_without_learning_is_refused(study):
    with pytest.raises(ValueError, match=r"All 60 real steps would be random \(learning_starts=60\)"):
        trials.objective(study.ask(), PENDULUM | {"n_timesteps": 60}, "cpu")


# ---------------------------------------------------------------- several processes


def tuning(module, env, output, *options):
    """Return the command line of a tiny search or of its report."""
    tiny = ["--n-seeds", "1", "--n-timesteps", "300", "--n-evaluations", "2", "--n-eval-episodes", "1"]
    tiny += ["--search", "inner_lr", "gae_lambda", "--set", yaml.safe_dump(PENDULUM["config"], default_flow_style=True)]
    where = ["--env", env, "--output", str(output)]
    return [sys.executable, "-m", f"tuning.{module}", *where, *(tiny if module == "optimize" else []), *options]


def run(command):
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def states(url, name="Pendulum-v1"):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    all_trials = optuna.load_study(storage=studies.open_storage(url), study_name=name).trials
    return [trial.state.name for trial in all_trials], all_trials


def test_search_resumes_and_reports(tmp_path):
    url = f"sqlite:///{tmp_path / 'study.db'}"
    output = run(tuning("optimize", "Pendulum-v1", tmp_path, "--n-trials", "2", "--n-jobs", "2"))
    assert "2/2" in output
    assert "best -" in output
    first = [trial.value for trial in states(url)[1]]
    run(tuning("optimize", "Pendulum-v1", tmp_path, "--n-trials", "3"))
    assert states(url)[0] == ["COMPLETE"] * 3
    assert [trial.value for trial in states(url)[1]][:2] == first

    page = (tmp_path / "report.html").read_text()
    assert "<td>complete</td><td>3</td>" in page
    figures = ["history", "parallel_coordinate", "curves"]  # three trials tell nothing of importances
    assert page.count("Plotly.newPlot(") == len(figures)
    for name in figures:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>Hyperparameter search: Pendulum-v1</h1>" in page
    assert "<title>Hyperparameter search: Pendulum-v1</title>" in page
    assert "<meta name='viewport' content='width=device-width, initial-scale=1'>" in page
    entry = yaml.safe_load((tmp_path / "best.yml").read_text())["Pendulum-v1"]
    best = max(states(url)[1], key=lambda trial: trial.value)
    assert entry == studies.trial_entry({"config": entry}, best.params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--n-trials 0", "must be an integer of at least 1, not '0'"),
        ("--set horizon", "must be a dictionary"),
        ("--set {horizon", "must be YAML"),
        ("--search lr", "invalid choice: 'lr'"),
        ("--env Pendulum-v1000", "Environment version `v1000`"),
        ("--set {learning_starts:abc}", "`learning_starts` must be an integer of at least 1, not 'abc'"),
        ("--set {learning_starts:null}", "`learning_starts` must be an integer of at least 1, not None"),
        ("--set {n_timesteps:abc}", "`n_timesteps` must be an integer of at least 1, not 'abc'"),
        ("--set {n_envs:0.5}", "`n_envs` must be an integer of at least 1, not 0.5"),
        ("--set {env_id:3}", "`env_id` must be the id of an environment, not 3"),
        ("--set {policy_kwargs:3}", "`policy_kwargs` must be a dictionary, not 3"),
        ("--set {dynamics_kwargs:[net_arch]}", "`dynamics_kwargs` must be a dictionary, not ['net_arch']"),
        ("--set {env_kwargs:x}", "`env_kwargs` must be a dictionary, not 'x'"),
        ("--n-timesteps 1007", "8 evaluations of the 7 real steps after the random ones"),
    ],
)
def test_arguments_that_cannot_work(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        optimize.main(["--output", str(tmp_path), *options.replace(":", ": ").split(maxsplit=1)])
    assert message in f"{ended.value} {capsys.readouterr().err}"
    assert list(tmp_path.iterdir()) == []  # no study was created


def shared_database(kind, tmp_path):
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'shared.db'}"
    url = os.environ.get("MBMPO_TEST_POSTGRESQL")
    if url is None:
        assert "CI" not in os.environ, "CI must start PostgreSQL"
        pytest.skip("MBMPO_TEST_POSTGRESQL is not set: `bash .ci/run` installs a server and starts it")
    return url


def wait_until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", [pytest.param("sqlite", marks=pytest.mark.slow), "postgresql"])
def test_killed_worker_loses_no_trial(kind, tmp_path):
    """Two machines, as far as the database can tell, share a study, and one dies in the middle of a trial."""
    url, name, n_trials = shared_database(kind, tmp_path), uuid.uuid4().hex, 4
    options = ["--storage", url, "--study-name", name, "--n-trials", str(n_trials), "--heartbeat", "2"]
    commands = [tuning("optimize", "Pendulum-v1", tmp_path / machine, *options) for machine in "ab"]
    storage = studies.open_storage(url)
    # The study exists already, so that both start at once
    shared = studies.open_study(storage, name, optimize.study_settings(optimize.parse(commands[0][3:])))

    def both_train():
        running = shared.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [len(trial.params) for trial in running] == [2, 2]

    # A session for each, so that all of its processes can be ended
    machines = [subprocess.Popen(command, cwd=ROOT, start_new_session=True) for command in commands]
    try:
        wait_until(both_train)
        machines[0].kill()  # its worker ends with it
        assert machines[1].wait(timeout=300) == 0
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)

    names, all_trials = states(url, name)
    print({state: names.count(state) for state in sorted(set(names))})
    assert sorted(names) == ["COMPLETE"] * n_trials + ["FAIL"]
    failed = all_trials[names.index("FAIL")]
    retries = [trial for trial in all_trials if trial.system_attrs.get("retry_history") == [failed.number]]
    assert [trial.params for trial in retries] == [failed.params]
