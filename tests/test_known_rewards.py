"""The table of known environments: their reward and termination functions, compared with real steps."""

import pickle
import re
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from known_envs import collect, vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from tiny import Drift

from sb3_mbmpo.rewards.resolve import (
    KNOWN_ENVS,
    check_reward_fn,
    check_termination_fn,
    known_functions,
    never_terminates,
)

pytestmark = pytest.mark.usefixtures("mujoco_for_old_environments")

ENDLESS = ("Pendulum", "Reacher", "Pusher", "Swimmer", "HalfCheetah", "HumanoidStandup")


def stated_error(approximation):
    match = re.search(r"mean absolute error below (\S+)$", approximation)
    return float(match[1]) if match else 0.0


def assert_exact(predicted, real):
    th.testing.assert_close(predicted.double(), real, rtol=1e-4, atol=1e-4)


def test_the_table_has_every_classic_control_and_current_mujoco_id():
    def is_ours(spec):
        return re.match(r"gymnasium\.envs\.(classic_control|mujoco)\.\w+:", str(spec.entry_point)) is not None

    assert set(KNOWN_ENVS) == {env_id for env_id, spec in gym.registry.items() if is_ours(spec)}


@pytest.mark.parametrize("env_id", KNOWN_ENVS)
def test_known_functions_agree_with_the_environment(env_id):
    env = vec_env(env_id)
    task = known_functions(env)
    n_steps = 800 if env_id.startswith(("MountainCar", "Acrobot", "Humanoid-")) else 400
    data = collect(env.envs[0], n_steps)
    # A test of terminations needs some
    assert data.terminated.any() == (not env_id.startswith(ENDLESS))
    for steps in (data.to(th.float32), data):
        obs, action, next_obs, reward, terminated = steps
        copies = [x.clone() for x in steps]
        predicted, ends = task.reward_fn(obs, action, next_obs), task.termination_fn(next_obs)
        assert predicted.shape == ends.shape == (n_steps,)
        assert predicted.dtype == obs.dtype
        assert ends.dtype == th.bool
        # The tip of the double pendulum is an approximation, and so is the moment at which it is too low
        assert (ends != terminated).double().mean() <= (0.005 if "DoublePendulum" in env_id else 0.0)
        assert all(th.equal(x, copy) for x, copy in zip(steps, copies, strict=True))
        if task.approximation:
            error = check_reward_fn(task.reward_fn, obs, action, next_obs, reward)
            assert error.mean_abs_error < stated_error(task.approximation)
            # And it is useful: far better than a constant
            assert error.relative_error < 0.25
        else:
            assert_exact(predicted, reward.double())


@pytest.mark.parametrize("env_id", KNOWN_ENVS)
def test_known_functions_follow_the_device(env_id):
    env = vec_env(env_id)
    task, data = known_functions(env), collect(env.envs[0], 4)
    obs, action, next_obs = (x.to("meta") for x in data[:3])
    assert task.reward_fn(obs, action, next_obs).is_meta
    assert task.termination_fn(next_obs).is_meta


def test_approximations_are_stated():
    approximate = {env_id for env_id in KNOWN_ENVS if known_functions(vec_env(env_id)).approximation}
    names = ("InvertedDoublePendulum", "Swimmer", "HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid")
    assert approximate == {f"{name}-v{version}" for name in names for version in (4, 5)}


def test_both_ends_of_the_step_give_the_best_velocity():
    env = vec_env("HalfCheetah-v5")
    data, task = collect(env.envs[0], 600), known_functions(env)
    errors = {
        share: check_reward_fn(partial(task.reward_fn, next_share=share), *data[:4]).mean_abs_error
        for share in (0.0, 0.5, 0.65, 1.0)
    }
    assert min(errors, key=errors.__getitem__) == 0.65
    assert errors[0.65] < 0.75 * errors[0.5] < errors[1.0] < errors[0.0]


CHANGED = [
    ("CartPole-v1", {"sutton_barto_reward": True}),
    ("MountainCar-v0", {"goal_velocity": 0.04}),
    ("MountainCarContinuous-v0", {"goal_velocity": 0.05}),
    ("InvertedDoublePendulum-v5", {"healthy_reward": 3.0}),
    ("Reacher-v5", {"reward_dist_weight": 3.0}),
    ("Reacher-v5", {"reward_control_weight": 0.5}),
    ("Pusher-v5", {"reward_near_weight": 2.0}),
    ("Pusher-v5", {"reward_dist_weight": 3.0}),
    ("Pusher-v5", {"reward_control_weight": 0.5}),
    ("Swimmer-v4", {"ctrl_cost_weight": 1.0}),
    ("HalfCheetah-v4", {"forward_reward_weight": 3.0}),
    ("HalfCheetah-v5", {"ctrl_cost_weight": 1.0}),
    ("Hopper-v4", {"terminate_when_unhealthy": False}),
    ("Hopper-v5", {"forward_reward_weight": 2.0, "terminate_when_unhealthy": False}),
    ("Hopper-v5", {"healthy_z_range": (1.0, 1.3)}),
    ("Hopper-v5", {"healthy_state_range": (-3, 3)}),
    ("Walker2d-v4", {"healthy_angle_range": (-0.2, 0.2)}),
    ("Walker2d-v5", {"healthy_reward": 10.0}),
    ("Ant-v4", {"terminate_when_unhealthy": False, "healthy_z_range": (0.4, 0.7)}),
    ("Ant-v5", {"contact_cost_weight": 0.5}),
    ("Humanoid-v4", {"healthy_z_range": (1.3, 2.0)}),
    ("Humanoid-v5", {"contact_cost_weight": 1e-4}),
    ("Humanoid-v5", {"contact_cost_range": (1.0, 3.0)}),
    ("HumanoidStandup-v5", {"ctrl_cost_weight": 2.0}),
    ("HumanoidStandup-v5", {"impact_cost_weight": 1e-4}),
    ("HumanoidStandup-v5", {"impact_cost_range": (2.0, 4.0)}),
]


