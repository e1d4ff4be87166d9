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

# Training and evaluation use small seeds, so that the report's episodes differ from theirs
FIRST_SEED = 30_000
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
    actor = model.policy.actor(model.policy.actor_vector().unsqueeze(0))

    @th.no_grad()
    def act(obs: np.ndarray) -> np.ndarray:
        mode = actor(to_policy_input(model, obs).unsqueeze(0)).mode().squeeze(0)
        return model._codec.to_numpy(model._codec.to_env(mode))

    return act


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
    Play complete episodes.

    :param env: the environment, which is reset
    :param act: the policy
    :param n_episodes: number of episodes
    :param seed: the same seed gives the same first observations
    :return: the episodes
    """
    return [play_episode(env, act, FIRST_SEED + seed * n_episodes + i) for i in range(n_episodes)]


def play_episode(env: gym.Env[Any, Any], act: Act, seed: int, on_step: Callable[[], None] = lambda: None) -> Episode:
    """
    Play one complete episode.

    :param env: the environment, which is reset
    :param act: the policy
    :param seed: seed of the reset
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
