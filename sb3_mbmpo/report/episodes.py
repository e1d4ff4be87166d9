"""Fresh real episodes, with which a trained model is compared.

Legend of shapes: ``B`` rows, ``L`` steps of an episode, ``O`` observation size.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th

from sb3_mbmpo.common.finite import as_floating
from sb3_mbmpo.mbmpo import MBMPO

# Raw observations (B, O) -> actions as an environment takes them (B, ...)
Act = Callable[[np.ndarray], np.ndarray]


class Episode(NamedTuple):
    """
    One real episode.

    :param obs: raw, first to last (L + 1, O)
    :param actions: as the environment received them (L, ...)
    :param rewards: (L,)
    """

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray


def to_policy_input(model: MBMPO, obs: np.ndarray) -> th.Tensor:
    """Convert raw observations (B, O) to the input of the policy's networks (B, O)."""
    return model.policy.standardize(model._to_policy_units(th.as_tensor(as_floating(obs), device=model.device)))


def meta_actor(model: MBMPO) -> Act:
    """Return a function that takes the meta-policy's most likely action."""

    def act(obs: np.ndarray) -> np.ndarray:
        # What an evaluation computes, to the last bit, so that the same episodes have the same returns
        given = model._to_policy_units(th.as_tensor(as_floating(obs), device=model.device)).cpu().numpy()
        actions, _ = model.predict(given, deterministic=True)
        return actions

    return act


def evaluation_seed(seed: int) -> int:
    """
    Return the seed of a run's evaluation episodes, on the command line and in the report: other episodes than in training.

    :param seed: seed of the run
    """
    return seed + 10_000


class RandomPolicy:
    """
    A policy of uniformly random actions, as a reference for learned returns.

    :param action_space: the action space of the environment; it is copied, because the model draws its first actions from it
    :param seed: seed of the actions
    """

    def __init__(self, action_space: gym.Space[Any], seed: int) -> None:
        self._action_space = copy.deepcopy(action_space)
        self._action_space.seed(seed)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Return an action for each row."""
        return np.stack([self._action_space.sample() for _ in obs])

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
        """Return an action for each environment, as SB3's ``evaluate_policy`` asks for it."""
        return self(observation), None


def play_episodes(env: gym.Env[Any, Any], act: Act, n_episodes: int, seed: int) -> list[Episode]:
    """
    Play complete episodes, those of SB3's ``evaluate_policy`` with the same seed.

    :param env: the environment, which is reset
    :param act: the policy
    :param n_episodes: number of episodes
    :param seed: seed of the first reset; the same seed gives the same first observations
    :return: the episodes
    """
    return [play_episode(env, act, seed if i == 0 else None) for i in range(n_episodes)]


def play_episode(env: gym.Env[Any, Any], act: Act, seed: int | None, on_step: Callable[[], None] = lambda: None) -> Episode:
    """
    Play one complete episode.

    :param env: the environment, which is reset
    :param act: the policy
    :param seed: seed of the reset; None: the environment's random numbers go on
    :param on_step: called after the reset and after each step
    :return: the episode
    """
    first, _ = env.reset(seed=seed)
    on_step()
    # Copies: an environment may write all its observations into one array
    observations, actions, rewards = [np.array(first)], [], []
    done = False
    while not done:
        action = act(observations[-1][None])[0]
        obs, reward, terminated, truncated, _ = env.step(action)
        on_step()
        observations.append(np.array(obs))
        actions.append(action)
        rewards.append(float(reward))
        done = terminated or truncated
    return Episode(np.array(observations), np.array(actions), np.array(rewards))