@pytest.mark.parametrize(("env_id", "kwargs"), CHANGED, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_changed_arguments_are_honoured(env_id, kwargs):
    env = vec_env(env_id, **kwargs)
    task, data = known_functions(env), collect(env.envs[0], 800 if "Mountain" in env_id else 300)
    limit = kwargs.get("forward_reward_weight", 1.0) * stated_error(task.approximation) + 1e-4

    def agrees(fns):
        error = check_reward_fn(fns.reward_fn, *data[:4]).mean_abs_error
        return error < limit and check_termination_fn(fns.termination_fn, data.next_obs, data.terminated) == 0.0

    assert agrees(task)
    assert not agrees(known_functions(vec_env(env_id))), "the argument makes no difference to these steps: a weak test"


@pytest.mark.parametrize(("env_id", "weight"), [("Ant-v5", 5e-4), ("Humanoid-v5", 5e-7)])
def test_every_contact_force_is_charged(env_id, weight):
    # Some bodies touch nothing in the steps above: 13 bodies of 6 components, by hand
    env = vec_env(env_id)
    obs = collect(env.envs[0], 1).obs
    pressed = obs.index_fill(1, th.arange(obs.shape[1] - 78, obs.shape[1]), 100.0)
    action = th.zeros(1, *env.action_space.shape)
    reward_fn = known_functions(env).reward_fn
    cost = reward_fn(obs, action, obs) - reward_fn(obs, action, pressed)
    assert cost.item() == pytest.approx(78 * 100.0**2 * weight, rel=1e-6)


def test_another_frame_skip_leaves_the_standup_reward_exact():
    env = vec_env("HumanoidStandup-v5", frame_skip=2)
    data = collect(env.envs[0], 100)
    assert_exact(known_functions(env).reward_fn(*data[:3]), data.reward)


def test_attributes_changed_after_construction_are_honoured():
    env = vec_env("Hopper-v5")
    env.envs[0].unwrapped._healthy_reward = np.float64(7.0)
    data = collect(env.envs[0], 100)
    fn = known_functions(env).reward_fn
    assert check_reward_fn(fn, *data[:4]).mean_abs_error < 0.005
    # A numpy scalar must not turn float32 into float64
    assert fn(*data.to(th.float32)[:3]).dtype == th.float32


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        *(
            (env_id, {"exclude_current_positions_from_observation": False})
            for env_id in ("Ant-v4", "Hopper-v5", "Humanoid-v5")
        ),
        ("Ant-v4", {"use_contact_forces": True}),
        ("Ant-v5", {"include_cfrc_ext_in_observation": False}),
        ("Humanoid-v5", {"include_cvel_in_observation": False}),
    ],
)
def test_another_layout_of_the_observation_is_not_known(env_id, kwargs):
    assert known_functions(vec_env(env_id, **kwargs)) is None


def test_unknown_environments_are_not_known():
    assert known_functions(vec_env("CliffWalking-v1")) is None
    assert known_functions(DummyVecEnv([Drift])) is None  # has no spec
    assert known_functions(VecFrameStack(vec_env("Pendulum-v1"), 2)) is None


def test_wrappers_are_seen_through():
    env = VecNormalize(vec_env("CartPole-v1", wrapper=gym.wrappers.RecordEpisodeStatistics, sutton_barto_reward=True))
    assert known_functions(env).reward_fn.keywords["final"] == -1.0


def test_known_functions_survive_pickling():
    for env_id in KNOWN_ENVS:
        env = vec_env(env_id)
        task, data = known_functions(env), collect(env.envs[0], 20)
        copy = pickle.loads(pickle.dumps(task))
        assert th.equal(copy.reward_fn(*data[:3]), task.reward_fn(*data[:3]))
        assert th.equal(copy.termination_fn(data.next_obs), task.termination_fn(data.next_obs))
        assert (copy.termination_fn is never_terminates) == env_id.startswith(ENDLESS)
