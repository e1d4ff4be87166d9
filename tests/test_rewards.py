import pickle
import re
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_mbmpo.rewards.functions import constant_reward, pendulum_reward, swung_up
from sb3_mbmpo.rewards.resolve import (
    KNOWN_ENVS,
    RewardFn,
    TerminationFn,
    check_reward_fn,
    check_termination_fn,
    known_functions,
    never_terminates,
    resolve_reward_fn,
    resolve_termination_fn,
)

# The v4 environments are outdated but still in use
pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")

ENDLESS = ("Pendulum", "Reacher", "Pusher", "Swimmer", "HalfCheetah", "HumanoidStandup")


class Transitions(NamedTuple):
    obs: th.Tensor
    action: th.Tensor
    next_obs: th.Tensor
    reward: th.Tensor
    terminated: th.Tensor

    def to(self, dtype: th.dtype) -> "Transitions":
        return Transitions(*(x.to(dtype) if x.is_floating_point() else x for x in self))


@pytest.fixture(autouse=True)
def mujoco_as_we_want_it(monkeypatch, tmp_path):
    # Pusher-v4 refuses MuJoCo 3, in which its object has another mass; the formula of its reward is the same
    monkeypatch.setattr(mujoco, "__version__", "2.3.7")
    # MuJoCo writes warnings about Gymnasium's models to MUJOCO_LOG.TXT in the current folder
    monkeypatch.chdir(tmp_path)


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


def stated_error(approximation):
    match = re.search(r"mean absolute error below (\S+)$", approximation)
    return float(match[1]) if match else 0.0


def assert_exact(predicted, real):
    th.testing.assert_close(predicted.double(), real, rtol=1e-4, atol=1e-4)


# -- The table ------------------------------------------------------------------------------------------------------------


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
    assert known_functions(DummyVecEnv([PointMass])) is None  # has no spec
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


# -- Resolution -----------------------------------------------------------------------------------------------------------


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


# -- Checks ---------------------------------------------------------------------------------------------------------------


def shifted(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
    return obs[:, 0] + th.tensor([0.0, 0.0, 0.0, 2.0])


def check(fn: RewardFn, reward: Any) -> Any:
    reward = th.tensor(reward)
    obs = reward[:, None]
    return check_reward_fn(fn, obs, obs, obs, reward)


def test_reward_errors_by_hand():
    # Standard deviation of the rewards: sqrt(5 / 4) * 2; root mean square error: sqrt(4 / 4)
    result = check(shifted, [0.0, 2.0, 4.0, 6.0])
    assert result == pytest.approx((0.5, 2.0, 1 / 5**0.5))


@pytest.mark.parametrize(("level", "relative"), [(1.0, 100.0), (10.0, 10.0)])
def test_the_error_of_constant_rewards_is_relative_to_their_size(level, relative):
    assert check(shifted, [level] * 4).relative_error == pytest.approx(relative)
    assert check(lambda obs, action, next_obs: obs[:, 0] * (1 + 1e-6), [level] * 4).relative_error < 1e-3


def test_the_error_of_rewards_that_are_all_zero():
    assert check(lambda obs, action, next_obs: obs[:, 0], [0.0] * 4) == (0.0, 0.0, 0.0)
    assert check(shifted, [0.0] * 4).relative_error > 1e3


def test_the_disagreement_of_terminations():
    fn: TerminationFn = my_termination
    next_obs = th.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert check_termination_fn(fn, next_obs, th.tensor([True, False, True, False])) == 0.0
    assert check_termination_fn(fn, next_obs, th.tensor([True, True, True, False])) == 0.25
    assert check_termination_fn(never_terminates, next_obs, th.tensor([True, False, True, False])) == 0.5


def test_checks_do_not_broadcast():
    with pytest.raises(ValueError, match=r"\(4,\).*\(4, 1\)"):
        check(lambda obs, action, next_obs: obs, [0.0] * 4)
    with pytest.raises(ValueError, match=r"\(4,\).*\(\)"):
        check_termination_fn(lambda next_obs: next_obs.any(), th.zeros(4, 2), th.zeros(4, dtype=th.bool))
