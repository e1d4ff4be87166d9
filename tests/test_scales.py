"""Numbers of any scale, offset and dtype: learning depends on none of them."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from tiny import Drift, tiny_model

from sb3_mbmpo import DynamicsEnsemble
from sb3_mbmpo.common.actions import check_spaces
from sb3_mbmpo.common.finite import as_floating, resolution
from sb3_mbmpo.dynamics import Transitions
from sb3_mbmpo.policies import MlpPolicy

ACTIONS = spaces.Box(-1, 1, (1,), np.float32)
ROWS = 300


def box(dtype, size=2):
    return spaces.Box(-np.inf, np.inf, (size,), dtype)


def transitions(scale=1.0, offset=0.0, step=0.1, dtype=np.float32):
    """Draw transitions of a point that the action pushes in the first dimension; the second one decays."""
    rng = np.random.default_rng(0)
    x, action = rng.uniform(-1, 1, (ROWS, 2)), rng.uniform(-1, 1, (ROWS, 1)).astype(np.float32)
    following = x + step * np.concatenate([action, -x[:, 1:]], axis=1)
    obs, next_obs = ((scale * values + offset).astype(dtype) for values in (x, following))
    reward = (scale * x[:, 0]).astype(np.float32)
    columns = (obs, action, next_obs, reward, np.zeros(ROWS, bool))
    return Transitions(*map(th.as_tensor, columns))


def fitted(data):
    dtype = np.float64 if data.obs.dtype == th.float64 else np.float32
    ensemble = DynamicsEnsemble(box(dtype), ACTIONS, 2, net_arch=[16], learned_reward=True, seed=0, precision="float32")
    ensemble.fit(data, max_epochs=20, batch_size=50, generator=th.Generator().manual_seed(0))
    return ensemble


def changes(ensemble, data):
    """Return predicted changes of the observations (M, B, O)."""
    return ensemble.predict(data.obs.numpy(), data.action.numpy()) - data.obs.numpy()


@pytest.fixture(scope="module")
def plain():
    data = transitions()
    ensemble = fitted(data)
    error = changes(ensemble, data) - (data.next_obs - data.obs).numpy()
    assert np.abs(error).mean() < 0.035
    return changes(ensemble, data), ensemble


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e-3, 1e6, 1e12])
def test_what_is_learned_does_not_depend_on_the_unit(scale, plain):
    data = transitions(scale)
    ensemble = fitted(data)
    np.testing.assert_allclose(changes(ensemble, data) / scale, plain[0], rtol=0, atol=2e-3)
    np.testing.assert_allclose(ensemble.target_std / np.float32(scale), plain[1].target_std, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6])
def test_what_is_learned_does_not_depend_on_the_unit_of_the_actions(scale, plain):
    data = transitions()
    data = data._replace(action=scale * data.action)
    np.testing.assert_allclose(changes(fitted(data), data), plain[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_steps_of_less_than_a_micrometre_are_learned(dtype):
    data = transitions(step=0.4e-6, dtype=dtype)
    ensemble = fitted(data)
    assert (ensemble.target_std > 0).all()
    error = ensemble.disagreement(data.obs.numpy(), data.action.numpy())
    assert np.isfinite(error).all()
    step = ensemble.step_fn()
    assert not th.equal(step(data.obs.expand(2, -1, -1), data.action.expand(2, -1, -1)).next_obs[0], data.obs)


@pytest.mark.parametrize(("dtype", "noise"), [(np.float32, 0.0), (np.float64, 1e-15)])
def test_rounding_is_not_learned(dtype, noise):
    data = transitions(dtype=dtype)
    rng = np.random.default_rng(1)
    fixed = lambda: th.as_tensor((0.7 + noise * rng.normal(size=ROWS)).astype(dtype))  # noqa: E731
    data.obs[:, 1], data.next_obs[:, 1] = fixed(), fixed()
    data.reward[:] = 0.3
    ensemble = fitted(data)
    assert ensemble.target_std[1:].tolist() == [0, 0]
    assert ensemble.observation_std[1] == 1
    policy = MlpPolicy(box(dtype), ACTIONS, lambda _: 1e-3)
    policy.set_observation_statistics(data.obs)
    assert policy.observation_std[1] == 1


def test_resolution_by_hand():
    values = th.tensor([[1.0, -4.0, 0.0], [-2.0, 1.0, 0.0]])
    assert resolution(values).tolist() == pytest.approx([0.02 * 2.0**-23, 0.04 * 2.0**-23, 0])
    assert resolution(values.double()).tolist() == [2 * 2.0**-42, 4 * 2.0**-42, 0]
    assert resolution(th.tensor([[3]])).tolist() == [3 * 2.0**-42]


# ---------------------------------------------------------------- large numbers with small changes


OFFSET = 5e6  # metres of a map


# Single precision rounds the mean, by less than the spread at the first offset and by far more at the second one
@pytest.mark.parametrize("offset", [OFFSET, 1000 * OFFSET + 200.3])
def test_an_offset_in_double_precision_changes_nothing(offset, plain):
    data = transitions(offset=offset, dtype=np.float64)
    ensemble = fitted(data)
    assert ensemble.observation_dtype == th.float64
    np.testing.assert_allclose(changes(ensemble, data), plain[0], rtol=0, atol=2e-3)
    low, high = ensemble.observation_range(0.0)
    np.testing.assert_allclose([low.numpy(), high.numpy()], [both(data).min(0), both(data).max(0)], rtol=1e-14)
    assert fitted(transitions(dtype=np.float64)).observation_dtype == th.float32, "double precision would waste memory"


def both(data):
    return np.concatenate([data.obs.numpy(), data.next_obs.numpy()])


@pytest.mark.parametrize("offset", [OFFSET, 1000 * OFFSET + 200.3])
def test_a_policy_sees_small_changes_of_large_numbers(offset):
    policy = MlpPolicy(box(np.float64), ACTIONS, lambda _: 1e-3)
    obs = offset + th.linspace(0, 1, 50, dtype=th.float64).unsqueeze(1).expand(-1, 2)
    policy.set_observation_statistics(obs)
    expected = (obs - obs.mean(0)) / obs.std(0, correction=0)
    seen = policy.standardize(obs)
    assert seen.dtype == th.float32
    th.testing.assert_close(seen, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_a_policy_sees_does_not_depend_on_the_unit(dtype, scale):
    policy = MlpPolicy(box(dtype), ACTIONS, lambda _: 1e-3)
    obs = th.as_tensor((scale * np.random.default_rng(0).uniform(-1, 1, (50, 2))).astype(dtype))
    policy.set_observation_statistics(obs)
    seen = policy.standardize(obs)
    th.testing.assert_close(seen.std(0, correction=0), th.ones(2), rtol=1e-4, atol=0)
    th.testing.assert_close(seen.mean(0), th.zeros(2), rtol=0, atol=1e-4)


class Far(Drift):
    """The same environment, far away from 0 and in double precision."""

    def __init__(self, offset=OFFSET, **kwargs):
        super().__init__(**kwargs)
        self.offset, self.observation_space = offset, box(np.float64)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs.astype(np.float64) + self.offset, info

    def step(self, action):
        obs, *rest = super().step(action)
        return obs.astype(np.float64) + self.offset, *rest

    def reward(self, obs, action, next_obs):
        return -(next_obs - self.offset).square().sum(1)

    def done(self, next_obs):
        return (next_obs - self.offset).abs().amax(1) > 2


@pytest.mark.parametrize("extra", [{}, dict(output_noise=0.1, output_bias=0.1), dict(probabilistic=True)], ids=str)
def test_training_far_from_0_is_training_at_0(extra):
    dynamics_kwargs = dict(net_arch=[16], max_epochs=10, precision="float32", **extra)
    near, far = (tiny_model(Far(offset), dynamics_kwargs=dynamics_kwargs).learn(40) for offset in (0.0, OFFSET))
    assert far.dynamics.observation_dtype == th.float64
    np.testing.assert_allclose(far.replay_buffer.actions[:20], near.replay_buffer.actions[:20])
    th.testing.assert_close(far.policy.actor_vector(), near.policy.actor_vector(), rtol=0, atol=0.05)
    env = far.imagined_env(n_envs=5, seed=0)
    before = env.reset()
    after = env.step(np.ones((5, 2), np.float32))[0]
    assert before.dtype == after.dtype == np.float64
    assert (before != after).all()


# ---------------------------------------------------------------- integers


class Counts(Drift):
    """An environment with integer observations, as from encoders."""

    def __init__(self, dtype, resolution=50):
        super().__init__(length=8)
        info = np.iinfo(dtype)
        self.counts, self.middle = resolution, (int(info.max) + int(info.min)) // 2 if info.max < 2**16 else 10**6
        self.observation_space = spaces.Box(info.min, info.max, (2,), dtype)

    def to_counts(self, obs):
        return np.rint(self.middle + self.counts * np.clip(obs, -2, 2)).astype(self.observation_space.dtype)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return self.to_counts(obs), info

    def step(self, action):
        obs, *rest = super().step(action)
        return self.to_counts(obs), *rest

    reward = done = None


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_observations_that_are_whole_numbers(dtype):
    dtypes = set()

    def reward_fn(obs, action, next_obs):
        dtypes.update((obs.dtype, next_obs.dtype))
        return -(next_obs - obs).square().mean(1).to(th.float32)

    with pytest.warns(UserWarning, match="The reward function"):  # it differs from the known one
        model = tiny_model(Counts(dtype), reward_fn=reward_fn, imagined_start="buffer").learn(60)
    assert dtypes <= {th.float32, th.float64}
    assert model.dynamics.target_std.min() > 0
    obs = model.imagined_env(n_envs=2).reset()
    assert obs.dtype == dtype
    assert model.predict(obs)[0].shape == (2, 2)
    assert tiny_model(Counts(dtype)).learn(40).dynamics.learned_reward


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_large_whole_numbers_keep_their_last_digit(dtype):
    # In single precision, all of these are the same number
    counts = np.arange(2 * 10**9, 2 * 10**9 + 50, dtype=dtype)
    np.testing.assert_array_equal(as_floating(counts), counts)
    policy = MlpPolicy(spaces.Box(0, 2**31 - 1, (2,), dtype), ACTIONS, lambda _: 1e-3)
    obs = np.stack([counts, counts[::-1]], axis=1)
    policy.set_observation_statistics(th.as_tensor(as_floating(obs)))
    seen = policy.standardize(th.as_tensor(obs))
    expected = (np.arange(50) - 24.5) / np.sqrt((50**2 - 1) / 12)
    np.testing.assert_allclose(seen, np.stack([expected, -expected], axis=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", [2**55, -(2**55)])
def test_counts_that_double_precision_cannot_hold_are_refused_with_the_way_out(offset):
    near = Counts(np.int64)
    far = gym.wrappers.TransformObservation(near, lambda obs: obs + offset, near.observation_space)
    with pytest.raises(
        ValueError, match=r"The environment's observation has .* beyond 2\*\*53.*`gymnasium.wrappers.TransformObservation`"
    ):
        tiny_model(far).learn(20)
    near_again = gym.wrappers.TransformObservation(far, lambda obs: obs - offset, near.observation_space)
    assert tiny_model(near_again).learn(40).dynamics.target_std.min() > 0


class Corridor(gym.Env):
    """An environment with four places; the wrapper that our message recommends turns its observations into vectors."""

    observation_space, action_space = spaces.Discrete(4), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.elapsed = 0, 0
        return self.place, {}

    def step(self, action):
        self.place = int(np.clip(self.place + 2 * action - 1, 0, 3))
        self.elapsed += 1
        return self.place, float(self.place == 3), False, self.elapsed == 8, {}


def test_the_wrapper_that_the_message_recommends_helps():
    with pytest.raises(ValueError, match="FlattenObservation"):
        tiny_model(Corridor())
    model = tiny_model(gym.wrappers.FlattenObservation(Corridor())).learn(60)
    assert model.predict(model.env.reset())[0].shape == (1,)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8])
def test_actions_that_are_whole_numbers_are_refused_and_the_wrapper_helps(dtype):
    space = spaces.Box(0, 10, (2,), dtype)
    with pytest.raises(ValueError, match=r"integers.*`gymnasium.wrappers.TransformAction\(env, lambda a: np.rint") as error:
        check_spaces(box(np.float32), space)
    assert "MultiDiscrete" in str(error.value)

    class Whole(Drift):
        def __init__(self):
            super().__init__(space)

    wrapped = gym.wrappers.TransformAction(Whole(), lambda a: np.rint(a).astype(dtype), spaces.Box(0, 10, (2,), np.float32))
    tiny_model(wrapped, reward_fn="learned", termination_fn="learned").learn(40)  # `step` asserts that the action is valid


@pytest.mark.parametrize("bound", [1e39, 1e300])
def test_bounds_that_single_precision_cannot_hold_are_no_bounds(bound):
    with pytest.raises(ValueError, match="finite bounds"):
        check_spaces(box(np.float32), spaces.Box(-bound, bound, (2,), np.float64))
