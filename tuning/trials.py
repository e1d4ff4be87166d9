"""One process of a search: what a trial trains, what it reports, and which trial comes next."""

import argparse
import statistics
import time
from collections import Counter
from contextlib import closing
from functools import partial
from typing import Any

import optuna
import torch as th
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import TrialState
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_mbmpo import MBMPO
from sb3_mbmpo.search_space import suggest
from tuning.studies import FINISHED, OBJECTIVES, open_storage, open_study, split_entry, trial_entry


class CurveCallback(BaseCallback):
    """
    Evaluates the meta-policy at equal distances of real steps, and ends a trial that is worse than the others were there.

    :param trial: receives the returns
    :param env: environment to evaluate in
    :param settings: those of the study
    :param first_step: number of the first evaluation, as the trial counts them over all seeds
    """

    def __init__(self, trial: optuna.Trial, env: VecEnv, settings: dict[str, Any], first_step: int) -> None:
        super().__init__()
        self.trial, self.env, self.settings, self.first_step = trial, env, settings, first_step
        self.curve: list[float] = []

    def _on_step(self) -> bool:
        n_evaluations = self.settings["n_evaluations"]
        due = self.settings["n_timesteps"] * (len(self.curve) + 1) / n_evaluations
        # The last evaluation follows the last training, after `learn`
        if len(self.curve) < n_evaluations - 1 and self.num_timesteps >= due:
            self.evaluate()
        return True

    def evaluate(self) -> None:
        """:raises TrialPruned: if other trials were better at this step"""
        mean, _ = evaluate_policy(self.model, self.env, self.settings["n_eval_episodes"], deterministic=True)
        assert isinstance(mean, float)
        self.trial.report(mean, self.first_step + len(self.curve))
        self.curve.append(mean)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def learning_curve(trial: optuna.Trial, settings: dict[str, Any], seed: int, device: str) -> list[float]:
    """
    Train with one seed.

    :param trial: has the hyperparameters
    :param settings: those of the study
    :param seed: of the training; the evaluation has another, the same in all trials
    :param device: of the networks
    :return: mean returns at equal distances of real steps
    :raises ValueError: if the arguments cannot work, or end the training before it learns
    """
    task, arguments = split_entry(trial_entry(settings, trial.params))
    make = partial(make_vec_env, task.get("env_id", settings["env"]), env_kwargs=task.get("env_kwargs"))
    with (
        closing(make(n_envs=task.get("n_envs", 1), seed=seed)) as env,
        closing(make(n_envs=1, seed=seed + 10_000)) as evaluation_env,
    ):
        model = MBMPO(env=env, seed=seed, device=device, **arguments)
        if settings["n_timesteps"] <= model.learning_starts:
            raise ValueError(
                f"All {settings['n_timesteps']} real steps would be random (learning_starts={model.learning_starts}), nothing "
                "would be learned: ask for more --n-timesteps, or for less with --set '{learning_starts: ...}'."
            )
        callback = CurveCallback(trial, evaluation_env, settings, seed * settings["n_evaluations"])
        try:
            model.learn(settings["n_timesteps"], callback=callback)
        except ValueError as error:
            # Of a model that diverged: bad hyperparameters, not a broken search
            trial.set_user_attr("error", str(error))
            raise optuna.TrialPruned from error
        callback.evaluate()
    return callback.curve


def objective(trial: optuna.Trial, settings: dict[str, Any], device: str) -> float:
    """:return: the mean over the seeds of what the chosen objective says about their learning curves"""
    suggest(trial, settings["names"])
    score = OBJECTIVES[settings["objective"]]
    try:
        return statistics.fmean(score(learning_curve(trial, settings, seed, device)) for seed in range(settings["n_seeds"]))
    except KeyboardInterrupt:
        # Optuna marks the trial as failed; the next run begins with the same one
        trial.study.enqueue_trial(trial.params)
        raise


def wait_for_a_trial(study: optuna.Study, n_trials: int, has_heartbeat: bool) -> bool:
    """
    Wait while other processes compute the last trials: should one of them die, its trial is to be done again.

    :param study: shared by all processes
    :param n_trials: trials it is to finish
    :param has_heartbeat: whether its storage tells which running trials are alive
    :return: whether there is a trial to do
    """
    while True:
        fail_stale_trials(study)
        counts = Counter(trial.state for trial in study.get_trials(deepcopy=False))
        n_finished = sum(counts[state] for state in FINISHED)
        if counts[TrialState.WAITING] > 0:
            return True
        if n_finished >= n_trials:
            return False
        if n_finished + counts[TrialState.RUNNING] < n_trials or not has_heartbeat:
            return True
        time.sleep(1)


def work(arguments: argparse.Namespace, settings: dict[str, Any], n_jobs: int) -> None:
    """
    Compute trials until the study has enough.

    :param arguments: the command line's
    :param settings: those of the study
    :param n_jobs: processes of this machine that share its PyTorch threads
    """
    th.set_num_threads(max(1, th.get_num_threads() // n_jobs))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(arguments.storage, arguments.heartbeat)
    study = open_study(storage, arguments.study_name, settings)
    # The others' running trials count as bad ones, so that processes do not all try the same point
    study.sampler = TPESampler(n_startup_trials=10, multivariate=True, constant_liar=True)
    study.pruner = MedianPruner(n_startup_trials=5, n_warmup_steps=settings["n_evaluations"] // 3)
    while wait_for_a_trial(study, arguments.n_trials, isinstance(storage, RDBStorage)):
        try:
            study.optimize(partial(objective, settings=settings, device=arguments.device), n_trials=1, gc_after_trial=True)
        except UpdateFinishedTrialError:
            # This machine was asleep for so long that another one has taken the trial over
            continue
