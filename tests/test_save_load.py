"""Saving and loading the model, its policy, its replay buffer and its ensemble."""

import base64
import io
import json
import zipfile

import cloudpickle
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.save_util import load_from_zip_file
from tiny import ACTION_SPACES, SETTINGS, Drift, Unknown, assert_same, parameters, tiny_model, vec_drift

import sb3_mbmpo
from sb3_mbmpo import MBMPO, DynamicsEnsemble, MlpPolicy
from sb3_mbmpo.dynamics import Transitions

OBS = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)


def greedy(model):
    return model.predict(OBS, deterministic=True)[0]


@pytest.fixture(scope="module")
def model():
    """Return a trained model, which tests must not change."""
    return tiny_model().learn(40)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.zip"
    model.save(path)
    return path


def edited(path, target, **changes):
    """Copy a file with changed attributes (None: removed)."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "data":
                content = json.dumps({k: v for k, v in {**json.loads(content), **changes}.items() if v is not None})
            new.writestr(name, content)
    return target


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
@pytest.mark.parametrize("env_class", [Drift, Unknown])
def test_loaded_model_predicts_the_same(action_space, env_class, tmp_path):
    model = tiny_model(env_class(action_space), learn_inner_lr=True).learn(20)
    model.save(tmp_path / "model")
    loaded = MBMPO.load(tmp_path / "model")
    np.testing.assert_array_equal(greedy(loaded), greedy(model))
    assert_same(parameters(loaded), parameters(model))
    assert th.equal(loaded.learned_inner_lr, model.learned_inner_lr)
    assert loaded.env is None
    actions = np.stack([action_space.sample() for _ in OBS])
    np.testing.assert_array_equal(loaded.dynamics.predict(OBS, actions), model.dynamics.predict(OBS, actions))


@pytest.mark.parametrize("how", ["str", "path", "suffix", "bytes", "file"])
def test_every_kind_of_path(how, model, tmp_path):
    if how == "bytes":
        file = io.BytesIO()
        model.save(file)
        file.seek(0)
        loaded = MBMPO.load(file)
    elif how == "file":
        with (tmp_path / "model.zip").open("wb") as file:
            model.save(file)
        with (tmp_path / "model.zip").open("rb") as file:
            loaded = MBMPO.load(file)
    else:
        path = tmp_path / ("model.zip" if how == "suffix" else "model")
        model.save(str(path) if how == "str" else path)
        loaded = MBMPO.load(str(path) if how == "str" else path)
    np.testing.assert_array_equal(greedy(loaded), greedy(model))


def test_exclude_include_and_what_is_never_in_the_file(model, tmp_path):
    everything = ("env", "replay_buffer", "_generators", "_functions", "_logger", "policy", "dynamics")
    model.save(tmp_path / "plain", exclude=["horizon"])
    data, parameters_, variables = load_from_zip_file(tmp_path / "plain")
    assert not set(data) & {"horizon", *everything}
    assert set(parameters_) == {"policy", "policy.optimizer", "dynamics", "dynamics.optimizer"}
    assert set(variables) == {"learned_inner_lr", "_adapted"}
    assert MBMPO.load(tmp_path / "plain").horizon == 25, "the constructor's default"
    model.save(tmp_path / "full", include=["replay_buffer"])
    loaded = MBMPO.load(tmp_path / "full")
    np.testing.assert_array_equal(loaded.replay_buffer.observations, model.replay_buffer.observations)


def test_load_changes_arguments_and_checks_them(saved):
    assert MBMPO.load(saved, horizon=7, inner_lr=0.3).horizon == 7
    with pytest.raises(ValueError, match="`horizon` must be an integer of at least 1, not 0"):
        MBMPO.load(saved, horizon=0)
    with pytest.raises(ValueError, match="policy kwargs"):
        MBMPO.load(saved, policy_kwargs=dict(net_arch=[9]))


def test_more_tasks_after_loading(saved):
    loaded = MBMPO.load(saved, env=Drift(), n_tasks=6)
    loaded.learn(20)
    assert len(loaded._adapted) == 6


def test_custom_objects_replace_what_does_not_unpickle(saved, tmp_path):
    class Gone:
        def __reduce__(self):
            return (__import__, ("no_such_module",))

    broken = {":type:": "function", ":serialized:": base64.b64encode(cloudpickle.dumps(Gone())).decode()}
    path = edited(saved, tmp_path / "broken.zip", reward_fn=broken)
    with pytest.raises(ModuleNotFoundError):
        MBMPO.load(path)
    loaded = MBMPO.load(path, env=Drift(), custom_objects=dict(reward_fn=lambda o, a, n: n[:, 0] * 0 + 3))
    env = loaded.imagined_env(n_envs=2)
    env.reset()
    assert env.step(np.zeros((2, 2)))[1].tolist() == [3, 3]


def test_functions_travel_with_the_file(tmp_path):
    offset = 5.0
    model = tiny_model(Unknown(), reward_fn=lambda o, a, n: n[:, 0] * 0 + offset, termination_fn=None)
    with pytest.warns(UserWarning, match="misses"):
        model.learn(20)
    model.save(tmp_path / "model")
    env = MBMPO.load(tmp_path / "model").imagined_env(n_envs=2)
    env.reset()
    assert env.step(np.zeros((2, 2)))[1].tolist() == [offset, offset]


def test_the_environments_own_functions_come_with_the_environment(saved):
    loaded = MBMPO.load(saved)
    for needs_them in (lambda: loaded.adapt(model_index=0), loaded.imagined_env):
        with pytest.raises(ValueError, match=r"No reward function is known.*load\(path, env=env\)"):
            needs_them()
    loaded.set_env(Drift())
    loaded.adapt(model_index=0)
    loaded.learn(20)


def test_learning_where_nothing_says_what_is_paid_is_refused(saved):
    with pytest.raises(ValueError, match="No reward function is known"):
        MBMPO.load(saved, env=Unknown()).learn(20)


@pytest.mark.parametrize(
    ("env", "match"),
    [(Drift(size=3), "Observation spaces do not match"), (Drift(ACTION_SPACES["discrete"]), "Action spaces do not match")],
)
def test_other_spaces_are_refused(env, match, saved):
    with pytest.raises(ValueError, match=match):
        MBMPO.load(saved, env=env)
    with pytest.raises(ValueError, match=match):
        MBMPO.load(saved).set_env(env)


def test_set_env_wants_as_many_environments_and_load_does_not(saved):
    with pytest.raises(AssertionError, match="number of environments"):
        MBMPO.load(saved).set_env(vec_drift(2))
    loaded = MBMPO.load(saved, env=vec_drift(3)).learn(60)
    assert loaded.replay_buffer.size() == 20


# ---------------------------------------------------------------- parameters


def test_parameters_round_trip():
    one, other = tiny_model(seed=1).learn(20), tiny_model(seed=2).learn(20)
    other.set_parameters(one.get_parameters())
    assert_same(parameters(other), parameters(one))
    np.testing.assert_array_equal(greedy(other), greedy(one))
    assert other._adapted.eq(other.policy.actor_vector()).all(), "policies adapted from other parameters must not act"


def test_parameters_must_match_exactly_unless_told_otherwise(model):
    policy_only = {"policy": model.get_parameters()["policy"]}
    other = tiny_model(seed=3)
    with pytest.raises(ValueError, match="do not match"):
        other.set_parameters(policy_only)
    other.set_parameters(policy_only, exact_match=False)
    np.testing.assert_array_equal(greedy(other), greedy(model))
    with pytest.raises(ValueError, match="invalid object name"):
        other.set_parameters({"critic": {}})
    del policy_only["policy"]["log_std"]
    with pytest.raises(RuntimeError, match="log_std"):
        other.set_parameters(policy_only)


def test_set_parameters_from_a_file(saved, model):
    other = tiny_model(seed=3)
    other.set_parameters(saved)
    assert_same(parameters(other), parameters(model))


# ---------------------------------------------------------------- versions


def test_file_says_where_it_is_from(saved):
    data, _, _ = load_from_zip_file(saved)
    assert data["package_version"] == sb3_mbmpo.__version__


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            dict(file_format=0, package_version="0.0.7"),
            "saved by sb3_mbmpo 0.0.7 in file format 0.*with the version that saved",
        ),
        (dict(file_format=999, package_version="9.1"), "saved by sb3_mbmpo 9.1 in file format 999"),
        (dict(file_kind=None, file_format=None, package_version=None), "holds no algorithm of sb3_mbmpo"),
    ],
    ids=["older", "newer", "no stamp"],
)
def test_incompatible_files_are_refused(changes, match, saved, tmp_path):
    # Attributes that could no longer be unpickled are not read
    gone = {":type:": "x", ":serialized:": "not base64"}
    path = edited(saved, tmp_path / "edited.zip", lr_schedule=gone, **changes)
    with pytest.raises(ValueError, match=match):
        MBMPO.load(path)


def test_other_files_are_refused(saved, tmp_path):
    PPO("MlpPolicy", "Pendulum-v1", n_steps=8, batch_size=8, device="cpu").save(tmp_path / "ppo")
    with pytest.raises(ValueError, match="holds no algorithm of sb3_mbmpo"):
        MBMPO.load(tmp_path / "ppo")
    with pytest.raises(ValueError, match="holds no ensemble of sb3_mbmpo"):
        DynamicsEnsemble.load(saved)
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(ValueError, match="not a zip file"):
        MBMPO.load(tmp_path / "text.zip")
    with pytest.raises(FileNotFoundError):
        MBMPO.load(tmp_path / "missing")


# ---------------------------------------------------------------- replay buffer


@pytest.mark.parametrize("in_memory", [False, True])
def test_replay_buffer_round_trip(in_memory, model, saved, tmp_path):
    target = io.BytesIO() if in_memory else tmp_path / "buffer"
    model.save_replay_buffer(target)
    if in_memory:
        target.seek(0)
    loaded = MBMPO.load(saved, env=Drift())
    assert loaded.replay_buffer.size() == 0
    loaded.load_replay_buffer(target)
    assert loaded.replay_buffer.size() == 40
    for name in ("observations", "actions", "next_observations", "rewards", "dones", "timeouts"):
        np.testing.assert_array_equal(getattr(loaded.replay_buffer, name), getattr(model.replay_buffer, name))


@pytest.mark.parametrize("n_envs", [1, 2, 4, 5])
@pytest.mark.parametrize("capacity", [1000, 24], ids=["part", "full"])
def test_replay_buffer_of_another_number_of_environments(n_envs, capacity, tmp_path):
    """Only the oldest rows are lost, as many as do not make a full step of all environments."""
    before = tiny_model(vec_drift(3), buffer_size=capacity, learning_starts=24).learn(42)
    before.save(tmp_path / "model")
    before.save_replay_buffer(tmp_path / "buffer")
    loaded = MBMPO.load(tmp_path / "model", env=vec_drift(n_envs))
    loaded.load_replay_buffer(tmp_path / "buffer")

    def rows(model):
        buffer = model.replay_buffer
        order = (np.arange(buffer.size()) + buffer.pos * buffer.full) % buffer.buffer_size
        columns = (
            buffer.observations,
            buffer.actions,
            buffer.next_observations,
            buffer.rewards,
            buffer.dones,
            buffer.timeouts,
        )
        return np.concatenate([c[order].reshape(len(order) * model.n_envs, -1) for c in columns], axis=1)

    expected = min(rows(before).shape[0], capacity) // n_envs * n_envs
    np.testing.assert_array_equal(rows(loaded), rows(before)[-expected:])
    loaded.learn(20, reset_num_timesteps=False)


def test_replay_buffer_of_another_task_is_refused(model, tmp_path):
    model.save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="another task: its observation_space"):
        tiny_model(Drift(size=3)).load_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="another task: its action_space"):
        tiny_model(Drift(ACTION_SPACES["discrete"])).load_replay_buffer(tmp_path / "buffer")


# ---------------------------------------------------------------- policy and ensemble on their own


def test_policy_alone(model, tmp_path):
    model.policy.save(tmp_path / "policy")
    policy = MlpPolicy.load(tmp_path / "policy", device="cpu")
    np.testing.assert_array_equal(greedy(policy), greedy(model))
    returns = [evaluate_policy(each, vec_drift(random_start=False), n_eval_episodes=1)[0] for each in (policy, model)]
    assert returns[0] == returns[1]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(
            net_arch=[5, 4], weight_norm=True, probabilistic=True, learned_reward=True, activation_fn="tanh", weight_decay=0.1
        ),
    ],
    ids=["default", "all"],
)
@pytest.mark.parametrize("action_space", [ACTION_SPACES["box"], ACTION_SPACES["multi_discrete"]])
def test_ensemble_alone(arguments, action_space, in_memory, tmp_path):
    observation_space = Drift().observation_space
    ensemble = DynamicsEnsemble(observation_space, action_space, **{"n_models": 2, "net_arch": [6], "seed": 0, **arguments})
    actions = np.stack([action_space.sample() for _ in OBS])
    data = Transitions(
        th.as_tensor(OBS),
        ensemble.codec.from_numpy(actions, th.device("cpu")),
        th.as_tensor(OBS[::-1].copy()),
        th.ones(6),
        th.zeros(6),
    )
    ensemble.fit(data, max_epochs=3, generator=th.Generator().manual_seed(0))
    target = io.BytesIO() if in_memory else tmp_path / "ensemble"
    ensemble.save(target)
    if in_memory:
        target.seek(0)
    loaded = DynamicsEnsemble.load(target, device="cpu")
    np.testing.assert_array_equal(loaded.predict(OBS, actions), ensemble.predict(OBS, actions))
    np.testing.assert_array_equal(loaded.disagreement(OBS, actions), ensemble.disagreement(OBS, actions))
    # The statistics and the optimiser, too: both continue identically
    for each in (ensemble, loaded):
        each.fit(data, max_epochs=3, generator=th.Generator().manual_seed(1))
    assert_same(loaded.state_dict(), ensemble.state_dict())


def test_ensemble_of_a_model_alone(model, tmp_path):
    model.dynamics.save(tmp_path / "ensemble.zip")
    loaded = DynamicsEnsemble.load(tmp_path / "ensemble.zip")
    assert_same(loaded.state_dict(), model.dynamics.state_dict())
    assert (loaded.net_arch, loaded.n_models) == (SETTINGS["dynamics_kwargs"]["net_arch"], 2)
    edited(tmp_path / "ensemble.zip", tmp_path / "old.zip", file_format=0)
    with pytest.raises(ValueError, match="file format 0"):
        DynamicsEnsemble.load(tmp_path / "old.zip")
