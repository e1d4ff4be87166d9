"""The search space of MBMPO's hyperparameters, for rl_zoo3's ``-optimize`` and for ``tuning/``.

It leaves out what always helps but costs time (more imagined rollouts, a longer line search), and what defines the problem.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

# "A.B" is the entry B of MBMPO's argument A. Optuna's storages cannot hold lists: widths and pairs are joined by "-"
SPACE: dict[str, BaseDistribution] = {
    # Meta-learning
    "inner_lr": FloatDistribution(1e-3, 0.03, log=True),
    "target_kl": FloatDistribution(3e-3, 0.1, log=True),
    "momentum": FloatDistribution(0.0, 0.95),
    "n_meta_steps": IntDistribution(5, 40, step=5),
    "gae_lambda": FloatDistribution(0.3, 1.0),
    "policy_kwargs.net_arch": CategoricalDistribution(["32-32", "64-64", "128-128"]),
    "policy_kwargs.log_std_init": FloatDistribution(-1.5, 0.5),
    # Imagination
    "horizon": CategoricalDistribution([10, 15, 25, 50, 100]),
    "recent_starts": FloatDistribution(0.0, 1.0),
    "disagreement_penalty": FloatDistribution(0.0, 3.0),
    "n_models-n_tasks": CategoricalDistribution(["3-6", "3-12", "5-10", "5-20", "7-14"]),
    # Real data and dynamics
    "n_steps": CategoricalDistribution([200, 250, 500, 1000, 2000]),
    "learning_rate": FloatDistribution(3e-4, 3e-3, log=True),
    "dynamics_kwargs.net_arch": CategoricalDistribution(["200-200", "200-200-200", "512-512"]),
    "dynamics_kwargs.activation_fn": CategoricalDistribution(["swish", "relu"]),
    "dynamics_kwargs.max_gradient_steps": IntDistribution(200, 2000, log=True),
    "dynamics_kwargs.batch_size": CategoricalDistribution([64, 100, 256, 500]),
    "dynamics_kwargs.weight_decay": FloatDistribution(1e-7, 1e-3, log=True),
}
# Used if a configuration has no value. Repeated here because reading MBMPO's would import PyTorch; a test compares them
DEFAULTS: dict[str, Any] = {
    "inner_lr": 3e-3,
    "target_kl": 0.02,
    "momentum": 0.8,
    "n_meta_steps": 20,
    "gae_lambda": 0.6,
    "policy_kwargs": {"net_arch": [64, 64], "log_std_init": 0.0},
    "horizon": 25,
    "recent_starts": 0.5,
    "disagreement_penalty": 0.5,
    "n_models": 5,
    "n_tasks": 20,
    "n_steps": 500,
    "learning_starts": 1000,
    "learning_rate": 1e-3,
    "dynamics_kwargs": {
        "net_arch": [200, 200, 200],
        "activation_fn": "swish",
        "max_gradient_steps": 600,
        "batch_size": 256,
        "weight_decay": 0.0,
    },
}


def part_of_space(names: Collection[str], n_policy_steps: int) -> dict[str, BaseDistribution]:
    """
    Select some dimensions of the search space.

    :param names: the dimensions to search
    :param n_policy_steps: real steps of a training run after its random ones. An iteration cannot have more, so larger
        choices of `n_steps` would all be the same training run
    :return: the distributions to draw from; without `n_steps` if there is no choice left
    """
    part = {name: SPACE[name] for name in names}
    if isinstance(n_steps := part.get("n_steps"), CategoricalDistribution):
        short = [choice for choice in n_steps.choices if isinstance(choice, int) and choice <= n_policy_steps]
        part.pop("n_steps")
        if len(short) > 1:
            part["n_steps"] = CategoricalDistribution(short)
    return part


def is_given(name: str, arguments: Mapping[str, Any]) -> bool:
    """Tell whether arguments of MBMPO set a dimension of the space, or one half of a pair."""
    if name == "n_models-n_tasks":
        return not arguments.keys().isdisjoint(name.split("-"))
    argument, _, entry = name.partition(".")
    return entry in (arguments.get(argument) or {}) if entry else argument in arguments


def suggest(
    trial: optuna.Trial, names: Collection[str] = tuple(SPACE), space: Mapping[str, BaseDistribution] = SPACE
) -> dict[str, Any]:
    """
    Draw a point of the search space.

    :param trial: the trial, which asks the sampler
    :param names: the dimensions to search
    :param space: their distributions
    :return: a point of the space, as Optuna stores it
    """
    return {name: _suggest(trial, name, space[name]) for name in names}


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case FloatDistribution(low=low, high=high, log=log):
            return trial.suggest_float(name, low, high, log=log)
        case IntDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_int(name, low, high, step=step, log=log)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise TypeError(f"`{name}` has a distribution of an unknown kind, {distribution}.")


def as_trained(value: Any) -> Any:
    """Round a number to significant digits, so that a configuration file holds exactly the values that were trained with."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def convert(params: Mapping[str, Any]) -> dict[str, Any]:
    """
    Convert a point of the search space to arguments.

    :param params: a point of the space, as Optuna stores it
    :return: arguments of MBMPO, as plain values for YAML
    """
    arguments: dict[str, Any] = {}
    for name, value in params.items():
        if name == "n_models-n_tasks":
            arguments["n_models"], arguments["n_tasks"] = map(int, value.split("-"))
            continue
        argument, _, entry = name.partition(".")
        value = [int(width) for width in value.split("-")] if entry == "net_arch" else as_trained(value)
        if entry:
            arguments.setdefault(argument, {})[entry] = value
        else:
            arguments[argument] = value
    return arguments


def nearest_point(
    arguments: Mapping[str, Any], names: Collection[str] = tuple(SPACE), space: Mapping[str, BaseDistribution] = SPACE
) -> dict[str, Any]:
    """
    Convert arguments to the nearest point of the search space, the inverse of ``convert``.

    :param arguments: arguments of MBMPO, completed by ``DEFAULTS``
    :param names: the dimensions to search
    :param space: their distributions
    :return: the point; a number beyond a bound is set to the bound, a choice that the space lacks is left out
    """
    nearest = {name: _nearest(_stored(arguments, name), space[name]) for name in names}
    return {name: value for name, value in nearest.items() if value is not None}


def _stored(arguments: Mapping[str, Any], name: str) -> Any:
    """Return the value of a dimension of the space in Optuna's representation, even if the space does not have it."""
    if name == "n_models-n_tasks":
        return f"{arguments['n_models']}-{arguments['n_tasks']}"
    argument, _, entry = name.partition(".")
    # An entry of a configuration may leave its nested arguments empty
    value = (arguments[argument] or DEFAULTS[argument])[entry] if entry else arguments[argument]
    return "-".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _nearest(value: Any, distribution: BaseDistribution) -> Any:
    """Return the nearest value in the distribution, or None if it is a choice that the distribution lacks."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return value if value in choices else None
        case FloatDistribution(low=low, high=high) | IntDistribution(low=low, high=high) if isinstance(value, int | float):
            step = distribution.step or 0
            bounded = min(max(value, low), high)
            return low + step * round((bounded - low) / step) if step else bounded
    return None


def sample_for_zoo(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: Mapping[str, Any]) -> dict[str, Any]:
    """
    Draw arguments from the search space, with the signature of rl_zoo3's samplers.

    :param trial: the trial, which asks the sampler
    :param n_actions: not used
    :param n_envs: not used
    :param additional_args: not used
    :return: arguments of MBMPO, which replace those of the configuration file
    """
    return convert(suggest(trial))
