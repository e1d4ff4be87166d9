"""The imagined environment as a VecEnv of SB3's: its contract, seeds, attributes and errors."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.wrappers import TimeLimit
from known_models import (
    BOX_ACTIONS,
    N_MODELS,
    OBS_DIM,
    assert_same_episodes,
    box,
    distance_reward,
    fitted_ensemble,
    linear_ensemble,
    play,
    random_actions,
    starts,
)
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mbmpo import ModelVecEnv

# ---------------------------------------------------------------- SB3's contract


class CountingEnv(gym.Env):
    """The first member of ``linear_ensemble`` as a real environment, whose reward is the action."""

    def __init__(self, dtype, end):
        self.observation_space, self.action_space, self.end = box(dtype), BOX_ACTIONS, end

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = np.ones(OBS_DIM, self.observation_space.dtype)
        return self.obs.copy(), {}

    def step(self, action):
        self.obs += 1
        return self.obs.copy(), float(action[0]), bool(self.obs[0] >= self.end), False, {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("horizon", "end"), [(4, np.inf), (100, 5), (4, 5), (3, 5), (1, np.inf)])
def test_behaves_as_dummy_vec_env(horizon, end, dtype):
    real = DummyVecEnv([lambda: TimeLimit(CountingEnv(dtype, end), horizon)] * 2)
    env = ModelVecEnv(
        linear_ensemble(1, box(dtype)),
        np.ones((1, OBS_DIM)),
        lambda obs, action, next_obs: action[:, 0],
        lambda next_obs: next_obs[:, 0] >= end,
        n_envs=2,
        horizon=horizon,
    )
    assert env.observation_space == real.observation_space
    assert env.action_space == real.action_space
    first, first_real = env.reset(), real.reset()
    np.testing.assert_array_equal(first, first_real)
    assert first.dtype == first_real.dtype
    for action in random_actions(env, 12):
        *arrays, infos = env.step(action)
        *real_arrays, real_infos = real.step(action)
        for array, real_array in zip(arrays, real_arrays, strict=True):
            np.testing.assert_array_equal(array, real_array)
            assert array.dtype == real_array.dtype
        for info, real_info in zip(infos, real_infos, strict=True):
            assert info["TimeLimit.truncated"] is real_info["TimeLimit.truncated"]
            assert ("terminal_observation" in info) == ("terminal_observation" in real_info)
            if "terminal_observation" in info:
                np.testing.assert_array_equal(info["terminal_observation"], real_info["terminal_observation"])
                assert info["terminal_observation"].dtype == real_info["terminal_observation"].dtype


def test_episodes_end_one_by_one():
    begins = np.array([[0.0], [1], [2], [3]])
    env = ModelVecEnv(
        linear_ensemble(1, box(size=1)), begins, lambda o, a, n: n[:, 0], lambda n: n[:, 0] >= 5, n_envs=8, horizon=4, seed=0
    )
    expected, age = env.reset(), np.zeros(8)
    assert len(np.unique(expected)) > 1, "otherwise all would end together"
    for action in random_actions(env, 30):
        obs, rewards, dones, infos = env.step(action)
        expected, age = expected + 1, age + 1
        np.testing.assert_array_equal(rewards, expected[:, 0])  # of the last state, although another episode begins
        np.testing.assert_array_equal(dones, (expected[:, 0] >= 5) | (age == 4))
        for i in np.flatnonzero(dones):
            np.testing.assert_array_equal(infos[i]["terminal_observation"], expected[i])
            assert infos[i]["TimeLimit.truncated"] == (expected[i, 0] < 5)
            assert obs[i] in begins
            expected[i], age[i] = obs[i], 0
        np.testing.assert_array_equal(obs, expected)


def test_what_it_returned_stays_as_it_was():
    env = ModelVecEnv(linear_ensemble(1), starts(), distance_reward, n_envs=2)
    obs = env.reset()
    kept = obs.copy()
    next_obs, rewards, *_ = env.step(random_actions(env, 1)[0])
    np.testing.assert_array_equal(obs, kept)
    next_obs += 1000
    rewards += 1000
    obs, rewards, *_ = env.step(random_actions(env, 1)[0])
    np.testing.assert_allclose(obs, kept + 2, rtol=1e-6)
    assert (rewards < 1000).all()


def test_start_obs_stay_the_callers():
    start_obs = np.zeros((1, OBS_DIM), dtype=np.float32)
    env = ModelVecEnv(linear_ensemble(1), start_obs, distance_reward, n_envs=2, horizon=1)
    start_obs += 1
    first, steps = play(env, random_actions(env, 3))
    assert (start_obs == 1).all()
    assert all((obs == 0).all() for obs in (first, *(obs for obs, *_ in steps)))


def test_box_actions_are_clipped_to_their_bounds():
    env = ModelVecEnv(linear_ensemble(), starts(), lambda obs, action, next_obs: action.sum(1), n_envs=2)
    env.reset()
    _, rewards, *_ = env.step(np.array([[9.0, 9], [-9, -9]]))
    np.testing.assert_array_equal(rewards, [2 + 1, -2 + 0])


@pytest.mark.parametrize(
    ("action_space", "shape"),
    [(spaces.Discrete(3), (4,)), (spaces.MultiDiscrete([3, 2]), (4, 2)), (spaces.MultiBinary(2), (4, 2))],
)
def test_reward_function_gets_choices(action_space, shape):
    def reward_fn(obs, action, next_obs):
        assert action.shape == shape
        assert action.dtype == th.long
        return action.reshape(4, -1).sum(1).float()

    env = ModelVecEnv(linear_ensemble(action_space=action_space), starts(), reward_fn, n_envs=4)
    env.reset()
    action = random_actions(env, 1)[0]
    _, rewards, *_ = env.step(action)
    np.testing.assert_array_equal(rewards, action.reshape(4, -1).sum(1))


def test_learned_reward_and_termination():
    ensemble = linear_ensemble(2, learned_reward=True, learned_termination=True)
    with th.no_grad():
        ensemble.weights[0][:, 0, -2] = 10  # reward: ten times the first number of obs
        ensemble.weights[0][:, 0, -1], ensemble.biases[0][..., -1] = 1, -1.5  # logit: that number - 1.5
    env = ModelVecEnv(ensemble, np.zeros((1, OBS_DIM)), n_envs=2, model_index=0)
    env.reset()
    results = [env.step(action) for action in random_actions(env, 3)]
    np.testing.assert_array_equal([rewards[0] for _, rewards, *_ in results], [0, 10, 20])
    np.testing.assert_array_equal([dones[0] for *_, dones, _ in results], [False, False, True])
    # Functions take precedence over learned heads
    never = ModelVecEnv(ensemble, starts(), distance_reward, lambda n: th.zeros(len(n), dtype=th.bool), n_envs=2, horizon=50)
    never.reset()
    for action in random_actions(never, 10):
        obs, rewards, dones, _ = never.step(action)
        assert not dones.any()
        np.testing.assert_allclose(rewards, -(obs**2).sum(1) - 0.1 * (action**2).sum(1), rtol=1e-5)


def test_integer_observations_are_rounded_within_bounds():
    space = spaces.Box(0, 255, (1,), np.uint8)
    ensemble = linear_ensemble(1, space)
    with th.no_grad():
        ensemble.biases[0].fill_(-0.4)
    env = ModelVecEnv(ensemble, np.array([[1]]), lambda o, a, n: n[:, 0], n_envs=1, clip_margin=None)
    first, steps = play(env, random_actions(env, 5))
    assert [int(first[0, 0]), *(int(obs[0, 0]) for obs, *_ in steps)] == [1, 1, 0, 0, 0, 0]
    assert first.dtype == steps[0][0].dtype == np.uint8


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("probabilistic", [False, True])
def test_same_seed_same_numbers(probabilistic):
    ensemble = fitted_ensemble(probabilistic=probabilistic)

    def rollouts(seed, later_seed=None):
        env = ModelVecEnv(ensemble, starts(), distance_reward, n_envs=6, horizon=5, seed=seed)
        if later_seed is not None:
            env.seed(later_seed)
        return play(env, random_actions(env, 12))

    assert_same_episodes(rollouts(3), rollouts(3))
    assert_same_episodes(rollouts(4, 3), rollouts(None, 3))
    for other in (rollouts(4), rollouts(None), rollouts(3, 4)):
        assert not np.array_equal(rollouts(3)[0], other[0])


def test_noise_is_sampled():
    ensemble = fitted_ensemble(probabilistic=True)
    env = ModelVecEnv(ensemble, starts(1), distance_reward, n_envs=6, model_index=0, seed=0)
    obs, steps = play(env, np.zeros((1, 6, 2), dtype=np.float32))
    assert len(np.unique(obs, axis=0)) == 1
    assert len(np.unique(steps[0][0], axis=0)) == 6


def test_a_seed_is_for_one_reset_and_leaves_global_generators_alone():
    env = ModelVecEnv(linear_ensemble(), starts(), distance_reward, n_envs=6, seed=0)
    assert env.seed(7) == [7, 8, 9, 10, 11, 12]
    first, second = env.reset(), env.reset()
    assert not np.array_equal(first, second)
    env.seed(7)
    np.random.seed(1)  # noqa: NPY002 - the global state is what must not matter
    th.manual_seed(1)
    np.testing.assert_array_equal(env.reset(), first)
    np.testing.assert_array_equal(env.reset(), second)


# ---------------------------------------------------------------- attributes


def test_attributes_are_shared():
    env = ModelVecEnv(linear_ensemble(), starts(), distance_reward, n_envs=3, horizon=9)
    assert env.render_mode is None
    assert env.get_attr("render_mode") == [None] * 3
    assert env.get_attr("horizon") == [9, 9, 9]
    assert env.get_attr("horizon", indices=1) == [9]
    assert env.get_attr("horizon", indices=[0, 2]) == [9, 9]
    assert env.has_attr("horizon")
    assert not env.has_attr("spec")
    env.set_attr("horizon", 1)
    assert env.get_attr("horizon") == [1, 1, 1]
    env.reset()
    assert env.step(random_actions(env, 1)[0])[2].all()
    with pytest.raises(ValueError, match="share their attributes"):
        env.set_attr("horizon", 2, indices=[0, 1])
    with pytest.raises(AttributeError):
        env.get_attr("nothing")
    assert env.env_method("has_attr", "horizon", indices=[0, 1]) == [True, True]
    with pytest.raises(AttributeError):
        env.env_method("nothing")
    assert env.env_is_wrapped(Monitor) == [False] * 3
    assert env.env_is_wrapped(Monitor, indices=0) == [False]
    assert env.unwrapped is env
    env.close()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_envs": 0}, "`n_envs` must be an integer of at least 1, not 0"),
        ({"n_envs": 1.5}, "`n_envs`"),
        ({"horizon": 0}, "`horizon` must be an integer of at least 1, not 0"),
        ({"model_index": -1}, "`model_index`"),
        ({"model_index": N_MODELS}, f"`model_index` must be an integer of at least 0 and at most {N_MODELS - 1}"),
        ({"clip_margin": -0.1}, "`clip_margin`"),
        ({"resample_model": "rollout"}, "`resample_model` must be one of"),
        ({"clip_margin": np.nan}, "`clip_margin`"),
        ({"start_obs": np.zeros((0, OBS_DIM))}, r"`start_obs` must have shape \(S, 3\)"),
        ({"start_obs": np.zeros((5, OBS_DIM + 1))}, "`start_obs` must have shape"),
        ({"start_obs": np.zeros(OBS_DIM)}, "`start_obs` must have shape"),
        ({"start_obs": np.full((5, OBS_DIM), np.nan)}, "NaN or infinite"),
        ({"start_obs": np.full((5, OBS_DIM), np.inf)}, "NaN or infinite"),
        ({"reward_fn": None}, "pass `reward_fn`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModelVecEnv(linear_ensemble(), **{"start_obs": starts(), "reward_fn": distance_reward, **arguments})


@pytest.mark.parametrize("actions", [np.zeros((1, 2)), np.zeros((3, 1)), np.zeros(2), np.zeros((4, 2))])
def test_actions_of_another_shape(actions):
    env = ModelVecEnv(linear_ensemble(), starts(), distance_reward, n_envs=3)
    env.reset()
    with pytest.raises(ValueError, match=r"`actions` must have shape \(3, 2\)"):
        env.step(actions)


def test_functions_that_return_another_shape_or_type():
    env = ModelVecEnv(linear_ensemble(), starts(), lambda o, a, n: n, n_envs=3)
    env.reset()
    with pytest.raises(ValueError, match="reward_fn must return a floating tensor"):
        env.step(np.zeros((3, 2)))
    env = ModelVecEnv(linear_ensemble(), starts(), distance_reward, lambda n: n[:, 0], n_envs=3)
    env.reset()
    with pytest.raises(ValueError, match=r"termination_fn must return a torch\.bool tensor"):
        env.step(np.zeros((3, 2)))


def test_step_before_reset():
    env = ModelVecEnv(linear_ensemble(), starts(), distance_reward, n_envs=3)
    with pytest.raises(ResetNeeded, match="Call `reset`"):
        env.step(np.zeros((3, 2)))
