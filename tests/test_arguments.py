"""Invalid arguments are refused before anything is built, with a message that names the argument and its value."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from tiny import SETTINGS, Drift, tiny_model, vec_drift

from sb3_mbmpo import MBMPO, DynamicsEnsemble
from sb3_mbmpo.dynamics.options import ENSEMBLE_OPTIONS, FIT_OPTIONS

INTEGERS_FROM_1 = (
    "n_steps",
    "learning_starts",
    "buffer_size",
    "n_models",
    "n_tasks",
    "n_imagined_rollouts",
    "horizon",
    "n_inner_steps",
    "cg_max_steps",
    "line_search_max_iter",
    "sub_sampling_factor",
    "chunk_size",
    "stats_window_size",
)
NUMBERS_FROM_0 = ("inner_lr", "cg_damping", "ent_coef", "gamma", "gae_lambda", "momentum", "disagreement_penalty")
FLAGS = ("learn_inner_lr", "first_order", "normalize_advantage", "stop_on_return_drop")
CHOICES = ("outer_optimizer", "baseline", "imagined_start", "exploration")

# (argument, bad value)
BAD_VALUES = [
    *[(name, value) for name in INTEGERS_FROM_1 for value in (0, 2.0)],
    *[(name, -1e-6) for name in NUMBERS_FROM_0],
    *[(name, 1) for name in FLAGS],
    *[(name, "something") for name in CHOICES],
    ("n_steps", -1),
    ("n_steps", True),
    ("n_steps", "20"),
    ("n_steps", None),
    ("n_meta_steps", -1),
    ("gamma", 1.01),
    ("momentum", 1.01),
    ("gamma", float("nan")),
    ("gamma", "0.9"),
    ("gae_lambda", float("inf")),
    ("inner_lr", None),
    ("inner_lr", [0.1]),
    ("inner_lr", True),
    ("target_kl", 0),
    ("target_kl", "1e-2"),
    ("target_kl", 2**63),
    ("line_search_shrinking_factor", 0.0),
    ("line_search_shrinking_factor", 1.5),
    ("first_order", "yes"),
    ("outer_optimizer", None),
    ("baseline", ["linear"]),
    ("learning_rate", -1e-3),
    ("learning_rate", "1e-3"),
    ("learning_rate", float("nan")),
    ("reward_fn", "known"),
    ("reward_fn", None),
    ("reward_fn", 3),
    ("termination_fn", "never"),
    ("termination_fn", False),
    ("policy", "CnnPolicy"),
    ("policy", ActorCriticPolicy),
    ("policy", None),
    ("env", 3),
    ("env", Drift),
    ("verbose", 3),
    ("verbose", "1"),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", 1.5),
    ("tensorboard_log", 3),
    ("policy_kwargs", [8]),
    ("dynamics_kwargs", [8]),
    ("outer_kwargs", 3),
]
# (entries of dynamics_kwargs, required part of the message)
BAD_DYNAMICS = [
    (dict(hidden=8), "unknown entries ['hidden']; known are"),
    (dict(n_models=3), "unknown entries ['n_models']"),
    (dict(generator=None), "unknown entries ['generator']"),
    (dict(net_arch=8), "`dynamics_kwargs['net_arch']` must be a list of layer widths, not 8"),
    (dict(net_arch="8"), "not '8'"),
    (dict(net_arch=[8, 0]), "at least 1, not 0"),
    (dict(net_arch=[8.5]), "not 8.5"),
    (dict(activation_fn="sine"), "['elu', 'gelu', 'relu', 'silu', 'swish', 'tanh'], not 'sine'"),
    (dict(activation_fn=th.nn.ReLU), "`dynamics_kwargs['activation_fn']`"),
    (dict(precision="float16"), "['auto', 'bfloat16', 'float32'], not 'float16'"),
    (dict(max_epochs=0), "`dynamics_kwargs['max_epochs']` must be an integer of at least 1, not 0"),
    (dict(max_gradient_steps=0), "`dynamics_kwargs['max_gradient_steps']` must be an integer of at least 1, not 0"),
    (dict(batch_size=0), "`dynamics_kwargs['batch_size']`"),
    (dict(reinit_every=-1), "`dynamics_kwargs['reinit_every']`"),
    (dict(validation_fraction=1.0), "at least 0 and at most 0.9, not 1.0"),
    (dict(validation_fraction=-0.1), "`dynamics_kwargs['validation_fraction']`"),
    (dict(rolling_average_persistency=1.1), "`dynamics_kwargs['rolling_average_persistency']`"),
    (dict(weight_decay=-1), "`dynamics_kwargs['weight_decay']`"),
    (dict(clip_margin=-0.1), "`dynamics_kwargs['clip_margin']`"),
    (dict(clip_margin="wide"), "not 'wide'"),
    (dict(weight_norm=1), "`dynamics_kwargs['weight_norm']` must be True or False, not 1"),
    (dict(probabilistic="no"), "`dynamics_kwargs['probabilistic']`"),
]
# (arguments that contradict one another, required part of the message)
BAD_COMBINATIONS = [
    (dict(n_tasks=5, n_models=2), "5 tasks cannot be divided evenly among 2 models"),
    (dict(n_tasks=2, n_models=4), "2 tasks cannot be divided evenly among 4 models"),
    (dict(buffer_size=10, learning_starts=11), "`buffer_size` (10) must hold at least the `learning_starts` (11)"),
    (dict(outer_kwargs=dict(n_epochs=3)), "would have no effect"),
    (dict(outer_optimizer="ppo", outer_kwargs=dict(target_kl=1)), "unknown entries ['target_kl']"),
    (dict(outer_optimizer="ppo", outer_kwargs=dict(n_epochs=0)), "`outer_kwargs['n_epochs']`"),
    (dict(outer_optimizer="ppo", outer_kwargs=dict(learning_rate=0)), "`outer_kwargs['learning_rate']`"),
    (dict(outer_optimizer="ppo", outer_kwargs=dict(clip_range=-0.2)), "`outer_kwargs['clip_range']`"),
    (dict(reward_fn="no.such.module:reward"), "no.such.module"),
    (dict(reward_fn="math:no_such_function"), "no_such_function"),
    (dict(reward_fn="math:pi"), "not a function"),
    (dict(policy_kwargs=dict(use_sde=True)), "gSDE"),
    (dict(policy_kwargs=dict(net_arch=dict(pi=[4], v=[4]))), "`policy_kwargs['net_arch']` has unknown entries ['v']"),
    (dict(policy_kwargs=dict(net_arch=dict(vf=8))), "`policy_kwargs['net_arch']` must be a list of layer widths, not 8"),
    (dict(policy_kwargs=dict(optimizer_class=th.optim.LBFGS)), "`policy_kwargs['optimizer_class']`"),
    (dict(policy_kwargs=dict(optimizer_kwargs=dict(betas=(0.9, 2)))), "`policy_kwargs['optimizer_kwargs']`"),
    (dict(policy_kwargs=dict(squash_output=True)), "gSDE"),
]


def box(shape=(2,), low=-1.0, high=1.0, dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


# (observation space, action space, required part of the message): the wrapper that helps, if there is one
BAD_SPACES = {
    "image": (box((16, 16, 3), 0, 255, np.uint8), box(), "FlattenObservation"),
    "matrix": (box((2, 2)), box(), "FlattenObservation"),
    "scalar": (box(()), box(), "FlattenObservation"),
    "dict": (spaces.Dict(x=box()), box(), "FlattenObservation"),
    "nested dict": (spaces.Dict(x=spaces.Dict(y=box())), box(), "FlattenObservation"),
    "tuple": (spaces.Tuple([box()]), box(), "FlattenObservation"),
    "discrete observation": (spaces.Discrete(3), box(), "FlattenObservation"),
    "text": (spaces.Text(3), box(), "FlattenObservation"),
    "unbounded action": (box(), box(high=np.inf), "TransformAction"),
    "dict action": (box(), spaces.Dict(x=box()), "gymnasium.ActionWrapper"),
    "tuple action": (box(), spaces.Tuple([box(), box()]), "gymnasium.ActionWrapper"),
    "shifted discrete": (box(), spaces.Discrete(3, start=1), "gymnasium.ActionWrapper"),
    "matrix of choices": (box(), spaces.MultiDiscrete([[2, 2], [2, 2]]), "flatten it"),
    "matrix of bits": (box(), spaces.MultiBinary([2, 2]), "flatten it"),
}


class Spaces(gym.Env):
    """An environment that has only spaces; none of its methods may be called."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


