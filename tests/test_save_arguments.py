"""What a model's file can hold, and what `load` can change: NumPy's numbers, objects without pickles, seeds, arguments."""

import json
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from tiny import Drift, assert_same, parameters, tiny_model

from sb3_mbmpo import MBMPO, DynamicsEnsemble, MlpPolicy
from sb3_mbmpo.common.save_util import plain
from sb3_mbmpo.common.space_files import space_from_dict, space_to_dict


def test_folders_of_the_name_are_not_in_the_way(model, tmp_path):
    (tmp_path / "plain").mkdir()
    for save, load, suffix in (
        (model.save, MBMPO.load, "zip"),
        (model.dynamics.save, DynamicsEnsemble.load, "zip"),
        (model.save, tiny_model(learn_inner_lr=True).set_parameters, "zip"),
        (model.save_replay_buffer, tiny_model().load_replay_buffer, "pkl"),
    ):
        save(tmp_path / "plain")
        assert (tmp_path / f"plain.{suffix}").is_file()
        load(tmp_path / "plain")
        load(str(tmp_path / "plain"))


def test_numbers_of_numpy_in_arguments_make_files_that_load(tmp_path):
    model = tiny_model(
        learning_rate=lambda progress: np.float64(1e-3) * np.float32(progress),
        inner_lr=np.float32(0.1),
        seed=np.int64(3),
        horizon=np.int32(4),
        stats_window_size=np.int64(5),
        learn_inner_lr=np.bool_(True),
        dynamics_kwargs=dict(net_arch=[np.int64(8)], weight_decay=np.float64(1e-4), max_epochs=np.int64(2)),
        policy_kwargs=dict(net_arch=[np.int64(8)], log_std_init=np.float64(-0.5)),
    ).learn(20)
    model.save(tmp_path / "model")
    model.dynamics.optimizer.param_groups[0]["lr"] = np.float64(0.5)
    model.save(tmp_path / "changed")
    for name in ("model", "changed"):
        loaded = MBMPO.load(tmp_path / name)
        assert_same(parameters(loaded), parameters(model))
        assert (type(loaded.seed), type(loaded.inner_lr), loaded.learn_inner_lr) == (int, float, True)
        assert loaded.dynamics.weight_decay == 1e-4
    model.policy.save(tmp_path / "policy")
    MlpPolicy.load(tmp_path / "policy")
    numbers = dict(
        learning_rate=np.float64(1e-3), weight_decay=np.float32(0.1), net_arch=np.array([3, 4]), n_models=np.int8(2)
    )
    flags = dict.fromkeys(("weight_norm", "probabilistic", "learned_reward", "learned_termination"), np.bool_(True))
    ensemble = DynamicsEnsemble(Drift().observation_space, Drift().action_space, **numbers, **flags, seed=np.int64(0))
    ensemble.optimizer.param_groups[0]["lr"] = np.float64(0.5)
    ensemble.save(tmp_path / "ensemble")
    loaded = DynamicsEnsemble.load(tmp_path / "ensemble")
    assert_same(loaded.state_dict(), ensemble.state_dict())
    assert loaded.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", ["reward_fn", "termination_fn", "learning_rate", "mine"])
def test_what_cannot_be_pickled_costs_no_model(name, tmp_path):
    lock = threading.Lock()
    functions = {
        "reward_fn": lambda obs, action, next_obs: -next_obs.square().sum(1) * (not lock.locked()),
        "termination_fn": lambda next_obs: next_obs.abs().amax(1) > 2 + lock.locked(),
        "learning_rate": lambda progress: 1e-3 * (not lock.locked()),
    }
    given = {name: functions[name]} if name in functions else {}
    model = tiny_model(**given).learn(20)
    model.mine = lock if name == "mine" else None
    with pytest.warns(UserWarning, match=rf"the_model lacks \['{name}'.*cannot pickle.*to `load` again"):
        model.save(tmp_path / "the_model")
    loaded = MBMPO.load(tmp_path / "the_model", env=Drift(), **given)
    assert_same(parameters(loaded), parameters(model))
    loaded.learn(20)
    model.save(tmp_path / "excluded", exclude=[name, "lr_schedule"])


def test_numbers_of_numpy_in_other_dictionaries_are_converted_too(tmp_path):
    dynamics_kwargs = OrderedDict(net_arch=(np.int64(8),), probabilistic=np.bool_(False), max_epochs=np.int64(2))
    policy_kwargs = OrderedDict(net_arch=[8], optimizer_kwargs=OrderedDict(eps=np.float64(1e-5)))
    model = tiny_model(dynamics_kwargs=dynamics_kwargs, policy_kwargs=policy_kwargs).learn(20)
    model.save(tmp_path / "model")
    loaded = MBMPO.load(tmp_path / "model")
    assert_same(parameters(loaded), parameters(model))
    assert type(loaded.policy.optimizer.defaults["eps"]) is float
    state = model.policy.state_dict()
    assert plain(state) is state


