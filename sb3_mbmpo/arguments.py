"""Checks of MBMPO's arguments before anything is built. The messages say what is wrong, the value, and what to do."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from os import PathLike
from types import NoneType
from typing import Any

import gymnasium as gym
import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from sb3_mbmpo.common.actions import check_spaces
from sb3_mbmpo.common.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_known,
    check_mapping,
    check_net_arch,
    check_number,
    is_number,
    keyword_names,
)
from sb3_mbmpo.memory import check_memory
from sb3_mbmpo.meta.advantages import BASELINES
from sb3_mbmpo.meta.outer_step import proximal_step
from sb3_mbmpo.policies import MetaPolicy

# Largest absolute value of a log standard deviation: beyond it, the variance overflows single precision
LARGEST_LOG_STD = 40.0


# Names and defaults of the options are defined by the signatures only
POLICY_OPTIONS = keyword_names(MetaPolicy.__init__, ("self", "observation_space", "action_space", "lr_schedule", "kwargs"))
POLICY_OPTIONS |= keyword_names(ActorCriticPolicy.__init__, ("self", "observation_space", "action_space", "lr_schedule"))
# Options that are classes, and their base classes
POLICY_CLASSES = {
    "activation_fn": nn.Module,
    "features_extractor_class": BaseFeaturesExtractor,
    "optimizer_class": th.optim.Optimizer,
}
PPO_OPTIONS = keyword_names(proximal_step, ("problem", "meta"))


def _check_learning_rate(name: str, value: Any) -> None:
    rule = f"`{name}` must be a number of at least 0, or a function of the remaining progress that returns one"
    rate = value
    if callable(value):
        try:
            rate = value(1.0)
        except Exception as error:
            raise ValueError(f"{rule}, not {value!r}, which raised {error!r} for 1.0.") from error
    if not (is_number(rate) and rate >= 0):
        raise ValueError(f"{rule}, not {value!r}" + (f", which returned {rate!r} for 1.0." if callable(value) else "."))


def _is_subclass(base: type, value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, base)


def check_policy_kwargs(policy: Any, kwargs: Mapping[str, Any]) -> None:
    """
    Check ``policy_kwargs``.

    :param policy: "MlpPolicy" or a subclass of it, which may have its own arguments
    :param kwargs: the argument
    :raises ValueError: if ``policy_kwargs`` is not a mapping of known options to valid values
    """
    check_mapping("policy_kwargs", kwargs)
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
    """Raise ``ValueError`` if the optimiser fails, now rather than at the critic's first step, after all random real steps."""
    parameter = nn.Parameter(th.zeros(2, 2))
    try:
        optimizer = optimizer_class([parameter], lr=1e-3, **optimizer_kwargs)
        parameter.sum().backward()
        optimizer.step()
    except Exception as error:
        raise ValueError(
            f"`policy_kwargs['optimizer_class']` {optimizer_class!r} with `policy_kwargs['optimizer_kwargs']` "
            f"{dict(optimizer_kwargs)!r} cannot train the critic: {error}."
        ) from error


def check_device(device: Any) -> None:
    """Raise ``ValueError`` if PyTorch has no such device."""
    try:
        th.empty(0, device=get_device(device))
    except (RuntimeError, TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f'`device` must be "auto" or a device of PyTorch, not {device!r} ({error}).') from error


def check_outer_kwargs(kwargs: Mapping[str, Any], outer_optimizer: str) -> None:
    """Raise ``ValueError`` unless ``outer_kwargs`` is a mapping of options of the PPO outer step to valid values."""
    check_mapping("outer_kwargs", kwargs)
    if kwargs and outer_optimizer != "ppo":
        raise ValueError(
            f"`outer_kwargs` are options of `outer_optimizer='ppo'`; those of TRPO are arguments of MBMPO itself: "
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
    Check what SB3's constructor would fail on with an obscure error, or accept silently.

    :param policy: MBMPO's argument
    :param env: MBMPO's argument
    :param verbose: MBMPO's argument
    :param policy_aliases: names of policies
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
    Check MBMPO's arguments, one by one and together.

    :param arguments: MBMPO's arguments by name
    :raises ValueError: for the first one that is invalid
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
    for name in ("gamma", "gae_lambda", "momentum", "recent_starts", "unadapted_share"):
        check_number(name, arguments[name], 0, 1)
    for name in ("inner_lr", "cg_damping", "ent_coef", "disagreement_penalty"):
        check_number(name, arguments[name], 0)
    check_number("target_kl", arguments["target_kl"], 0, open_low=True)
    check_number("line_search_shrinking_factor", arguments["line_search_shrinking_factor"], 0, 1, open_low=True)
    for name in ("learn_inner_lr", "first_order", "normalize_advantage", "stop_on_return_drop"):
        check_flag(name, arguments[name])
    check_choice("outer_optimizer", arguments["outer_optimizer"], ("trpo", "ppo"))
    check_choice("baseline", arguments["baseline"], BASELINES)
    check_choice("imagined_start", arguments["imagined_start"], ("initial", "buffer"))
    check_choice("exploration", arguments["exploration"], ("adapted", "meta"))
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
            f"`n_tasks` must be a multiple of `n_models`, so that every model has the same number of tasks: "
            f"{arguments['n_tasks']} tasks cannot be divided evenly among {arguments['n_models']} models."
        )
    if arguments["buffer_size"] < arguments["learning_starts"]:
        raise ValueError(
            f"`buffer_size` ({arguments['buffer_size']}) must hold at least the `learning_starts` "
            f"({arguments['learning_starts']}) random steps: enlarge the buffer or start learning earlier."
        )
    if "observation_space" in arguments:  # else there is no environment, which is rejected next
        check_memory(arguments)
