"""Tasks of the packages that most robotics users come with: gymnasium-robotics, and dm_control through Shimmy."""

import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tiny import assert_same, parameters, tiny_model

from sb3_mbmpo import MBMPO


@pytest.fixture(params=["FetchReachDense-v4", "dm_control/cartpole-balance-v0"])
def task(request, monkeypatch, tmp_path):
    """Return the id of an environment with Dict observations, which needs no screen."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes warnings about the models to MUJOCO_LOG.TXT in the current folder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages themselves, at import
        if request.param.startswith("Fetch"):
            gym.register_envs(pytest.importorskip("gymnasium_robotics", reason="needs gymnasium-robotics"))
        else:
            pytest.importorskip("dm_control", reason="needs shimmy[dm-control]")
            gym.register_envs(pytest.importorskip("shimmy", reason="needs shimmy[dm-control]"))
    return request.param


def test_the_message_holds_the_line_that_helps(task):
    env = gym.make(task)
    assert isinstance(env.observation_space, gym.spaces.Dict)
    with pytest.raises(ValueError, match="flat vector") as error:
        tiny_model(env)
    (line,) = re.findall(r"`(env = .*?)`", str(error.value))
    names = {"gymnasium": gym, "env": env}
    exec(line, names)
    model = tiny_model(names["env"]).learn(40)
    assert np.isfinite([value.sum().item() for value in parameters(model).values()]).all()


def test_train_save_load_and_go_on_with_normalised_observations(task, tmp_path):
    env = make_vec_env(task, n_envs=2, seed=0, wrapper_class=gym.wrappers.FlattenObservation)
    model = tiny_model(VecNormalize(env)).learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = MBMPO.load(tmp_path / "model", env=model.env)
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert_same(parameters(loaded), parameters(model))
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 60
    assert env.action_space.contains(loaded.predict(model.env.reset())[0][0])


def distance_to_the_goal(obs, action, next_obs):
    """Return the reward of Fetch's dense tasks: the parts of the observation come in alphabetical order."""
    achieved, desired = next_obs[:, 0:3], next_obs[:, 3:6]
    return -(achieved - desired).norm(dim=1)


@pytest.mark.parametrize("task", ["FetchReachDense-v4"], indirect=True)
def test_the_reward_of_fetch_is_a_function_of_the_flat_observation(task):
    env = gym.wrappers.FlattenObservation(gym.make(task))
    model = tiny_model(env, reward_fn=distance_to_the_goal, termination_fn=None).learn(20)
    assert model.logger.name_to_value["dynamics/reward_error"] < 1e-6
    # It is no small number by accident: the rewards themselves are far larger
    data = model._transitions()
    assert data.reward.abs().mean() > 0.05
    assert th.equal(data.next_obs[:-1, 3:6], data.next_obs[1:, 3:6])  # the goal stays where it is during the episode
