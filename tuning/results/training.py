"""One run: train, evaluate at fixed real steps, write a row for each evaluation, and resume after an interruption."""

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from sb3_mbmpo.report.episodes import evaluation_seed
from tuning.results.checkpoints import find_checkpoint, load_model, load_statistics, save_checkpoint
from tuning.results.files import beside_work, csv_file, steps_left, work_folder
from tuning.results.recipes import Recipe, make_recipe
from tuning.results.records import LIBRARIES, MEASURED, append_row, read_rows
from tuning.results.runs import OURS, Run

CHECKPOINT_SECONDS = 600.0


def clock() -> np.ndarray:
    """Return wall time and processor time in seconds (2,); load from other processes lengthens only the first."""
    return np.array([time.perf_counter(), time.process_time()])


class CurveCallback(BaseCallback):
    """
    A callback that evaluates what an algorithm has learned from given numbers of real steps.

    It evaluates the policy as it is when the first step beyond that number has been taken. For algorithms that train after
    each rollout, this is the policy learned from the rollouts before.

    :param due: real steps at which to evaluate, ascending; training stops after the last one
    :param report: called with the real steps and the seconds of training (2,), see ``clock``
    :param save: called with the seconds of training, between two rollouts, after an evaluation or when a checkpoint is due
    :param seconds: seconds of training so far (2,)
    :param checkpoint_seconds: maximum wall time between two checkpoints; a rollout and its training may exceed it
    """

    def __init__(
        self,
        due: list[int],
        report: Callable[[int, np.ndarray], None],
        save: Callable[[np.ndarray], None],
        seconds: np.ndarray,
        checkpoint_seconds: float,
    ) -> None:
        super().__init__()
        self.due, self.report, self.save = list(due), report, save
        self.checkpoint_seconds = checkpoint_seconds
        self._saved_at = seconds
        self._start = clock() - seconds
        self._save_next = False

    @property
    def seconds(self) -> np.ndarray:
        """Return the seconds of training so far (2,), without evaluations and checkpoints."""
        elapsed: np.ndarray = clock() - self._start
        return elapsed

    def _on_rollout_start(self) -> None:
        seconds = self.seconds
        # The start of a rollout is the only point from which all algorithms can resume
        if self.num_timesteps > 0 and (self._save_next or (seconds - self._saved_at)[0] > self.checkpoint_seconds):
            self.save(seconds)
            self._saved_at, self._save_next = seconds, False
            self._start = clock() - seconds

    def _on_step(self) -> bool:
        self.evaluate_until(self.num_timesteps - 1)
        return bool(self.due)

    def evaluate_until(self, n_steps: int) -> None:
        """Evaluate the policy for all due steps up to ``n_steps``."""
        seconds = self.seconds
        while self.due and self.due[0] <= n_steps:
            self.report(self.due.pop(0), seconds)
            self._save_next = True
        self._start = clock() - seconds


