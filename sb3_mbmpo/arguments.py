"""Checks of MBMPO's arguments: what is wrong, the value, and what to do, before anything is built."""

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from os import PathLike
from types import NoneType
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_mbmpo.actions import check_spaces
from sb3_mbmpo.advantages import BASELINES
from sb3_mbmpo.dynamics import DynamicsEnsemble
from sb3_mbmpo.dynamics.networks import ACTIVATIONS, PRECISIONS
from sb3_mbmpo.meta import proximal_step
from sb3_mbmpo.policies import MetaPolicy
from sb3_mbmpo.sizes import check_memory

# Entries of `dynamics_kwargs` that MBMPO itself uses
DYNAMICS_EXTRAS = ("reinit_every", "clip_margin", "output_bias", "output_noise")
# Default of `clip_margin`: imagined observations stay this close to the data, in standard deviations. Wider margins let the
# policy exploit the models where nothing is known
CLIP_MARGIN = 0.1


# Training is in single precision, where larger numbers are infinite
LARGEST_NUMBER = float(np.finfo(np.float32).max)
# Beyond it, products of integers leave those of PyTorch
LARGEST_INTEGER = 2**53
# Of the logarithm of a standard deviation: further away, the variance leaves single precision
LARGEST_LOG_STD = 40.0


def _is_number(value: Any) -> bool:
    # NumPy's numbers are registered with the abstract ones
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        # Not so NaN; and PyTorch takes no larger integers
        return abs(float(value)) <= (LARGEST_INTEGER if isinstance(value, Integral) else LARGEST_NUMBER)
    except OverflowError:  # of an integer
        return False


def check_integer(name: str, value: Any, at_least: int, at_most: float = math.inf) -> None:
    """:raises ValueError: unless ``value`` is an integer in [at_least, at_most]"""
    at_most = min(at_most, LARGEST_INTEGER)
    if isinstance(value, bool) or not isinstance(value, Integral) or not at_least <= int(value) <= at_most:
        interval = f"at least {at_least}" + ("" if at_most == LARGEST_INTEGER else f" and at most {at_most}")
        raise ValueError(f"`{name}` must be an integer of {interval}, not {value!r}.")


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """:raises ValueError: unless ``value`` is a finite number in [low, high], or in (low, high]"""
    if not _is_number(value) or not (low < value if open_low else low <= value) or value > high:
        interval = f"{'greater than' if open_low else 'at least'} {low}" + ("" if high == math.inf else f" and at most {high}")
        raise ValueError(f"`{name}` must be a finite number {interval}, not {value!r}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """:raises ValueError: unless ``value`` is one of ``choices``"""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, not {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """:raises ValueError: unless ``value`` is a bool"""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, not {value!r}.")


def _keyword_names(function: Any, skip: Collection[str]) -> set[str]:
    """:return: names of the function's parameters, but for those that MBMPO fills in itself"""
    return set(inspect.signature(function).parameters) - set(skip)


# The signatures are the only home of the option's names and defaults
_FILLED_IN = ("self", "observation_space", "action_space", "n_models", "learned_reward", "learned_termination")
ENSEMBLE_OPTIONS = _keyword_names(DynamicsEnsemble.__init__, (*_FILLED_IN, "learning_rate", "seed", "device"))
FIT_OPTIONS = _keyword_names(DynamicsEnsemble.fit, ("self", "data", "generator", "n_new_rows", "on_pass", "n_threads"))
POLICY_OPTIONS = _keyword_names(MetaPolicy.__init__, ("self", "observation_space", "action_space", "lr_schedule", "kwargs"))
POLICY_OPTIONS |= _keyword_names(ActorCriticPolicy.__init__, ("self", "observation_space", "action_space", "lr_schedule"))
# Which of them are classes, and of what
POLICY_CLASSES = {
    "activation_fn": nn.Module,
    "features_extractor_class": BaseFeaturesExtractor,
    "optimizer_class": th.optim.Optimizer,
}
PPO_OPTIONS = _keyword_names(proximal_step, ("problem", "phi"))


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"`{name}` must be a dictionary, not {value!r}.")


def _check_learning_rate(name: str, value: Any) -> None:
    rule = f"`{name}` must be a number of at least 0, or a function of the remaining progress that returns one"
    rate = value
    if callable(value):
        try:
            rate = value(1.0)
        except Exception as error:
            raise ValueError(f"{rule}, not {value!r}, which raised {error!r} for 1.0.") from error
    if not (_is_number(rate) and rate >= 0):
        raise ValueError(f"{rule}, not {value!r}" + (f", which returned {rate!r} for 1.0." if callable(value) else "."))


def check_net_arch(name: str, value: Any) -> None:
    """:raises ValueError: unless ``value`` lists layer widths"""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"`{name}` must be a list of layer widths, not {value!r}.")
    for width in value:
        check_integer(name, width, 1)


