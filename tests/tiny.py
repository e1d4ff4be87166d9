"""An environment and settings so small that an iteration of MBMPO takes a fraction of a second."""

import copy

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mbmpo import MBMPO

# The tests' tolerances are those of single precision, on CPUs that are fast at bfloat16, too
capabilities = th.cpu.get_capabilities()
th.cpu.get_capabilities = lambda: {**capabilities, "amx_bf16": False}

SETTINGS = dict(
    n_steps=20,
    learning_starts=20,
    n_models=2,
    n_tasks=2,
    n_imagined_rollouts=3,
    horizon=4,
    n_meta_steps=1,
    inner_lr=0.1,
    cg_max_steps=2,
    line_search_max_iter=15,
    target_kl=0.01,
    sub_sampling_factor=1,
    n_critic_updates=2,
    batch_size=16,
    imagined_start="initial",
    policy_kwargs=dict(net_arch=[8]),
    # Members without noise: two epochs teach no variances
    dynamics_kwargs=dict(net_arch=[8], max_epochs=2, probabilistic=False),
    seed=0,
)

# Hyperparameters as small for an entry of a configuration; all others keep their defaults
ENTRY = dict(
    n_steps=20,
    learning_starts=20,
    n_models=2,
    n_tasks=2,
    n_imagined_rollouts=2,
    horizon=5,
    n_meta_steps=1,
    policy_kwargs=dict(net_arch=[8]),
    dynamics_kwargs=dict(net_arch=[8], max_epochs=2),
)

ACTION_SPACES = {
    "box": spaces.Box(-1, 2, (2,), np.float32),
    "discrete": spaces.Discrete(3),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(2),
}


class Drift(gym.Env):
    """
    A point that the action pushes equally in every dimension.

    The reward is highest near 0, and an episode ends when the point leaves [-2, 2].

    :param action_space: any space that MBMPO supports
    :param size: number of dimensions
    :param length: time limit
    :param random_start: whether resets differ
    :param bad: {(step, "obs" | "reward"): value} replaces an observation or a reward by an invalid number
    """

    def __init__(self, action_space=ACTION_SPACES["box"], size=2, length=8, random_start=True, bad=None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = copy.deepcopy(action_space)  # every environment draws its own random numbers
        self.length, self.random_start, self.bad = length, random_start, bad or {}
        self.n_steps = self.n_resets = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_resets += 1
        self.elapsed = 0
        start = self.np_random.uniform(-1, 1, self.observation_space.shape) if self.random_start else 0.5
        self.x = np.full(self.observation_space.shape, start, np.float32)
        self.x[0] = self.bad.get(("reset", "obs"), self.x[0])
        return self.x.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.n_steps += 1
        self.elapsed += 1
        self.x = push(self.x, action)
        reward = -float(np.square(self.x).sum())
        terminated = bool(np.abs(self.x).max() > 2)
        obs = self.x.copy()
        obs[0] = self.bad.get((self.n_steps, "obs"), obs[0])
        reward = self.bad.get((self.n_steps, "reward"), reward)
        return obs, reward, terminated, self.elapsed >= self.length, {}

    @staticmethod
    def reward(obs, action, next_obs):
        return -next_obs.square().sum(1)

    @staticmethod
    def done(next_obs):
        return next_obs.abs().amax(1) > 2


class Unknown(Drift):
    """The same environment without reward and termination functions, which therefore have to be learned."""

    reward = done = None


def push(x, action):
    """Return the next position of the point, float32."""
    return (1.1 * x + 0.1 * (np.mean(np.asarray(action, dtype=float)) - 0.5)).astype(np.float32)


def vec_drift(n_envs=1, env_class=Drift, monitor=True, **kwargs):
    return DummyVecEnv([lambda: Monitor(env_class(**kwargs)) if monitor else env_class(**kwargs) for _ in range(n_envs)])


def tiny_model(env=None, **kwargs):
    return MBMPO("MlpPolicy", Drift() if env is None else env, **{**SETTINGS, **kwargs})


def parameters(model):
    """Return all learned parameters as one flat dictionary of tensors."""
    modules = {"policy": model.policy, "dynamics": model.dynamics}
    return {f"{k}.{key}": value.clone() for k, module in modules.items() for key, value in module.state_dict().items()}


def assert_same(one, other):
    """Assert that two dictionaries of tensors or arrays are equal to the last bit."""
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