def test_a_seed_begins_new_random_numbers_and_none_goes_on(model, tmp_path):
    model.save(tmp_path / "model")

    def trained(**kwargs):
        loaded = MBMPO.load(tmp_path / "model", env=DummyVecEnv([lambda: Drift(random_start=False)]), **kwargs)
        return parameters(loaded.learn(20))

    one, again, as_object, two, goes_on, none = (
        trained(**kwargs)
        for kwargs in ({"seed": 1}, {"seed": 1}, {"custom_objects": {"seed": 1}}, {"seed": 2}, {}, {"seed": None})
    )
    assert_same(one, again)
    assert_same(one, as_object)
    assert_same(goes_on, none)
    for other in (two, goes_on):
        assert not th.equal(one["policy.action_net.weight"], other["policy.action_net.weight"])


@pytest.mark.parametrize("how", [dict(learn_inner_lr=False), dict(custom_objects=dict(learn_inner_lr=False))], ids=str)
def test_step_sizes_that_were_learned_can_be_left_behind(how, model, tmp_path):
    model.save(tmp_path / "model")
    loaded = MBMPO.load(tmp_path / "model", env=Drift(), inner_lr=0.2, **how)
    assert loaded.learned_inner_lr is None
    loaded.learn(20).save(tmp_path / "fixed")
    learns = MBMPO.load(tmp_path / "fixed", env=Drift(), learn_inner_lr=True)
    assert th.equal(learns.learned_inner_lr, th.full_like(learns.learned_inner_lr, 0.2))
    learns.learn(20)


@pytest.mark.parametrize("env", [None, Drift()])
@pytest.mark.parametrize(
    "changed",
    [dict(n_models=1), dict(n_models=1, n_tasks=1), dict(dynamics_kwargs=dict(net_arch=[9])), dict(dynamics_kwargs={})],
)
def test_arguments_that_the_file_does_not_fit_are_named(changed, env, model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"model does not fit the arguments .*{next(iter(changed))}"):
        MBMPO.load(tmp_path / "model", env, **changed)


def test_a_file_that_does_not_fit_the_model_is_named(model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model does not fit this model: .*\n.*size mismatch"):
        tiny_model(policy_kwargs=dict(net_arch=[9])).set_parameters(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "meant"), [("horzion", "'horizon'"), ("n_meta_step", "'n_meta_steps'"), ("custom_object", ""), ("_xyz", "")]
)
def test_names_that_mean_nothing_are_refused(name, meant, model, tmp_path):
    model.save(tmp_path / "model")
    with pytest.raises(TypeError, match=rf"load\(\) has no argument '{name}'.*{meant}"):
        MBMPO.load(tmp_path / "model", **{name: 3})
    # SB3 and rl_zoo3 pass these to any algorithm
    kwargs = dict(horizon=3, learning_rate=1e-4, action_noise=None, n_envs=1, tensorboard_log=None)
    loaded = MBMPO.load(tmp_path / "model", custom_objects=dict(lr_schedule=lambda _: 0.0, clip_range=0.1), **kwargs)
    assert loaded.horizon == 3


def test_going_on_without_the_real_steps_is_warned_of(model, tmp_path):
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = MBMPO.load(tmp_path / "model", env=Drift())
    with pytest.warns(UserWarning, match="replay buffer is empty.*load_replay_buffer"):
        loaded.learn(20, reset_num_timesteps=False)
    loaded = MBMPO.load(tmp_path / "model", env=Drift())
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(20, reset_num_timesteps=False)


class SaveBetween(BaseCallback):
    """A callback that saves the model between two iterations."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def _on_rollout_start(self):
        self.model.save(self.path)

    def _on_step(self):
        return True


def test_what_a_callback_saves_when_a_rollout_starts_is_the_state_between_two_iterations(tmp_path):
    model = tiny_model(n_tasks=4).learn(40)
    turn, acting = model._task_turn, model._acting_tasks.copy()
    model.learn(20, callback=SaveBetween(tmp_path / "between"), reset_num_timesteps=False)
    between = MBMPO.load(tmp_path / "between")
    assert (between.num_timesteps, between._task_turn) == (40, turn)
    np.testing.assert_array_equal(between._acting_tasks, acting)
    assert model._task_turn != turn


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (3,), np.float32),
        spaces.Box(np.array([-1.0, 0.1]), np.array([1 / 3, 7.0]), dtype=np.float64),
        spaces.Discrete(4),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
    ],
    ids=str,
)
def test_spaces_come_back_from_json(space):
    back = space_from_dict(json.loads(json.dumps(space_to_dict(space))))
    assert back == space
    assert back.dtype == space.dtype