def refused(match, **arguments):
    with pytest.raises(ValueError, match=match):
        MBMPO(**{"policy": "MlpPolicy", "env": Drift(), **SETTINGS, **arguments})


def test_at_least_sixty_distinct_inputs():
    inputs = [*map(repr, BAD_VALUES + BAD_DYNAMICS + BAD_COMBINATIONS), *BAD_SPACES]
    assert len(set(inputs)) == len(inputs) >= 60


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=[f"{name}={value!r:.30}" for name, value in BAD_VALUES])
def test_bad_value(name, value):
    refused(rf"`?{name}`? must be .*{re.escape(repr(value))}", **{name: value})


@pytest.mark.parametrize(("kwargs", "match"), BAD_DYNAMICS, ids=lambda x: repr(x) if isinstance(x, dict) else "")
def test_bad_dynamics_kwargs(kwargs, match):
    refused(re.escape(match), dynamics_kwargs=kwargs)


@pytest.mark.parametrize(("arguments", "match"), BAD_COMBINATIONS, ids=lambda x: repr(x) if isinstance(x, dict) else "")
def test_bad_combination(arguments, match):
    refused(re.escape(match), **arguments)


@pytest.mark.parametrize(("observation_space", "action_space", "match"), BAD_SPACES.values(), ids=BAD_SPACES)
def test_bad_spaces_name_what_helps(observation_space, action_space, match):
    refused(match, env=Spaces(observation_space, action_space))


