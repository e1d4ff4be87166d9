"""Recorded transitions: files of several origins, what is refused, and learning without an environment."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import VecMonitor

from sb3_mbmpo import DynamicsEnsemble, ModelVecEnv
from sb3_mbmpo.offline import load_minari, load_transitions

N, D = 12, 3  # transitions, observation size
ACTIONS = {
    "box": (lambda rng: rng.uniform(-2, 1, (N, 2)).astype(np.float32), spaces.Box),
    "discrete": (lambda rng: np.arange(N) % 4, spaces.Discrete),
    "multi_discrete": (lambda rng: np.stack([np.arange(N) % 2, np.arange(N) % 3], axis=1), spaces.MultiDiscrete),
    "multi_binary": (lambda rng: rng.random((N, 2)) < 0.5, spaces.MultiBinary),
}


def arrays(kind="box", **changes):
    """Return three episodes of 5, 4 and 3 steps, which end by termination, by truncation and with the end of the file."""
    rng = np.random.default_rng(0)
    states = [rng.normal(size=(length + 1, D)) for length in (5, 4, 3)]
    result = {
        "observations": np.concatenate([s[:-1] for s in states]),
        "next_observations": np.concatenate([s[1:] for s in states]),
        "actions": ACTIONS[kind][0](rng),
        "rewards": rng.normal(size=N),
        "terminations": np.arange(N) == 4,
    }
    return {key: value for key, value in {**result, **changes}.items() if value is not None}


def saved(tmp_path, **kwargs):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays(**kwargs))
    return path


@pytest.mark.parametrize("actions", ACTIONS)
def test_what_is_in_the_file_comes_out(actions, tmp_path):
    data, expected = load_transitions(saved(tmp_path, kind=actions)), arrays(actions)
    transitions = data.transitions
    np.testing.assert_array_equal(transitions.obs, expected["observations"])
    np.testing.assert_array_equal(transitions.next_obs, expected["next_observations"])
    np.testing.assert_array_equal(transitions.reward, expected["rewards"])
    np.testing.assert_array_equal(transitions.terminated, expected["terminations"])
    np.testing.assert_array_equal(transitions.action.reshape(expected["actions"].shape), expected["actions"])
    assert data.observation_space == spaces.Box(-np.inf, np.inf, (D,), np.float32)
    assert isinstance(data.action_space, ACTIONS[actions][1])


def test_spaces_are_those_of_the_recorded_actions(tmp_path):
    low, high = arrays()["actions"].min(0), arrays()["actions"].max(0)
    assert load_transitions(saved(tmp_path)).action_space == spaces.Box(low, high)
    assert load_transitions(saved(tmp_path, kind="discrete")).action_space == spaces.Discrete(4)
    assert load_transitions(saved(tmp_path, kind="multi_discrete")).action_space == spaces.MultiDiscrete([2, 3])
    given = spaces.Box(-3, 3, (2,))
    assert load_transitions(saved(tmp_path), action_space=given).action_space is given
    observed = spaces.Box(-9, 9, (D,))
    assert load_transitions(saved(tmp_path), observation_space=observed).observation_space is observed


def test_episodes_begin_where_the_observation_is_not_the_next_one(tmp_path):
    obs = arrays()["observations"]
    np.testing.assert_array_equal(load_transitions(saved(tmp_path)).start_obs, obs[[0, 5, 9]].astype(np.float32))


def test_episodes_begin_after_the_end_of_another_though_the_observation_is_the_same(tmp_path):
    same = np.zeros((N, D))
    ends = dict(terminations=np.arange(N) == 4, truncations=(np.arange(N) == 8).astype(float))
    data = load_transitions(saved(tmp_path, observations=same, next_observations=same, **ends))
    assert len(data.start_obs) == 3
    assert data.transitions.terminated.nonzero().flatten().tolist() == [4], "a truncation is no termination"


def test_names_of_d4rl(tmp_path):
    ends = dict(terminals=np.arange(N) == 4, timeouts=np.arange(N) == 6)
    data = load_transitions(saved(tmp_path, terminations=None, **ends))
    assert data.transitions.terminated.nonzero().flatten().tolist() == [4]
    assert len(data.start_obs) == 4  # and where the observation jumps


NAN = np.where(np.arange(N) == 7, np.nan, 0)
BAD = {
    "rewards missing": (dict(rewards=None), r"lacks the arrays \['rewards'\]"),
    "terminations missing": (dict(terminations=None), r"lacks the arrays \['terminations'\]"),
    "empty": (dict(observations=np.zeros((0, D))), r"`observations` must have shape \(B, O\).*\(0, 3\)"),
    "images": (dict(observations=np.zeros((N, 4, 4))), "`observations` must have shape"),
    "next shape": (dict(next_observations=np.zeros((N, D + 1))), r"`next_observations` must have the shape.*\(12, 4\)"),
    "reward column": (dict(rewards=np.zeros((N, 1))), r"`rewards` must have shape \(12,\).*\(12, 1\)"),
    "fewer terminations": (dict(terminations=np.zeros(N - 1)), "`terminations` must have shape"),
    "fewer actions": (dict(actions=np.zeros((N - 1, 2))), "`actions` must have a row for each of the 12"),
    "nan reward": (dict(rewards=NAN), r"`rewards` has NaN or infinite numbers in 1 of 12 rows, first in row 7"),
    "nan observation": (dict(observations=np.tile(NAN[:, None], D)), "`observations` has NaN"),
    "observation beyond single precision": (
        dict(observations=np.full((N, D), 1e39)),
        "`observations` has NaN or infinite numbers in 12 of 12 rows",
    ),
    "counts beyond double precision": (
        dict(next_observations=np.full((N, D), 2**55)),
        "`next_observations` has whole numbers beyond 2..53",
    ),
    "infinite action": (dict(actions=np.full((N, 2), np.inf)), "`actions` has NaN or infinite"),
    "odd termination": (dict(terminations=np.full(N, 0.5)), "`terminations` must be True or False"),
    "text": (dict(rewards=np.full(N, "a")), "`rewards` must hold numbers"),
    "constant action": (dict(actions=np.zeros((N, 2))), "always 0.0 in column 0.*pass `action_space`"),
    "negative choice": (dict(actions=np.arange(N) - 1), "count from 0"),
    "flat floats": (dict(actions=np.linspace(0, 1, N)), r"`actions` must be \(B, A\) floats"),
}


@pytest.mark.parametrize(("changes", "match"), BAD.values(), ids=BAD)
def test_bad_data_is_refused(changes, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        load_transitions(saved(tmp_path, **changes))


@pytest.mark.parametrize(
    ("actions", "space", "match"),
    [
        ("box", spaces.Box(-1, 1, (2,)), r"of 12 `actions` are outside the action space Box\(-1.0, 1.0, \(2,\)"),
        ("box", spaces.Box(-2, 2, (3,)), "`actions` have shape"),
        ("box", spaces.MultiDiscrete([3, 3]), "`actions` must be whole numbers"),
        ("box", spaces.Box(-np.inf, np.inf, (2,)), "finite bounds"),
        ("discrete", spaces.Discrete(3), "3 of 12 `actions` are outside the action space Discrete.3., first in row 3"),
        ("discrete", spaces.Discrete(4, start=1), "count from 0"),
        ("multi_discrete", spaces.MultiDiscrete([2, 2]), "outside the action space"),
        ("multi_discrete", spaces.MultiBinary(2), "outside the action space"),
    ],
)
def test_actions_that_are_not_of_the_space_are_refused(actions, space, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        load_transitions(saved(tmp_path, kind=actions), action_space=space)


def test_an_action_on_the_bound_but_for_rounding_is_inside(tmp_path):
    bound = float(arrays()["actions"].max())
    load_transitions(saved(tmp_path), action_space=spaces.Box(-2, np.float32(bound - 1e-6), (2,)))


def test_observations_of_another_space_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not of the observation space Box\(-1.0, 1.0, \(4,\)"):
        load_transitions(saved(tmp_path), observation_space=spaces.Box(-1, 1, (4,)))


def test_other_files_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"one\.npy is not a file"):
        load_transitions(tmp_path / "one.npy")
    (tmp_path / "text.npz").write_text("observations")
    with pytest.raises(ValueError, match=r"text\.npz is not a file"):
        load_transitions(tmp_path / "text.npz")
    np.savez(tmp_path / "pickle.npz", **arrays(rewards=np.full(N, None)))
    with pytest.raises(ValueError, match="pickle"):
        load_transitions(tmp_path / "pickle.npz")
    with pytest.raises(FileNotFoundError):
        load_transitions(tmp_path / "nothing.npz")


# ---------------------------------------------------------------- Minari


def minari_dataset(observation_space=spaces.Box(-9, 9, (D,)), n_episodes=2):  # noqa: B008 - spaces are not changed
    """Make a stand-in for ``minari.MinariDataset`` as documented: an episode has one more observation than steps."""

    def episode(length, terminates):
        ends = np.arange(length) == length - 1
        return SimpleNamespace(
            observations=np.arange((length + 1) * D, dtype=float).reshape(-1, D),
            actions=np.linspace(-1, 1, 2 * length, dtype=np.float32).reshape(-1, 2),
            rewards=np.ones(length),
            terminations=ends & terminates,
            truncations=ends & (not terminates),
        )

    episodes = [episode(3, True), episode(4, False)][:n_episodes]
    return SimpleNamespace(
        observation_space=observation_space, action_space=spaces.Box(-1, 1, (2,)), iterate_episodes=lambda: iter(episodes)
    )


def test_minari_dataset():
    dataset = minari_dataset()
    data = load_minari(dataset)
    assert data.observation_space is dataset.observation_space
    assert data.action_space is dataset.action_space
    np.testing.assert_array_equal(data.transitions.next_obs - data.transitions.obs, np.full((7, D), D))
    assert data.transitions.terminated.tolist() == [False, False, True, False, False, False, False]
    np.testing.assert_array_equal(data.start_obs, np.tile(np.arange(D), (2, 1)))


def test_minari_datasets_that_are_refused():
    with pytest.raises(ValueError, match="only a Box can be modelled"):
        load_minari(minari_dataset(spaces.Dict(a=spaces.Box(-1, 1, (D,)))))
    with pytest.raises(ValueError, match="no episodes"):
        load_minari(minari_dataset(n_episodes=0))


def test_minari_by_its_id(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset=lambda name: {"a/b-v0": minari_dataset()}[name]))
    assert len(load_minari("a/b-v0").start_obs) == 2
    monkeypatch.setitem(sys.modules, "minari", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install.*minari"):
        load_minari("a/b-v0")


# ---------------------------------------------------------------- end to end, without an environment


@pytest.mark.parametrize(("actions", "algorithm"), [("box", SAC), ("multi_discrete", PPO)])
def test_an_algorithm_trains_on_a_file(actions, algorithm, tmp_path):
    data = load_transitions(saved(tmp_path, kind=actions))
    ensemble = DynamicsEnsemble(
        data.observation_space, data.action_space, 2, net_arch=[8], learned_reward=True, learned_termination=True, seed=0
    )
    ensemble.fit(data.transitions, max_epochs=2, generator=th.Generator().manual_seed(0))
    env = VecMonitor(ModelVecEnv(ensemble, data.start_obs, n_envs=2, horizon=6, seed=0))
    kwargs = dict(n_steps=16, batch_size=16) if algorithm is PPO else dict(learning_starts=16, batch_size=8)
    model = algorithm("MlpPolicy", env, policy_kwargs=dict(net_arch=[8]), seed=0, device="cpu", **kwargs).learn(64)
    assert len(model.ep_info_buffer) > 0
    assert data.action_space.contains(model.predict(data.start_obs[0])[0])
