"""Which reward and termination function counts: the argument, the environment's own, a known or a learned one."""

import pickle
import re
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from known_envs import collect, vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_mbmpo.rewards.functions import constant_reward, pendulum_reward, swung_up
from sb3_mbmpo.rewards.resolve import (
    check_reward_fn,
    never_terminates,
    resolve_reward_fn,
    resolve_termination_fn,
)

pytestmark = pytest.mark.usefixtures("mujoco_for_old_environments")


class PointMass(gym.Env):
    """An environment with its own torch functions."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.zeros(2, np.float32)
        return self.state, {}

    def step(self, action):
        self.state = self.state + np.float32(action[0])
        return self.state, float(-abs(self.state).sum()), bool(self.state[0] > 2), False, {}

    def reward(self, obs, action, next_obs):
        return -next_obs.abs().sum(dim=1)

    def done(self, next_obs):
        return next_obs[:, 0] > 2


class ScalarReward(PointMass):
    """An environment whose attributes only look like functions of batches."""

    reward = 1.0

    def done(self):
        return False


class Pendulum(gym.Wrapper):
    """A known environment that overrides its reward function."""

    def reward(self, obs, action, next_obs):
        return th.full((len(obs),), 42.0)


BATCH = (th.zeros(3, 2), th.zeros(3, 1), th.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0]]))


def my_reward(obs, action, next_obs):
    return next_obs.sum(dim=1)


def my_termination(next_obs):
    return next_obs[:, 0] > 0


def test_a_given_function_comes_first():
    env = DummyVecEnv([PointMass])
    reward, termination = resolve_reward_fn(my_reward, env), resolve_termination_fn(my_termination, env)
    assert reward.source == termination.source == "argument"
    assert reward.fn(*BATCH).tolist() == [2.0, 3.0, 0.0]
    assert termination.fn(BATCH[2]).tolist() == [True, True, False]


def test_the_environments_own_functions_come_second():
    env = DummyVecEnv([PointMass])
    reward, termination = resolve_reward_fn("auto", env), resolve_termination_fn("auto", env)
    assert (reward.source, termination.source) == ("env.reward", "env.done")
    assert reward.fn(*BATCH).tolist() == [-2.0, -3.0, 0.0]
    assert termination.fn(BATCH[2]).tolist() == [False, True, False]
    own_reward_only = vec_env("Pendulum-v1", wrapper=Pendulum)
    assert resolve_reward_fn("auto", own_reward_only).source == "env.reward"
    assert resolve_termination_fn("auto", own_reward_only).source == "episodes of Pendulum-v1 never terminate"


def test_the_table_comes_third():
    env = VecNormalize(vec_env("HalfCheetah-v5"))
    reward, termination = resolve_reward_fn("auto", env), resolve_termination_fn("auto", env)
    assert re.fullmatch(r"known: HalfCheetah-v5 \(approximation: .+ below 0.12\)", reward.source)
    assert termination == (never_terminates, "episodes of HalfCheetah-v5 never terminate")
    env = vec_env("Acrobot-v1")
    assert resolve_reward_fn("auto", env).fn.func is constant_reward
    assert resolve_termination_fn("auto", env) == (swung_up, "known: Acrobot-v1")


@pytest.mark.parametrize(
    ("env_id", "kwargs", "source"),
    [
        ("Hopper-v5", {}, "known: Hopper-v5"),  # only its reward is an approximation
        ("Hopper-v5", {"terminate_when_unhealthy": False}, "episodes of Hopper-v5 never terminate"),
        ("InvertedDoublePendulum-v5", {}, r"known: InvertedDoublePendulum-v5 \(approximation: tip off .+\)"),
    ],
)
def test_what_is_said_of_terminations(env_id, kwargs, source):
    assert re.fullmatch(source, resolve_termination_fn("auto", vec_env(env_id, **kwargs)).source)


@pytest.mark.parametrize("resolve", [resolve_reward_fn, resolve_termination_fn])
def test_a_learned_head_comes_last(resolve):
    assert resolve("auto", DummyVecEnv([ScalarReward])) == (None, "learned")
    assert resolve("auto", vec_env("CliffWalking-v1")) == (None, "learned")
    assert resolve("auto", None) == (None, "learned")
    assert resolve("learned", vec_env("Pendulum-v1")) == (None, "learned")


def test_no_termination_is_not_a_learned_one():
    resolved = resolve_termination_fn(None, vec_env("CartPole-v1"))
    assert resolved.fn is never_terminates
    assert not resolved.fn(th.full((3, 4), 100.0)).any()
    assert resolved.source == "argument: never"


def test_the_method_of_a_reward_wrapper_is_not_a_reward_function():
    env = vec_env("Pendulum-v1", wrapper=lambda env: gym.wrappers.TransformReward(env, lambda reward: 2 * reward))
    resolved = resolve_reward_fn("auto", env)
    assert resolved.source == "known: Pendulum-v1"
    # The wrapper makes the known function wrong, which the check on real rewards detects
    assert check_reward_fn(resolved.fn, *collect(env.envs[0], 100)[:4]).relative_error > 0.5


def test_a_function_can_be_named_by_its_path():
    resolved = resolve_reward_fn("sb3_mbmpo.rewards.functions:pendulum_reward", None)
    assert resolved.source == "argument: sb3_mbmpo.rewards.functions:pendulum_reward"
    batch = th.randn(5, 3), th.randn(5, 1), th.randn(5, 3)
    assert th.equal(resolved.fn(*batch), pendulum_reward(*batch))
    ends = resolve_termination_fn("sb3_mbmpo.rewards.functions:swung_up", None)
    assert th.equal(ends.fn(th.ones(2, 6)), swung_up(th.ones(2, 6)))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("leraned", r"must be \"auto\", \"learned\", a function or .*got 'leraned'"),
        (3, "got 3"),
        ("no_such_package.tasks:reward", r"cannot import .*no_such_package.tasks:reward.*No module named"),
        ("sb3_mbmpo.rewards.functions:no_such_function", "cannot import .*has no attribute 'no_such_function'"),
        (":reward", "cannot import"),
        ("sb3_mbmpo.rewards.known:KNOWN_ENVS", "is a dict, not a function"),
    ],
)
@pytest.mark.parametrize(("name", "resolve"), [("reward_fn", resolve_reward_fn), ("termination_fn", resolve_termination_fn)])
def test_wrong_arguments_are_refused(name, resolve, argument, message):
    with pytest.raises(ValueError, match=f"(?s){name}.*{message}|{message}"):
        resolve(argument, None)


@pytest.mark.parametrize(
    ("resolve", "wrong", "message"),
    [
        (
            resolve_reward_fn,
            lambda obs, action: obs,
            r"reward_fn must be a function of \(obs, action, next_obs\)",
        ),
        (
            resolve_termination_fn,
            lambda obs, action: obs,
            r"termination_fn must be a function of \(next_obs\)",
        ),
        (resolve_reward_fn, th.nn.Tanh, "reward_fn must be .*a function or"),
    ],
)
def test_what_cannot_be_called_like_ours_is_refused_at_once(resolve, wrong, message):
    with pytest.raises(ValueError, match=message):
        resolve(wrong, None)


def test_only_a_termination_may_be_none():
    with pytest.raises(ValueError, match=r"reward_fn must be .*got None"):
        resolve_reward_fn(None, None)


@pytest.mark.parametrize(
    ("wrong", "received"),
    [
        (lambda obs, action, next_obs: next_obs[:, :1], r"torch.float32 tensor of shape \(3, 1\) on cpu"),
        (lambda obs, action, next_obs: next_obs.sum(), r"torch.float32 tensor of shape \(\) on cpu"),
        (lambda obs, action, next_obs: next_obs[:, 0] > 0, r"torch.bool tensor of shape \(3,\) on cpu"),
        (lambda obs, action, next_obs: next_obs[:, 0].to("meta"), r"torch.float32 tensor of shape \(3,\) on meta"),
        (lambda obs, action, next_obs: next_obs[:, 0].numpy(), "ndarray"),
    ],
)
def test_a_wrong_reward_is_refused_at_its_first_call(wrong, received):
    with pytest.raises(ValueError, match=rf"reward_fn must return a floating tensor of shape \(3,\) on cpu.*{received}"):
        resolve_reward_fn(wrong, None).fn(*BATCH)


def test_a_wrong_termination_is_refused_at_its_first_call():
    with pytest.raises(ValueError, match=r"termination_fn must return a torch.bool tensor .*a torch.float32 tensor"):
        resolve_termination_fn(lambda next_obs: next_obs[:, 0], None).fn(BATCH[2])


def test_a_wrong_method_of_the_environment_is_named():
    class Numpy(PointMass):
        def reward(self, obs, action, next_obs):
            return -np.abs(next_obs.numpy()).sum(axis=1)

    with pytest.raises(ValueError, match=r"env.reward must return .*it returned a ndarray"):
        resolve_reward_fn("auto", DummyVecEnv([Numpy])).fn(*BATCH)


def test_only_the_first_result_is_checked_but_a_refused_one_is_not_the_first():
    results = [th.zeros(3, 1), th.zeros(3, 1), th.zeros(3), th.zeros(7)]
    fn = resolve_reward_fn(lambda *batch: results.pop(0), None).fn
    for _ in range(2):
        with pytest.raises(ValueError, match="must return"):
            fn(*BATCH)
    assert fn(*BATCH).shape == (3,)
    assert fn(*BATCH).shape == (7,)


def test_a_given_function_survives_pickling():
    fn = resolve_reward_fn("sb3_mbmpo.rewards.functions:pendulum_reward", None).fn
    batch = th.randn(5, 3), th.randn(5, 1), th.randn(5, 3)
    assert th.equal(pickle.loads(pickle.dumps(fn))(*batch), fn(*batch))


def test_environments_in_other_processes():
    class Elsewhere(gym.Wrapper):
        def reward(self, obs, action, next_obs):
            raise AssertionError("must not be asked")

    make = partial(gym.make, "Hopper-v5", healthy_reward=3.0, terminate_when_unhealthy=False)
    env = SubprocVecEnv([lambda: Elsewhere(make())])
    try:
        resolved = resolve_reward_fn("auto", VecNormalize(env))
        assert resolved.source.startswith("known: Hopper-v5")
        assert resolved.fn.keywords["healthy_reward"] == 3.0
        assert resolve_termination_fn("auto", env).fn is never_terminates
        env.reset()  # the worker is still alive
    finally:
        env.close()
