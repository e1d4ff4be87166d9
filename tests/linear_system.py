"""Ensembles, and transitions of a linear system that they can learn."""

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mbmpo.dynamics import DynamicsEnsemble, Transitions

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = spaces.Box(-1, 1, (2,), np.float32)
# Every part that an ensemble may have
EVERYTHING = {"weight_norm": True, "probabilistic": True, "learned_reward": True, "learned_termination": True}


def seeded(seed=0):
    return th.Generator().manual_seed(seed)


def make(observation_space=OBS, action_space=ACT, **kwargs):
    return DynamicsEnsemble(observation_space, action_space, **{"n_models": 2, "net_arch": (32,), "seed": 0} | kwargs)


def fit(ensemble, data, **kwargs):
    options = {"max_epochs": 3, "batch_size": 50, "generator": seeded()}
    return ensemble.fit(data, **options | kwargs)


# next_obs = obs + DRIFT obs + PUSH action + noise; the reward is linear, too, and an episode ends beyond a threshold
DRIFT = th.tensor([[-0.1, 0.2, 0.0], [0.0, -0.1, 0.1], [-0.2, 0.0, -0.1]])
PUSH = th.tensor([[0.5, 0.0], [0.0, -0.3], [0.2, 0.2]])
NOISE = th.tensor([0.1, 0.02, 0.3])
REWARD_OF_OBS, REWARD_OF_ACTION = th.tensor([1.0, -2.0, 0.0]), th.tensor([0.5, 3.0])


def linear_system(n_rows, seed, offset=0.0, scale=1.0, noisy=False):
    """
    Return transitions of a linear system.

    :param offset: mean of the observations, in units of their spread
    :param scale: spread of the observations
    """
    generator = seeded(seed)
    x = th.randn(n_rows, 3, generator=generator)
    action = th.rand(n_rows, 2, generator=generator) * 2 - 1
    noise = NOISE * th.randn(n_rows, 3, generator=generator) if noisy else 0
    next_x = x + x @ DRIFT.T + action @ PUSH.T + noise
    reward = x @ REWARD_OF_OBS + action @ REWARD_OF_ACTION + 5
    return Transitions(scale * (x + offset), action, scale * (next_x + offset), reward, next_x[:, 0] > 0.5)


def steps(ensemble, data, **kwargs):
    """Return every member's predictions for the same transitions."""
    action = ensemble.codec.to_dynamics(data.action)
    return ensemble.step_fn(**kwargs)(*(x.expand(ensemble.n_models, -1, -1) for x in (data.obs, action)))


TRAIN, HELD_OUT = linear_system(1500, seed=0), linear_system(300, seed=1)
