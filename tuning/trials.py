"""A worker of a search: what a trial trains, what it reports, and which trial comes next."""

import argparse
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, SupportsFloat

import gymnasium as gym
import optuna
import torch as th
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbmpo import MBMPO
from sb3_mbmpo.report.episodes import evaluation_seed
from sb3_mbmpo.zoo.search_space import suggest
from tuning.lost_trials import MAX_RETRIES, hand_back, is_here, queue_again, reap, signed
from tuning.studies import (
    FINISHED,
    MISSED_HEARTBEATS,
    OBJECTIVES,
    SearchError,
    SettingsError,
    check_training,
    evaluation_steps,
    open_storage,
    open_study,
    search_space,
    split_entry,
    trial_entry,
)

# One trial may fail because of its hyperparameters (networks too large for memory). If the next one fails with all its
# retries, too, the cause lies elsewhere, and every further trial would fail
MAX_FAILURES = 2 * (1 + MAX_RETRIES)


class TrialError(Exception):
    """An error that ends a trial but not the search."""


class EnvironmentRaisedError(Exception):
    """An error of the environment, which says nothing about the hyperparameters."""


# What an environment may raise: some end the process when their simulator is missing. Ctrl-C is not theirs
RAISED = (Exception, SystemExit)


class ReportingEnv(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper that marks exceptions of the environment, to tell them apart from those of the training."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """
        Reset the environment.

        :raises EnvironmentRaisedError: if the environment raises
        """
        try:
            return super().reset(**kwargs)
        except RAISED as error:
            raise EnvironmentRaisedError(f"reset() raised {described(error)}") from error

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """
        Take a step in the environment.

        :raises EnvironmentRaisedError: if the environment raises
        """
        try:
            return super().step(action)
        except RAISED as error:
            raise EnvironmentRaisedError(f"step() raised {described(error)}") from error


def described(error: BaseException) -> str:
    """Return an exception's class and message as text."""
    return f"{type(error).__name__}: {error}"


class CurveCallback(BaseCallback):
    """
    A callback that evaluates the meta-policy at regular intervals and prunes the trial if it lags behind the others.

    :param trial: trial that the returns are reported to
    :param env: environment to evaluate in
    :param settings: settings of the study
    :param first_step: index of the first evaluation; a trial counts evaluations across its seeds
    """

    def __init__(self, trial: optuna.Trial, env: VecEnv, settings: dict[str, Any], first_step: int) -> None:
        super().__init__()
        self.trial, self.env, self.settings, self.first_step = trial, env, settings, first_step
        self.curve: list[float] = []

    def _on_step(self) -> bool:
        # The last evaluation comes after `learn`, so that it follows the last update
        due = evaluation_steps(self.settings)[:-1]
        assert isinstance(self.model, MBMPO)
        # Several environments may do more random steps than were asked for
        has_learned = self.model._n_fits > 0
        if has_learned and len(self.curve) < len(due) and self.num_timesteps >= due[len(self.curve)]:
            self.evaluate()
        return True

    def evaluate(self) -> None:
        """
        Evaluate the meta-policy and report its mean return to the trial.

        :raises TrialPruned: if other trials were better at this step
        :raises EnvironmentRaisedError: if the environment's rewards are not finite
        """
        mean, _ = evaluate_policy(self.model, self.env, self.settings["n_eval_episodes"], deterministic=True)
        assert isinstance(mean, float)
        if not math.isfinite(mean):
            raise EnvironmentRaisedError(f"the mean return of an evaluation is {mean}")
        self.trial.report(mean, self.first_step + len(self.curve))
        self.curve.append(mean)
        if self.trial.should_prune():
            raise optuna.TrialPruned


@contextmanager
def environments(settings: dict[str, Any], n_envs: int, seed: int) -> Iterator[VecEnv]:
    """Make the study's environments, and close them after the block; an error of ``close`` is only a warning."""
    env_entries, _ = split_entry(settings["config"])
    env = make_vec_env(
        env_entries.get("env_id", settings["env"]),
        n_envs=n_envs,
        seed=seed,
        env_kwargs=env_entries.get("env_kwargs"),
        wrapper_class=ReportingEnv,
    )
    try:
        yield env
    finally:
        try:
            env.close()
        except RAISED as error:
            warnings.warn(f"The environment's close() raised {described(error)}: its trial counts all the same.")


def check_configuration(settings: dict[str, Any], device: str) -> None:
    """
    Make a model of the configuration as it is, to find what cannot work before a study begins.

    :param settings: those of the study
    :param device: of the networks
    :raises SettingsError: if there can be no such environment, or no such model
    """
    env_entries, arguments = split_entry(settings["config"])
    try:
        with environments(settings, env_entries.get("n_envs", 1), seed=0) as env:
            try:
                MBMPO(env=env, device=device, **arguments)
            except (TypeError, ValueError) as error:
                raise SettingsError(f"No model can be created with {arguments}: {error}") from error
    except SettingsError:
        raise
    except RAISED as error:
        raise SettingsError(
            f"The environment {settings['env']!r} of {env_entries} cannot be made: {described(error)}"
        ) from error


def learning_curve(trial: optuna.Trial, settings: dict[str, Any], seed: int, device: str) -> list[float]:
    """
    Train with one seed and return the learning curve.

    :param trial: trial with the hyperparameters
    :param settings: settings of the study
    :param seed: seed of the training; the evaluation has another one, the same in all trials
    :param device: device of the networks
    :return: mean returns at regular intervals of real steps
    :raises SettingsError: if the configuration cannot work
    :raises TrialPruned: if the hyperparameters cannot work
    """
    env_entries, arguments = split_entry(trial_entry(settings, trial.params))
    with (
        environments(settings, env_entries.get("n_envs", 1), seed) as env,
        environments(settings, 1, evaluation_seed(seed)) as evaluation_env,
    ):
        try:
            model = MBMPO(env=env, seed=seed, device=device, **arguments)
        except (TypeError, ValueError) as error:
            check_configuration(settings, device)
            # Too large for this machine's memory, for example: other hyperparameters may work
            trial.set_user_attr("error", str(error))
            raise optuna.TrialPruned from error
        callback = CurveCallback(trial, evaluation_env, settings, seed * settings["n_evaluations"])
        try:
            model.learn(settings["n_timesteps"], callback=callback)
        except ValueError as error:
            if model._n_fits == 0:
                raise EnvironmentRaisedError(f"before anything was learned: {error}") from error
            # The model diverged: these are bad hyperparameters, not a broken search
            trial.set_user_attr("error", str(error))
            raise optuna.TrialPruned from error
        callback.evaluate()
    return callback.curve


def objective(trial: optuna.Trial, settings: dict[str, Any], device: str) -> float:
    """
    Train a trial with all seeds and return the mean of its scores.

    :param trial: trial to compute
    :param settings: settings of the study; its ``objective`` scores each learning curve
    :param device: device of the networks
    :return: mean score over the seeds
    :raises SettingsError: if MBMPO refuses the arguments, or if the training would end before it learns
    :raises TrialError: if the trial fails for any other reason
    """
    space = search_space(settings)
    score = OBJECTIVES[settings["objective"]]
    try:
        check_training(settings)
        suggest(trial, space, space)
        return statistics.fmean(score(learning_curve(trial, settings, seed, device)) for seed in range(settings["n_seeds"]))
    except (KeyboardInterrupt, SettingsError):
        # Optuna marks the trial as failed; queued again, it is the first trial of the next run
        hand_back(trial)
        raise
    except (optuna.TrialPruned, UpdateFinishedTrialError):
        raise
    except RAISED as error:
        trial.set_user_attr("error", described(error))
        raise TrialError(described(error)) from error


def wait_for_a_trial(study: optuna.Study, n_trials: int, has_heartbeat: bool, grace: float = math.inf) -> bool:
    """
    Wait while other workers compute the last trials, in case one of them dies and its trial has to be repeated.

    :param study: study shared by all workers
    :param n_trials: number of trials that the study is to finish
    :param has_heartbeat: whether the storage records heartbeats. If not, only running trials of this machine are known to be
        alive
    :param grace: seconds after which a trial without a sign of life is lost
    :return: whether there is a trial to compute
    """
    while True:
        fail_stale_trials(study)
        reap(study, grace)
        all_trials = study.get_trials(deepcopy=False)
        counts = Counter(trial.state for trial in all_trials)
        n_finished = sum(counts[state] for state in FINISHED)
        if counts[TrialState.WAITING] > 0:
            return True
        if n_finished >= n_trials:
            return False
        running = [trial for trial in all_trials if trial.state == TrialState.RUNNING]
        if n_finished + sum(has_heartbeat or is_here(trial) for trial in running) < n_trials:
            return True
        time.sleep(1)


def work(arguments: argparse.Namespace, settings: dict[str, Any], n_jobs: int) -> None:
    """
    Compute trials until the study has enough.

    :param arguments: command-line arguments
    :param settings: settings of the study
    :param n_jobs: number of workers that share the PyTorch threads of this machine
    :raises SearchError: if no trial can be computed
    """
    th.set_num_threads(max(1, th.get_num_threads() // n_jobs))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(arguments.storage, arguments.heartbeat)
    study = open_study(storage, arguments.study_name, settings)
    # constant_liar: other workers' running trials count as bad ones, so that workers do not all try the same point
    study.sampler = TPESampler(n_startup_trials=10, multivariate=True, constant_liar=True)
    study.pruner = MedianPruner(n_startup_trials=5, n_warmup_steps=settings["n_evaluations"] // 3)
    n_failures = 0

    def compute(trial: optuna.Trial) -> float:
        with signed(trial):
            return objective(trial, settings, arguments.device)

    def retry(study: optuna.Study, trial: FrozenTrial) -> None:
        nonlocal n_failures
        n_failures = n_failures + 1 if trial.state == TrialState.FAIL else 0
        if trial.state == TrialState.FAIL:
            queue_again(study, trial)
        if n_failures >= MAX_FAILURES:
            raise SearchError(f"{n_failures} trials in a row failed, the last one with {trial.user_attrs.get('error')}")

    grace = MISSED_HEARTBEATS * arguments.heartbeat
    while wait_for_a_trial(study, arguments.n_trials, isinstance(storage, RDBStorage), grace):
        try:
            study.optimize(compute, n_trials=1, catch=(TrialError,), callbacks=[retry], gc_after_trial=True)
        except SettingsError:
            raise
        except (UpdateFinishedTrialError, ValueError) as error:
            # This machine slept for so long that another one took over the trial, and Optuna rejects a second value for it
            n_failures += 1
            if n_failures >= MAX_FAILURES:
                raise SearchError(
                    f"{n_failures} trials in a row could not be finished, the last one with {described(error)}"
                ) from error
