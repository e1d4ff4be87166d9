"""Algorithms of SB3 and sb3-contrib train in learned models."""

import pytest
import torch as th
from gymnasium import spaces
from known_models import BOX_ACTIONS, fitted_ensemble, linear_ensemble, starts
from sb3_contrib import TRPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from sb3_mbmpo import ModelVecEnv

ALGORITHMS = {
    PPO: {"n_steps": 16, "batch_size": 32, "n_epochs": 1},
    A2C: {"n_steps": 16},
    TRPO: {"n_steps": 16, "batch_size": 32, "n_critic_updates": 1},
    SAC: {"learning_starts": 16, "batch_size": 16, "buffer_size": 200},
    TD3: {"learning_starts": 16, "batch_size": 16, "buffer_size": 200},
    DQN: {"learning_starts": 16, "batch_size": 16, "buffer_size": 200},
}
PAIRS = [(algorithm, BOX_ACTIONS) for algorithm in (PPO, A2C, SAC, TD3, TRPO)]
PAIRS += [(algorithm, spaces.Discrete(3)) for algorithm in (PPO, A2C, DQN)]


def tiny(algorithm, env):
    # SB3 writes into policy_kwargs: a new dictionary each time
    kwargs = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu", **ALGORITHMS[algorithm]}
    return algorithm("MlpPolicy", env, **kwargs)


@pytest.mark.parametrize(("algorithm", "action_space"), PAIRS, ids=lambda value: getattr(value, "__name__", str(value)[:8]))
def test_algorithms_train_in_it(algorithm, action_space):
    ensemble = fitted_ensemble(action_space=action_space, learned_reward=True, probabilistic=True)

    def train():
        env = VecMonitor(ModelVecEnv(ensemble, starts(), termination_fn=lambda n: n[:, 0] > 2, n_envs=4, horizon=8))
        return tiny(algorithm, env).learn(128)

    model = train()
    assert model.num_timesteps == 128
    lengths = [episode["l"] for episode in model.ep_info_buffer]
    assert len(lengths) >= 128 // 8 - 4
    assert max(lengths) == 8
    # SB3 hands its seed to the environment: all of the training repeats
    for parameter, again in zip(model.policy.parameters(), train().policy.parameters(), strict=True):
        assert th.equal(parameter, again)


def test_wrappers_and_evaluation_work():
    env = VecMonitor(ModelVecEnv(linear_ensemble(), starts(), lambda o, a, n: th.ones(len(n)), n_envs=4, horizon=8))
    model = tiny(PPO, VecNormalize(env)).learn(64)
    returns, lengths = evaluate_policy(model.policy, env, n_eval_episodes=6, return_episode_rewards=True)
    assert returns == [8] * 6
    assert lengths == [8] * 6
