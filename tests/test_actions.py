"""Actions between policy, environment and models, and spaces that are refused with the wrapper that helps."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, TransformAction

from sb3_mbmpo.common.actions import ActionCodec, check_spaces

CPU = th.device("cpu")
FLAT = spaces.Box(-np.inf, np.inf, (3,), np.float32)
UNIT = spaces.Box(-1, 1, (2,), np.float32)


def box(low, high, dtype=np.float32):
    return spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)


ASYMMETRIC = box([-2, 0.5], [4, 1.5])
MATRIX = box([[-1, -2], [-3, -4]], [[1, 2], [3, 4]], np.float64)
ACTION_SPACES = [ASYMMETRIC, MATRIX, spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)]
every_action_space = pytest.mark.parametrize("space", ACTION_SPACES, ids=str)


class Env(gym.Env):
    def __init__(self, observation_space=FLAT, action_space=UNIT):
        self.observation_space, self.action_space = observation_space, action_space


def check(env):
    check_spaces(env.observation_space, env.action_space)


def samples(space, n=20):
    space.seed(0)
    return np.array([space.sample() for _ in range(n)])


# -- Which spaces are supported -------------------------------------------------------------------------------------------


@every_action_space
def test_supported_spaces_pass(space):
    check_spaces(FLAT, space)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"position": UNIT}),
        spaces.Tuple([UNIT, UNIT]),
        spaces.Box(0, 255, (8, 8, 3), np.uint8),
        spaces.Box(0, 1, (), np.float32),
        spaces.Discrete(4),
        spaces.MultiBinary(4),
    ],
    ids=str,
)
def test_observations_that_are_no_vector_are_refused_and_flattening_helps(space):
    env = Env(observation_space=space)
    with pytest.raises(ValueError, match=r"flat vector.*`env = gymnasium\.wrappers\.FlattenObservation\(env\)`"):
        check(env)
    check(FlattenObservation(env))


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")
@pytest.mark.skipif(np.dtype(np.longdouble) == np.float64, reason="this machine has no longer numbers")
def test_numbers_that_tensors_cannot_have_are_refused_and_the_wrapper_helps():
    long = spaces.Box(-1, 1, (2,), np.longdouble)
    with pytest.raises(ValueError, match=r"`gymnasium.wrappers.DtypeObservation\(env, np.float64\)`"):
        check_spaces(long, UNIT)
    with pytest.raises(ValueError, match=r"`gymnasium.wrappers.TransformAction\(env, .*dtype=np.float64"):
        check_spaces(FLAT, long)
    check(gym.wrappers.DtypeObservation(Env(observation_space=long), np.float64))


@pytest.mark.parametrize(("low", "high"), [([-np.inf] * 2, [np.inf] * 2), ([0, 0], [1, np.inf]), ([-np.inf, 0], [0, 1])])
def test_unbounded_actions_are_refused_and_mapping_bounded_ones_helps(low, high):
    env = Env(action_space=box(low, high))
    with pytest.raises(ValueError, match=r"finite bounds.*`gymnasium.wrappers.TransformAction`"):
        check(env)
    check(TransformAction(env, np.sinh, UNIT))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.MultiDiscrete([[2, 3], [4, 5]]), "(?s)one dimension.*flatten it"),
        (spaces.MultiBinary([2, 2]), "one dimension.*flatten it"),
        (spaces.Discrete(3, start=1), r"count from 0, not from 1.*`gymnasium.ActionWrapper`"),
        (spaces.MultiDiscrete([2, 3], start=[0, -1]), r"count from 0, not from \[ 0 -1\].*`gymnasium.ActionWrapper`"),
        (spaces.Dict({"steer": UNIT}), r"Box, Discrete, MultiDiscrete or MultiBinary.*`gymnasium.ActionWrapper`"),
        (spaces.Text(3), r"Box, Discrete, MultiDiscrete or MultiBinary.*`gymnasium.ActionWrapper`"),
    ],
    ids=str,
)
def test_other_actions_are_refused_with_the_remedy(space, message):
    with pytest.raises(ValueError, match=message):
        check_spaces(FLAT, space)


# -- From the policy to the environment -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "sample", "env_action"),
    [
        (ASYMMETRIC, [-1, -1], [-2, 0.5]),
        (ASYMMETRIC, [0, 0], [1, 1]),
        (ASYMMETRIC, [0.5, -0.5], [2.5, 0.75]),
        (ASYMMETRIC, [1, 1], [4, 1.5]),
        (ASYMMETRIC, [-1.1, 7], [-2, 1.5]),  # clipped
        (MATRIX, [0.5, 0.5, -0.5, -0.5], [0.5, 1, -1.5, -2]),
    ],
)
def test_continuous_samples_are_scaled_and_clipped(space, sample, env_action):
    sample, env_action = th.tensor([[sample]]).float(), th.tensor([[env_action]]).float()
    assert th.equal(ActionCodec(space).to_env(sample), env_action)


@pytest.mark.parametrize("space", ACTION_SPACES[2:], ids=str)
def test_choices_reach_the_environment_as_they_are(space):
    codec = ActionCodec(space)
    choices = codec.from_numpy(samples(space), CPU)
    assert th.equal(codec.to_env(choices), choices)


@every_action_space
def test_what_the_environment_has_taken_survives_the_round_trip(space):
    actions = samples(space)
    codec = ActionCodec(space)
    tensor = codec.from_numpy(actions, CPU)
    assert tensor.dtype == (th.float32 if isinstance(space, spaces.Box) else th.long)
    assert tensor.shape == (20, actions[0].size)
    back = codec.to_numpy(tensor)
    assert back.dtype == space.dtype
    assert back.shape == actions.shape
    # Float64 spaces lose what float32 cannot hold
    np.testing.assert_array_equal(back, actions.astype(np.float32) if actions.dtype == np.float64 else actions)


def test_rounding_does_not_leave_the_bounds():
    space = box([-0.7], [0.4])
    codec = ActionCodec(space)
    beyond = codec.to_env(th.tensor([[1.0]]))
    assert beyond.item() > space.high.item(), "choose other bounds: rounding has no effect on these"
    assert space.contains(codec.to_numpy(beyond)[0])


@pytest.mark.parametrize("space", [ASYMMETRIC, MATRIX], ids=str)
def test_wild_samples_become_actions_of_the_space(space):
    codec = ActionCodec(space)
    wild = 3 * th.randn(50, codec.dynamics_dim, generator=th.Generator().manual_seed(0))
    assert all(space.contains(action) for action in codec.to_numpy(codec.to_env(wild)))


# -- From the environment to the dynamics and the reward ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "actions", "encoded"),
    [
        (ASYMMETRIC, [[-2, 0.5], [3, 1]], [[-2, 0.5], [3, 1]]),
        (MATRIX, [[[1, 2], [3, 4]]], [[1, 2, 3, 4]]),
        # No batch here has the last choice: the width is that of the space
        (spaces.Discrete(4), [0, 2, 0], [[1, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]),
        (spaces.MultiDiscrete([2, 3]), [[0, 1], [1, 0]], [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]]),
        (spaces.MultiBinary(3), [[1, 0, 1]], [[1, 0, 1]]),
    ],
    ids=str,
)
def test_encoding_for_the_dynamics(space, actions, encoded):
    codec = ActionCodec(space)
    result = codec.to_dynamics(codec.from_numpy(np.array(actions), CPU))
    assert result.dtype == th.float32
    assert result.tolist() == encoded
    assert codec.dynamics_dim == len(encoded[0])


@every_action_space
def test_encoding_keeps_leading_dimensions(space):
    codec = ActionCodec(space)
    actions = codec.from_numpy(samples(space, 6), CPU)
    stacked = actions.view(2, 3, -1)
    assert th.equal(codec.to_dynamics(stacked).flatten(0, 1), codec.to_dynamics(actions))


@every_action_space
def test_reward_functions_get_flat_rows_and_single_choices_as_scalars(space):
    codec = ActionCodec(space)
    actions = codec.from_numpy(samples(space), CPU)
    expected = actions[:, 0] if isinstance(space, spaces.Discrete) else actions
    assert th.equal(codec.to_reward(actions), expected)