def test_no_environment_no_networks():
    refused("`env` must be an environment", env=None)
    with pytest.raises(gym.error.NameNotFound, match="NoSuchEnv"):
        MBMPO("MlpPolicy", "NoSuchEnv-v0")


def test_nothing_is_built_for_bad_arguments(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("built")

    monkeypatch.setattr("sb3_mbmpo.mbmpo.DynamicsEnsemble", fail)
    monkeypatch.setattr("sb3_mbmpo.mbmpo.MBMPO._setup_lr_schedule", fail)  # SB3 calls this first
    refused("`horizon`", horizon=0)
    with pytest.raises(AssertionError, match="built"):
        tiny_model()


def test_checks_wait_for_the_set_up_of_the_model():
    model = tiny_model(_init_setup_model=False, horizon=0)
    model.horizon = 4
    model._setup_model()
    model.learn(20)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(n_models=0),
        dict(net_arch=[0]),
        dict(activation_fn="sine"),
        dict(precision="float16"),
        dict(observation_space=box((2, 2))),
        dict(action_space=box(high=np.inf)),
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_ensemble_refuses_for_itself(arguments):
    with pytest.raises(ValueError, match="must"):
        DynamicsEnsemble(**{"observation_space": box(), "action_space": box(), **arguments})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(n_envs=0), "`n_envs`"),
        (dict(model_index=2), "`model_index`.*at most 1, not 2"),
        (dict(horizon=0), "`horizon`"),
        (dict(resample_model="never"), "`resample_model`"),
        (dict(seed=-1), "`seed`"),
    ],
)
def test_imagined_env_refuses(arguments, match):
    model = tiny_model(vec_drift()).learn(20)
    with pytest.raises(ValueError, match=match):
        model.imagined_env(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        *[(dict(total_timesteps=steps), "`total_timesteps`") for steps in (-1, None, "5", float("nan"), True)],
        *[(dict(total_timesteps=40, log_interval=interval), "`log_interval`") for interval in (0, -1, 2.5, "1")],
    ],
)
def test_learn_refuses_before_any_step(arguments, match):
    model = tiny_model()
    with pytest.raises(ValueError, match=match):
        model.learn(**arguments)
    assert model.num_timesteps == 0
    model.learn(20.0, log_interval=np.int64(1))


def test_every_known_option_of_the_dynamics_is_accepted():
    values = dict(
        net_arch=(8,),
        activation_fn="tanh",
        weight_norm=True,
        probabilistic=True,
        weight_decay=0.1,
        precision="bfloat16",
        max_epochs=1,
        max_gradient_steps=3,
        batch_size=7,
        validation_fraction=0.0,
        rolling_average_persistency=0.5,
    )
    assert set(values) == ENSEMBLE_OPTIONS | FIT_OPTIONS
    model = tiny_model(dynamics_kwargs=dict(**values, reinit_every=2, clip_margin=0, output_bias=0.1, output_noise=0.1)).learn(
        20
    )
    assert all(
        getattr(model.dynamics, name) == value for name, value in values.items() if name in ("weight_norm", "weight_decay")
    )
