"""Random arguments of the constructor: each is refused by name, or the model trains with it."""

import random
import re

import numpy as np
import pytest
import torch as th
from tiny import SETTINGS, Drift

from sb3_mbmpo import MBMPO
from sb3_mbmpo.memory import check_memory, machine_memory

NUMBERS = [0, 1, 2, 3, -1, -0.5, 0.0, 0.5, 1.0, 1e-30, 1e30, 1e300, 10**15, 2**63, 10**400, float("nan"), float("inf"), True]
OTHERS = [None, "", "auto", "linear", "3", [], [1], {}, (2, 2), b"x", 1j, object(), print, int, th.nn.Tanh, th.tensor(1.0)]
SIZES = [0, 1, 2, 10**9, 10**15, -1, 2.0, "8", None, True, [8], np.int64(2)]
ACTIVATIONS = ["tanh", "relu", ["tanh"], th.nn.Tanh, th.nn.ReLU(), None, {}, 3, th.nn.functional.relu]
VALUE_ARCHS = [dict(pi=[4], vf=[np.int64(3), 5]), dict(vf=[10**15]), dict(vf="8"), dict(vf=[]), dict(pi=[4], v=[4]), {3: [4]}]
KWARGS = {
    "dynamics_kwargs": {
        "net_arch": [[], [4], [4, 10**15], "8", 8, [0], [True], {}, None],
        "activation_fn": ACTIVATIONS,
        "weight_norm": [True, 0, None],
        "probabilistic": [True, "no", []],
        "weight_decay": NUMBERS,
        "precision": ["auto", "bfloat16", "double", None, []],
        "max_epochs": [1, 2, 0, 1.5, None],
        "max_gradient_steps": SIZES,
        "batch_size": SIZES,
        "validation_fraction": NUMBERS,
        "rolling_average_persistency": NUMBERS,
        "reinit_every": SIZES,
        "clip_margin": [*NUMBERS, None],
        "output_bias": NUMBERS,
        "output_noise": NUMBERS,
        3: [3],
        "nonsense": [3],
    },
    "policy_kwargs": {
        "net_arch": [[], [4], [10**15], "8", dict(pi=[4]), dict(pi=[0]), dict(pi=4), None, [True], *VALUE_ARCHS],
        "activation_fn": ACTIVATIONS,
        "log_std_init": [*NUMBERS, 100.0, -1e6, 1e6, None],
        "log_std_min": [*NUMBERS, None],
        "normalize_observation": [True, False, 3, None],
        "ortho_init": [True, False, "x"],
        "share_features_extractor": [True, False, None],
        "optimizer_class": [th.optim.SGD, "Adam", None, th.nn.Tanh, th.optim.LBFGS, th.optim.SparseAdam],
        "optimizer_kwargs": [{}, dict(eps=1e-5), dict(nonsense=1), 3, None, dict(betas=(0.9, 2)), dict(lr=1)],
        "features_extractor_class": [th.nn.Tanh, None, "x"],
        "features_extractor_kwargs": [{}, dict(nonsense=1), 3],
        "use_sde": [True, False],
        "squash_output": [True, False],
        "nonsense": [3],
    },
    "outer_kwargs": {
        "learning_rate": NUMBERS,
        "n_epochs": [1, 0, 2.0, None],
        "clip_range": NUMBERS,
        "nonsense": [3],
    },
}
COUNTS = [0, 1, 2, -1, 2.0, None, "3", np.int64(2)]
FLAGS = [True, False, 1, "yes"]
SIZE_NAMES = [
    *("learning_starts", "buffer_size", "n_models", "n_tasks", "n_imagined_rollouts", "horizon"),
    *("n_steps", "n_inner_steps", "sub_sampling_factor", "chunk_size", "stats_window_size"),
]
VALUES = {
    **dict.fromkeys(SIZE_NAMES, SIZES),
    **dict.fromkeys(["n_meta_steps", "cg_max_steps", "line_search_max_iter"], COUNTS),
    "n_critic_updates": [*COUNTS, 10**12],
    "batch_size": SIZES,
    "recent_starts": [*NUMBERS, np.float32(0.25)],
    **dict.fromkeys(["inner_lr", "target_kl", "momentum", "cg_damping", "ent_coef", "gamma", "gae_lambda"], NUMBERS),
    "disagreement_penalty": NUMBERS,
    "line_search_shrinking_factor": NUMBERS,
    "learning_rate": [*NUMBERS, lambda progress: progress, lambda progress: None, lambda: 3, lambda progress: -1.0],
    **dict.fromkeys(["learn_inner_lr", "first_order", "normalize_advantage", "stop_on_return_drop"], FLAGS),
    "outer_optimizer": ["ppo", "sgd", ["trpo"], {}],
    "baseline": ["critic", "zero", "fourier", ["linear"], {}],
    "imagined_start": ["buffer", "x", []],
    "exploration": ["meta", "x", {}],
    "reward_fn": ["learned", "x", "math:pi", ":", []],
    "termination_fn": ["learned", "x", "math:pi", ":", []],
    "verbose": [0, 3, "1", None],
    "seed": [0, 2**32 - 1, 2**32, -1, 1.5, "1", None],
    "device": ["cpu", "nonsense", 3.5, []],
    "tensorboard_log": [None, 3, []],
}


