"""Replay buffers in files: those of SB3's other algorithms, of another size, and those that cannot be."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from file_kinds import loaded_buffer
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from tiny import ACTION_SPACES, Drift, push, tiny_model


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: setattr(b, "pos", 10**6), "`pos`=1000000.*is not a position in its 64 rows"),
        (lambda b: setattr(b, "pos", -1), "`pos` must be an integer of at least 0, not -1"),
        (lambda b: setattr(b, "full", None), "`full`=None"),
        (lambda b: setattr(b, "n_envs", 2), r"`observations` must be an array of shape \(64, 2, 2\)"),
        (lambda b: setattr(b, "rewards", b.rewards[:5]), r"`rewards` must be an array of shape \(64, 1\)"),
        (lambda b: setattr(b, "actions", b.actions.tolist()), "`actions` must be an array .*a list"),
        (lambda b: setattr(b, "rewards", b.rewards.astype(str)), "`rewards` must hold numbers"),
        (
            lambda b: b.observations.__setitem__((3, 0, 1), np.nan),
            "`observations` has NaN or infinite numbers, first in row 3",
        ),
        (lambda b: setattr(b, "rewards", np.full((64, 1), 1e39)), "`rewards` has NaN or infinite numbers, first in row 0"),
        (lambda b: b.dones.__setitem__(2, 0.5), "`dones` must be 0 or 1"),
        (lambda b: b.timeouts.__setitem__(0, 1.0), "`timeouts` mark steps that did not end an episode"),
        (lambda b: b.actions.__setitem__(1, 1.5), r"actions should be in \[-1, 1\].*up to 1.5"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused_by_name(change, match, model, tmp_path):
    buffer = copy.deepcopy(model.replay_buffer)
    buffer.actions = np.clip(buffer.actions, -1, 1)  # as SB3's algorithms store them
    save_to_pkl(tmp_path / "buffer.pkl", buffer)
    tiny_model(buffer_size=64).load_replay_buffer(tmp_path / "buffer.pkl")
    change(buffer)
    save_to_pkl(tmp_path / "buffer.pkl", buffer)
    with pytest.raises(ValueError, match=rf"buffer\.pkl cannot be used.*{match}"):
        tiny_model(buffer_size=64).load_replay_buffer(tmp_path / "buffer.pkl")


def test_a_buffer_changed_behind_our_back_is_refused(model, tmp_path):
    path = tmp_path / "buffer.pkl"
    model.save_replay_buffer(path)
    stored = load_from_pkl(path)
    save_to_pkl(path, stored)
    with pytest.raises(ValueError, match=r"buffer\.pkl has lost its checksum"):
        loaded_buffer(path)
    path.write_bytes(pickle.dumps({"no": "buffer"}))
    with pytest.raises(ValueError, match=r"buffer\.pkl holds no replay buffer, but a dict"):
        loaded_buffer(path)


class Noting(gym.Wrapper):
    """A wrapper that records the actions that the environment receives."""

    def __init__(self, env):
        super().__init__(env)
        self.received = []

    def step(self, action):
        self.received.append(np.copy(action))
        return self.env.step(action)


def off_policy(algorithm, env, **kwargs):
    return algorithm("MlpPolicy", env, buffer_size=64, learning_starts=100, policy_kwargs=dict(net_arch=[4]), **kwargs)


@pytest.mark.parametrize(
    ("algorithm", "action_space"), [(SAC, "box"), (TD3, "box"), (DQN, "discrete")], ids=["SAC", "TD3", "DQN"]
)
def test_real_steps_of_other_algorithms_mean_the_same_here(algorithm, action_space, tmp_path):
    env = Noting(Drift(ACTION_SPACES[action_space]))  # a Box of [-1, 2], unlike that of the buffer
    off_policy(algorithm, env, seed=0).learn(40).save_replay_buffer(tmp_path / "buffer")
    ours = tiny_model(Drift(ACTION_SPACES[action_space]), buffer_size=64)
    ours.load_replay_buffer(tmp_path / "buffer")
    data = ours._transitions()
    np.testing.assert_allclose(data.action.reshape(40, -1), np.reshape(env.received, (40, -1)), atol=1e-6)
    for obs, action, next_obs in zip(data.obs.numpy(), data.action.numpy(), data.next_obs.numpy(), strict=True):
        np.testing.assert_allclose(push(obs, action), next_obs, atol=1e-5)
    # And back: they can load what we save, and we read the original actions from it
    ours.save_replay_buffer(tmp_path / "ours")
    theirs = off_policy(algorithm, Drift(ACTION_SPACES[action_space]))
    theirs.load_replay_buffer(tmp_path / "ours")
    first = load_from_pkl(tmp_path / "buffer.pkl")
    np.testing.assert_allclose(theirs.replay_buffer.actions[:40], first.actions[:40], atol=1e-6)
    again = tiny_model(Drift(ACTION_SPACES[action_space]), buffer_size=64)
    again.load_replay_buffer(tmp_path / "ours")
    np.testing.assert_array_equal(again.replay_buffer.actions, ours.replay_buffer.actions)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
            "optimize_memory_usage",
        ),
        (dict(replay_buffer_kwargs=dict(handle_timeout_termination=False)), "handle_timeout_termination"),
    ],
)
def test_buffers_that_lack_something_are_refused(options, match, tmp_path):
    off_policy(SAC, Drift(), **options).learn(20).save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match=rf"buffer.* cannot be used.*{match}"):
        tiny_model().load_replay_buffer(tmp_path / "buffer")


@pytest.mark.parametrize(("capacity", "expected"), [(16, 16), (64, 40), (1000, 40)])
def test_a_buffer_of_another_size_gives_its_newest_steps(capacity, expected, model, tmp_path):
    model.save_replay_buffer(tmp_path / "buffer")
    smaller = tiny_model(buffer_size=max(capacity, 20), learning_starts=20)
    smaller.buffer_size = capacity
    smaller.load_replay_buffer(tmp_path / "buffer")
    assert smaller.replay_buffer.size() == expected
    np.testing.assert_array_equal(smaller._transitions().obs, model._transitions().obs[-expected:])


@pytest.mark.parametrize("action", [-1, 3, 0.5])
def test_choices_that_a_space_lacks_are_refused(action, tmp_path):
    model = tiny_model(Drift(ACTION_SPACES["discrete"]), buffer_size=64).learn(20)
    buffer = copy.deepcopy(model.replay_buffer)
    buffer.actions = buffer.actions.astype(np.float32)
    buffer.actions[3] = action
    save_to_pkl(tmp_path / "buffer.pkl", buffer)
    with pytest.raises(ValueError, match=r"buffer\.pkl cannot be used.*must be choices of Discrete\(3\)"):
        model.load_replay_buffer(tmp_path / "buffer.pkl")