def train(run: Run, output: Path, machine: Mapping[str, str], checkpoint_seconds: float = CHECKPOINT_SECONDS) -> None:
    """
    Train a run to its end, from its checkpoint if there is one.

    The caller must have claimed the run.

    :param run: run of the queue
    :param output: folder of the CSV files
    :param machine: columns that all rows have in common, from ``describe_machine``
    :param checkpoint_seconds: see ``CurveCallback``
    """
    th.set_num_threads(int(machine["threads"]))
    recipe, file, folder = make_recipe(run), csv_file(output, run), work_folder(output, run)
    origin = {"environment": describe_environment(run), "settings": recipe.settings, **machine}
    checkpoint = find_checkpoint(folder)
    if checkpoint is not None and not is_same(checkpoint[1]["origin"], origin, run):
        shutil.rmtree(folder)
        checkpoint = None
    if checkpoint is None and not all(is_same(row, origin, run) for row in read_rows(file)):
        # One curve must not mix rows of two different runs
        aside = beside_work(output, run, f"{time.time_ns()}.csv")
        file.rename(aside)
        print(f"{run.name} starts over: its rows, from other settings or versions, were moved to {aside}", flush=True)
    env = make_env(run, recipe, run.seed, recipe.n_envs)
    with closing(env), closing(make_env(run, recipe, evaluation_seed(run.seed), run.n_eval_episodes)) as evaluation_env:
        model, seconds = begin(run, recipe, env, checkpoint)

        def report(n_steps: int, seconds: np.ndarray) -> None:
            returns = evaluate(model, evaluation_env, run)
            measured = (n_steps, *(f"{each:.1f}" for each in seconds), f"{returns.mean():.6g}", f"{returns.std():.6g}")
            append_row(file, dict(zip(MEASURED, measured, strict=True)) | origin)
            print(f"{run.name}: {n_steps:,} real steps, {seconds[0]:,.0f} s, return {returns.mean():.1f}", flush=True)

        callback = CurveCallback(
            steps_left(output, run),
            report,
            lambda seconds: save_checkpoint(folder, model, {"seconds": seconds.tolist(), "origin": origin}),
            seconds,
            checkpoint_seconds,
        )
        model.learn(run.n_timesteps - model.num_timesteps, callback=callback, reset_num_timesteps=checkpoint is None)
        callback.evaluate_until(run.n_timesteps)
    shutil.rmtree(folder, ignore_errors=True)


def begin(
    run: Run, recipe: Recipe, env: VecEnv, checkpoint: tuple[Path, Mapping[str, Any]] | None
) -> tuple[BaseAlgorithm, np.ndarray]:
    """Return the model, new or from the checkpoint, and the seconds of its training so far (2,)."""
    if checkpoint is None:
        return recipe.algorithm(env=env, seed=run.seed, device="cpu", **recipe.arguments), np.zeros(2)
    path, state = checkpoint
    if isinstance(env, VecNormalize):
        env = load_statistics(path, env.venv)
    model = load_model(path, recipe.algorithm, env)
    # A new seed, so that the first episodes are not repeated
    env.seed(run.seed + 1_000_000 + model.num_timesteps)
    return model, np.array(state["seconds"])


def describe_environment(run: Run) -> str:
    """Return the environment's id and arguments as text."""
    return " ".join([run.env_id, *(f"{key}={value}" for key, value in run.env_kwargs.items())])


def is_same(other: Mapping[str, str], origin: Mapping[str, str], run: Run) -> bool:
    """
    Return whether two origins may share a learning curve.

    They need the same settings and library versions and, for MBMPO, the same commit.

    :param other: origin of rows or of a checkpoint
    :param origin: origin of the run as it would be now
    :param run: run of the queue
    :return: whether they may
    """
    keys = ("environment", "settings", *LIBRARIES, *(("commit",) if run.algo == OURS else ()))
    return all(other[key] == origin[key] for key in keys)


def make_env(run: Run, recipe: Recipe, seed: int, n_envs: int) -> VecEnv:
    """Return a vectorised environment, each copy with its own seed, normalised if the recipe asks for it."""
    env: VecEnv = make_vec_env(run.env_id, n_envs, seed, env_kwargs=dict(run.env_kwargs), wrapper_class=recipe.wrapper)
    return env if recipe.normalize is None else VecNormalize(env, **recipe.normalize)


def evaluate(model: BaseAlgorithm, env: VecEnv, run: Run) -> np.ndarray:
    """
    Evaluate a model without disturbing its training.

    :param model: model in any state of its training
    :param env: evaluation environment with one copy for each episode
    :param run: run, whose seed determines the episodes
    :return: returns of deterministic episodes, in the environment's own units
    """
    training_env = model.get_vec_normalize_env()
    if training_env is not None:
        assert isinstance(env, VecNormalize)
        sync_envs_normalization(training_env, env)
        env.training = env.norm_reward = False
    env.seed(evaluation_seed(run.seed))
    returns, _ = evaluate_policy(model, env, run.n_eval_episodes, deterministic=True, return_episode_rewards=True)
    return np.array(returns)
