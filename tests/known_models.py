"""Ensembles whose predictions are known or were learned in a moment, and episodes in the environments that they make."""

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mbmpo import DynamicsEnsemble
from sb3_mbmpo.dynamics import Transitions

OBS_DIM, N_MODELS = 3, 3
BOX_ACTIONS = spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))


def box(dtype=np.float32, size=OBS_DIM):
    return spaces.Box(-100, 100, (size,), dtype)


def distance_reward(obs, action, next_obs):
    return -next_obs.square().sum(1) - 0.1 * action.reshape(len(obs), -1).float().square().sum(1)


def linear_ensemble(n_models=N_MODELS, observation_space=None, action_space=BOX_ACTIONS, **kwargs):
    """Make an ensemble whose member ``m`` adds ``m + 1`` to every number of the observation, whatever the action."""
    ensemble = DynamicsEnsemble(observation_space or box(), action_space, n_models, net_arch=(), **kwargs)
    with th.no_grad():
        ensemble.weights[0].zero_()
        ensemble.biases[0].zero_()
        ensemble.biases[0][..., : ensemble.observation_dim] = th.arange(1.0, n_models + 1).view(-1, 1, 1)
    return ensemble


def fit(ensemble, seed=0):
    rng = np.random.default_rng(seed)
    ensemble.action_space.seed(seed)
    action = np.stack([ensemble.action_space.sample() for _ in range(200)])
    obs, next_obs = (th.as_tensor(rng.normal(size=(200, ensemble.observation_dim))) for _ in range(2))
    reward, terminated = th.as_tensor(rng.normal(size=200)), th.as_tensor(rng.random(200) < 0.1)
    action = ensemble.codec.from_numpy(action, ensemble.device)
    generator = th.Generator().manual_seed(seed)
    ensemble.fit(
        Transitions(obs, action, next_obs, reward, terminated), max_epochs=2, max_gradient_steps=50, generator=generator
    )
    return ensemble


def fitted_ensemble(n_models=N_MODELS, action_space=BOX_ACTIONS, **kwargs):
    return fit(DynamicsEnsemble(box(), action_space, n_models, net_arch=(16,), seed=0, **kwargs))


def starts(rows=20, seed=1):
    return np.random.default_rng(seed).normal(size=(rows, OBS_DIM)).astype(np.float32)


def random_actions(env, steps, seed=2):
    env.action_space.seed(seed)
    return np.array([[env.action_space.sample() for _ in range(env.num_envs)] for _ in range(steps)])


def play(env, actions):
    """Return the first observations, and (obs, rewards, dones, infos) of each step."""
    return env.reset(), [env.step(action) for action in actions]


def assert_same_episodes(left, right):
    np.testing.assert_array_equal(left[0], right[0])
    for one, other in zip(left[1], right[1], strict=True):
        for a, b in zip(one[:3], other[:3], strict=True):
            np.testing.assert_array_equal(a, b)