def _is_subclass(base: type, value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def check_policy_kwargs(policy: Any, kwargs: Mapping[str, Any]) -> None:
    """
    :param policy: "MlpPolicy" or a subclass of it, which may have arguments of its own
    :raises ValueError: if ``policy_kwargs`` is not a mapping of known options to sensible values
    """
    _check_mapping("policy_kwargs", kwargs)
    if policy in ("MlpPolicy", MetaPolicy):
        check_known("policy_kwargs", kwargs, POLICY_OPTIONS)

    def check(key: str, is_good: Callable[[Any], bool], what: str) -> None:
        if key in kwargs and not is_good(kwargs[key]):
            raise ValueError(f"`policy_kwargs['{key}']` must be {what}, not {kwargs[key]!r}.")

    for name, base in POLICY_CLASSES.items():
        check(name, partial(_is_subclass, base), f"a subclass of {base.__module__}.{base.__name__}")
    for key in ("normalize_observation", "ortho_init", "share_features_extractor", "normalize_images"):
        if key in kwargs:
            check_flag(f"policy_kwargs['{key}']", kwargs[key])
    for key in ("features_extractor_kwargs", "optimizer_kwargs"):
        check(key, lambda value: value is None or isinstance(value, Mapping), "a dictionary")
    for key in ("log_std_init", "log_std_min"):
        if key in kwargs:
            check_number(f"policy_kwargs['{key}']", kwargs[key], -LARGEST_LOG_STD, LARGEST_LOG_STD)
    net_arch = kwargs.get("net_arch")
    if net_arch is not None:
        if isinstance(net_arch, Mapping):
            check_known("policy_kwargs['net_arch']", net_arch, ("pi", "vf"))
        for arch in net_arch.values() if isinstance(net_arch, Mapping) else [net_arch]:
            check_net_arch("policy_kwargs['net_arch']", arch)
    _try_optimizer(kwargs.get("optimizer_class", th.optim.Adam), kwargs.get("optimizer_kwargs") or {})


def _try_optimizer(optimizer_class: Any, optimizer_kwargs: Mapping[str, Any]) -> None:
    """:raises ValueError: if it cannot do one step of the critic, rather than after all random real steps"""
    parameter = nn.Parameter(th.zeros(2, 2))
    try:
        optimizer = optimizer_class([parameter], lr=1e-3, **optimizer_kwargs)
        parameter.sum().backward()
        optimizer.step()
    except Exception as error:
        raise ValueError(
            f"`policy_kwargs['optimizer_class']` {optimizer_class!r} with `policy_kwargs['optimizer_kwargs']` "
            f"{dict(optimizer_kwargs)!r} trains no critic: {error}."
        ) from error


def check_device(device: Any) -> None:
    """:raises ValueError: if PyTorch has no such device"""
    try:
        th.empty(0, device=get_device(device))
    except (RuntimeError, TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f'`device` must be "auto" or a device of PyTorch, not {device!r} ({error}).') from error


def check_known(name: str, kwargs: Mapping[str, Any], known: Collection[str]) -> None:
    """:raises ValueError: if ``kwargs`` has a key that is not ``known``"""
    unknown = sorted(set(kwargs) - set(known), key=repr)
    if unknown:
        raise ValueError(f"`{name}` has unknown entries {unknown}; known are {sorted(known)}.")


def check_keywords(function: str, kwargs: Mapping[str, Any], known: Collection[str]) -> None:
    """:raises TypeError: as Python does, if ``kwargs`` has a name that is not ``known``, with the one that may be meant"""
    for name in sorted(set(kwargs) - set(known)):
        nearest = difflib.get_close_matches(name, sorted(known), 1)
        raise TypeError(f"{function}() has no argument {name!r}" + (f": did you mean {nearest[0]!r}?" if nearest else "."))


def check_dynamics_kwargs(kwargs: Mapping[str, Any]) -> None:
    """:raises ValueError: if ``dynamics_kwargs`` is not a mapping of known options to sensible values"""
    _check_mapping("dynamics_kwargs", kwargs)
    check_known("dynamics_kwargs", kwargs, ENSEMBLE_OPTIONS | FIT_OPTIONS | set(DYNAMICS_EXTRAS))
    integers = {"max_epochs": 1, "max_gradient_steps": 1, "batch_size": 1, "reinit_every": 0}
    for name, at_least in integers.items():
        if name in kwargs:
            check_integer(f"dynamics_kwargs['{name}']", kwargs[name], at_least)
    upper_bounds = {"validation_fraction": 0.9, "rolling_average_persistency": 1.0}
    for name in ("validation_fraction", "rolling_average_persistency", "weight_decay", "output_noise"):
        if name in kwargs:
            check_number(f"dynamics_kwargs['{name}']", kwargs[name], 0, upper_bounds.get(name, math.inf))
    if kwargs.get("clip_margin") is not None:
        check_number("dynamics_kwargs['clip_margin']", kwargs["clip_margin"], 0)
    for name in ("weight_norm", "probabilistic"):
        if name in kwargs:
            check_flag(f"dynamics_kwargs['{name}']", kwargs[name])
    if "activation_fn" in kwargs:
        check_choice("dynamics_kwargs['activation_fn']", kwargs["activation_fn"], ACTIVATIONS)
    if "precision" in kwargs:
        check_choice("dynamics_kwargs['precision']", kwargs["precision"], PRECISIONS)
    check_net_arch("dynamics_kwargs['net_arch']", kwargs.get("net_arch", []))


def check_outer_kwargs(kwargs: Mapping[str, Any], outer_optimizer: str) -> None:
    """:raises ValueError: if ``outer_kwargs`` is not a mapping of options of the PPO outer step to sensible values"""
    _check_mapping("outer_kwargs", kwargs)
    if kwargs and outer_optimizer != "ppo":
        raise ValueError(
            f"`outer_kwargs` are options of `outer_optimizer='ppo'`, and TRPO's are arguments of MBMPO itself: "
            f"{dict(kwargs)!r} would have no effect."
        )
    check_known("outer_kwargs", kwargs, PPO_OPTIONS)
    for name in ("learning_rate", "clip_range"):
        if name in kwargs:
            check_number(f"outer_kwargs['{name}']", kwargs[name], 0, open_low=True)
    if "n_epochs" in kwargs:
        check_integer("outer_kwargs['n_epochs']", kwargs["n_epochs"], 1)


def check_before_building(policy: Any, env: Any, verbose: Any, policy_aliases: Collection[str]) -> GymEnv | None:
    """
    What SB3's constructor would stumble over, or accept without a word.

    :return: the environment, made if it was an id
    :raises ValueError: if MBMPO cannot work with the policy or with the spaces of the environment
    """
    check_integer("verbose", verbose, 0, 2)
    if isinstance(policy, str):
        check_choice("policy", policy, policy_aliases)
    elif not (isinstance(policy, type) and issubclass(policy, MetaPolicy)):
        raise ValueError(
            f"`policy` must be 'MlpPolicy' or a subclass of sb3_mbmpo.MlpPolicy, not {policy!r}: SB3's own policies cannot "
            "act with explicit parameters."
        )
    if env is None:
        return None
    if not isinstance(env, (str, gym.Env, VecEnv)):
        raise ValueError(f"`env` must be an environment, a VecEnv or a registered id, not {env!r}.")
    made: GymEnv = maybe_make_env(env, verbose)
    check_spaces(made.observation_space, made.action_space)
    return made


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """
    :param arguments: MBMPO's arguments by name
    :raises ValueError: for the first one that cannot work
    """
    integers = dict.fromkeys(
        ("n_steps", "learning_starts", "buffer_size", "n_models", "n_tasks", "n_imagined_rollouts", "horizon"), 1
    )
    integers |= dict.fromkeys(
        ("n_inner_steps", "cg_max_steps", "line_search_max_iter", "sub_sampling_factor", "chunk_size", "batch_size"), 1
    )
    integers |= {"n_meta_steps": 0, "n_critic_updates": 0}
    for name, at_least in integers.items():
        check_integer(name, arguments[name], at_least)
    for name in ("gamma", "gae_lambda", "recent_starts"):
        check_number(name, arguments[name], 0, 1)
    for name in ("inner_lr", "cg_damping", "ent_coef"):
        check_number(name, arguments[name], 0)
    check_number("target_kl", arguments["target_kl"], 0, open_low=True)
    check_number("line_search_shrinking_factor", arguments["line_search_shrinking_factor"], 0, 1, open_low=True)
    for name in ("learn_inner_lr", "first_order", "normalize_advantage", "stop_on_return_drop"):
        check_flag(name, arguments[name])
    check_choice("outer_optimizer", arguments["outer_optimizer"], ("trpo", "ppo"))
    check_choice("baseline", arguments["baseline"], BASELINES)
    check_choice("imagined_start", arguments["imagined_start"], ("initial", "buffer"))
    check_choice("exploration", arguments["exploration"], ("adapted", "meta"))
    check_dynamics_kwargs(arguments["dynamics_kwargs"])
    check_outer_kwargs(arguments["outer_kwargs"], arguments["outer_optimizer"])
    check_policy_kwargs(arguments["policy_class"], arguments["policy_kwargs"])
    _check_learning_rate("learning_rate", arguments["learning_rate"])
    check_integer("stats_window_size", arguments["stats_window_size"], 1)
    if arguments["seed"] is not None:
        check_integer("seed", arguments["seed"], 0, 2**32 - 1)
    if not isinstance(arguments["tensorboard_log"], (str, PathLike, NoneType)):
        raise ValueError(f"`tensorboard_log` must be a folder or None, not {arguments['tensorboard_log']!r}.")
    if arguments["n_tasks"] % arguments["n_models"] != 0:
        raise ValueError(
            f"`n_tasks` must be a multiple of `n_models`, so that every model has as many tasks: "
            f"{arguments['n_tasks']} tasks cannot be shared out among {arguments['n_models']} models."
        )
    if arguments["buffer_size"] < arguments["learning_starts"]:
        raise ValueError(
            f"`buffer_size` ({arguments['buffer_size']}) must hold at least the `learning_starts` "
            f"({arguments['learning_starts']}) random steps: enlarge the buffer or start learning earlier."
        )
    if "observation_space" in arguments:  # else there is no environment, which is refused next
        check_memory(arguments)