# Refused together
RELATED = {"n_tasks": "n_models", "n_models": "n_tasks", "learning_starts": "buffer_size"}


def built(arguments):
    """Try to build a model, and return the error message and the model, one of which is empty."""
    try:
        return "", MBMPO("MlpPolicy", Drift(), **{**SETTINGS, **arguments})
    except ValueError as error:
        return str(error), None
    except Exception as error:
        raise AssertionError(f"{arguments} raised {error!r}") from error


def trained(name, arguments, model):
    """Train a model, and return False if a function was refused: its result is checked at the first call, before any step."""
    try:
        model.learn(40)
    except Exception as error:
        if name.endswith("_fn") and f"{name} must return" in str(error) and model.num_timesteps == 0:
            return False
        raise AssertionError(f"{arguments} was accepted, and raised {error!r}") from error
    return True


def drawn(rng):
    """Draw arguments, and return the name that an error message must contain, and the arguments."""
    name = rng.choice([*VALUES, *KWARGS, *KWARGS, *KWARGS])
    if name in KWARGS:
        key = rng.choice(list(KWARGS[name]))
        value = rng.choice(KWARGS[name][key])
        extra = dict(outer_optimizer="ppo") if name == "outer_kwargs" else {}
        return f"{name}|{key}", {name: {**SETTINGS.get(name, {}), key: value}, **extra}
    return name, {name: rng.choice([*VALUES[name], *VALUES[name], *OTHERS])}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(10))
def test_drawn_at_random_each_is_refused_by_name_or_trained(seed):
    rng = random.Random(seed)
    for _ in range(20):
        name, arguments = drawn(rng)
        refusal, model = built(arguments)
        if model is None:
            assert re.search(f"{name}|{RELATED.get(name, name)}|gSDE", refusal), (arguments, refusal)
            continue
        if not trained(name, arguments, model):
            continue
        actions, _ = model.predict(model.env.reset(), deterministic=False)
        assert np.isfinite(actions).all(), arguments
        assert all(th.isfinite(value).all() for value in model.policy.state_dict().values()), arguments


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(policy_kwargs=dict(log_std_init=1e6)), "policy_kwargs['log_std_init']"),
        (dict(policy_kwargs=dict(log_std_min=-1e6)), "policy_kwargs['log_std_min']"),
        (dict(policy_kwargs=dict(activation_fn=["tanh"])), "policy_kwargs['activation_fn']"),
        (dict(dynamics_kwargs=dict(activation_fn=["tanh"])), "dynamics_kwargs['activation_fn']"),
        (dict(dynamics_kwargs=dict(activation_fn={})), "dynamics_kwargs['activation_fn']"),
        (dict(outer_optimizer="ppo", outer_kwargs=dict(learning_rate=1e300)), "outer_kwargs['learning_rate']"),
        (dict(n_models=10**15, n_tasks=10**15), "n_models"),
        (dict(horizon=10**15), "horizon"),
        (dict(seed=2**32), "seed"),
    ],
    ids=str,
)
def test_what_was_once_accepted_and_crashed_later_is_refused_by_name(arguments, named):
    refusal, _ = built(arguments)
    assert f"`{named}`" in refusal


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(buffer_size=10**13), "`buffer_size` = 10000000000000 would need"),
        (dict(n_models=10**8, n_tasks=10**8), r"`n_models` = 100000000, `dynamics_kwargs\['net_arch'\]` = \[8\] would need"),
        (dict(dynamics_kwargs=dict(net_arch=[10**7, 10**7])), r"`dynamics_kwargs\['net_arch'\]` = \[10000000, 10000000\]"),
        (dict(policy_kwargs=dict(net_arch=dict(pi=[10**7, 10**7]))), r"`policy_kwargs\['net_arch'\]`"),
        (dict(policy_kwargs=dict(net_arch=dict(vf=[10**7, 10**7]))), r"`policy_kwargs\['net_arch'\]` = {'vf'"),
        (dict(n_critic_updates=10**12), "`n_critic_updates` = 1000000000000, `batch_size` = 16"),
        (
            dict(horizon=10**6, n_imagined_rollouts=10**6),
            "`n_tasks` = 2, `n_imagined_rollouts` = 1000000, `horizon` = 1000000",
        ),
    ],
)
def test_sizes_that_no_machine_has_room_for_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=rf"{named}.*GiB of memory, this machine has .*: lower them"):
        MBMPO("MlpPolicy", Drift(), **{**SETTINGS, **arguments})


def test_the_memory_of_a_machine():
    assert 2**28 < machine_memory() < 2**50


def test_the_largest_shipped_settings_fit_a_small_machine(monkeypatch):
    monkeypatch.setattr("sb3_mbmpo.memory.machine_memory", lambda: 2.0**31)
    model = MBMPO("MlpPolicy", "HalfCheetah-v5", _init_setup_model=False)
    check_memory(vars(model))
