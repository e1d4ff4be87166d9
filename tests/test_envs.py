"""The environment that ships with the package."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env

from sb3_mbmpo.envs import Point2D
from sb3_mbmpo.rewards.resolve import CheckedEnvFunctions

ID = "sb3_mbmpo.envs:Point2D-v0"


def test_gymnasium_finds_nothing_wrong():
    with warnings.catch_warnings():
        # A "render_mode" of None is not an error; Gymnasium's advice on the range of actions can be ignored
        warnings.simplefilter("ignore", UserWarning)
        check_env(gym.make(ID).unwrapped, skip_render_check=True)


def test_moves_by_the_action_until_a_wall():
    env = gym.make(ID)
    env.reset(seed=0)
    env.unwrapped.position = np.array([1.95, 0], np.float32)
    obs, reward, terminated, truncated, _ = env.step(np.array([0.1, -0.1], np.float32))
    np.testing.assert_allclose(obs, [2, -0.1], atol=1e-6)
    assert reward == pytest.approx(-np.hypot(2, 0.1))
    assert not terminated
    assert not truncated


def test_lasts_50_steps():
    env = gym.make(ID)
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[3] for _ in range(50)]
    assert ends == [False] * 49 + [True]


def test_mbmpo_finds_its_reward_and_that_it_has_no_end():
    env = make_vec_env(ID, seed=0)
    task = CheckedEnvFunctions("auto", "auto", env)
    assert (task.reward.source, task.termination.source) == ("env.reward", "env.done")
    obs = env.reset()
    for _ in range(10):
        action = np.array([env.action_space.sample()])
        next_obs, reward, _, _ = env.step(action)
        batch = [th.as_tensor(x) for x in (obs, action, next_obs)]
        np.testing.assert_allclose(task.reward.fn(*batch), reward, rtol=1e-6)
        assert not task.termination.fn(batch[2]).any()
        obs = next_obs


def test_draws_the_point_where_it_is():
    env = Point2D(render_mode="rgb_array")
    env.reset(seed=0)
    env.position = np.array([1, 2], np.float32)
    rows, columns = np.nonzero((env.render() == 0).all(-1))
    assert np.abs(rows.mean() - 5) < 1
    assert np.abs(columns.mean() - 147) < 1
