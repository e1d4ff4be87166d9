"""Real steps of Gymnasium's environments."""

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv


class Transitions(NamedTuple):
    obs: th.Tensor
    action: th.Tensor
    next_obs: th.Tensor
    reward: th.Tensor
    terminated: th.Tensor

    def to(self, dtype: th.dtype) -> "Transitions":
        return Transitions(*(x.to(dtype) if x.is_floating_point() else x for x in self))


def vec_env(env_id, wrapper=lambda env: env, **kwargs):
    return DummyVecEnv([lambda: wrapper(gym.make(env_id, **kwargs))])


def vigorous_action(env, obs, step, held, rng):
    """Return a vigorous action, to reach terminations and extreme states.

    Classic control: push along the last velocity, which reaches every goal. MuJoCo: bang-bang, held for four steps.
    """
    space = env.action_space
    if isinstance(space, spaces.Discrete):
        return int(space.n - 1 if obs[-1] > 0 else 0)
    if space.shape == (1,) and "mujoco" not in type(env.unwrapped).__module__:
        return space.high if obs[-1] > 0 else space.low
    return held if step % 4 else np.where(rng.random(space.shape) < 0.5, space.low, space.high)


def collect(env, n_steps=400, seed=0):
    """Collect steps of a Gymnasium environment, half of them uniformly random, half vigorous, across resets."""
    rng = np.random.default_rng(seed)
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    rows, action = [], None
    for step in range(n_steps):
        if step == n_steps // 2:
            obs, _ = env.reset()
        if step < n_steps // 2:
            action = env.action_space.sample()
        else:
            action = vigorous_action(env, obs, step, action if step % 4 else None, rng)
        if isinstance(env.action_space, spaces.Box):
            action = np.asarray(action, dtype=np.float32)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, next_obs, reward, terminated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    columns = [th.as_tensor(np.array(column)) for column in zip(*rows, strict=True)]
    return Transitions(*columns[:3], columns[3].double(), columns[4]).to(th.float64)
