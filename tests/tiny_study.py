"""Studies whose trials take a fraction of a second."""

import argparse

import gymnasium as gym
import optuna
import pytest
from tiny import ENTRY, SETTINGS, Drift

from tuning import studies, trials

# Marks for a module about studies, without Optuna's messages
QUIET = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize"),
    pytest.mark.usefixtures("quiet_optuna"),
]
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
# The same size with two seeds and a curve, in an environment of Gymnasium
PENDULUM = STUDY | dict(
    env="Pendulum-v1",
    config=ENTRY | dict(policy="MlpPolicy", n_timesteps=120, learning_starts=60, env_kwargs=dict(max_episode_steps=20)),
    n_timesteps=120,
    names=["inner_lr", "dynamics_kwargs.max_gradient_steps"],
    n_seeds=2,
    n_evaluations=3,
)


class Breaking(Drift):
    """An environment that raises the next of ``errors`` at its 30th step, which is after the first fit."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - as Gymnasium has it
    errors: list = []  # noqa: RUF012 - set by the tests

    def step(self, action):
        if self.n_steps == 30 and self.errors:
            raise self.errors.pop(0)
        return super().step(action)


gym.register("Breaking-v0", entry_point=Breaking)


def search(url, n_trials=1, settings=STUDY):
    """Run one worker of a search and return the trials that it leaves behind."""
    arguments = argparse.Namespace(storage=url, heartbeat=30, study_name="study", n_trials=n_trials, device="cpu")
    trials.work(arguments, settings, 1)
    return trials_of(url)


def trials_of(url):
    return optuna.load_study(storage=studies.open_storage(url), study_name="study").trials


def states(all_trials):
    return [trial.state.name for trial in all_trials]
