"""MBMPO's ``dynamics_kwargs``, checked and sorted by the function that uses them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sb3_mbmpo.common.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_known,
    check_mapping,
    check_net_arch,
    check_number,
    keyword_names,
)
from sb3_mbmpo.dynamics.ensemble import DynamicsEnsemble
from sb3_mbmpo.dynamics.networks import ACTIVATIONS, PRECISIONS

# Imagined observations stay this close to the data, in standard deviations. A wider margin lets the policy exploit the models
# where there is no data
CLIP_MARGIN = 0.1

# Names and defaults of the options are defined by the signatures only; MBMPO fills in the other arguments itself
_FILLED_IN = ("self", "observation_space", "action_space", "n_models", "learned_reward", "learned_termination")
ENSEMBLE_OPTIONS = keyword_names(DynamicsEnsemble.__init__, (*_FILLED_IN, "learning_rate", "seed", "device"))
FIT_OPTIONS = keyword_names(DynamicsEnsemble.fit, ("self", "data", "generator", "n_new_rows", "on_pass", "n_threads", "world"))


# Where MBMPO differs from the defaults of ``DynamicsEnsemble``: sampled noise keeps the policy from relying on what the models
# cannot predict
MBMPO_DEFAULTS: dict[str, Any] = {"probabilistic": True}


@dataclass(frozen=True)
class DynamicsOptions:
    """
    The entries of ``dynamics_kwargs``.

    :param ensemble: arguments of ``DynamicsEnsemble``
    :param fit: arguments of ``DynamicsEnsemble.fit``
    :param reinit_every: draw new weights at every fit whose number is a multiple of this; 0: never
    :param clip_margin: imagined observations stay within the range of the data plus this many standard deviations; None: no
        clipping
    :param output_bias: deliberate constant error of each member, see ``output_bias_array``
    :param output_noise: standard deviation of deliberate noise, in standard deviations of the observed changes
    """

    ensemble: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    reinit_every: int = 0
    clip_margin: float | None = CLIP_MARGIN
    output_bias: float | Sequence[Sequence[float]] | np.ndarray = 0.0
    output_noise: float = 0.0

    @classmethod
    def parse(cls, kwargs: Mapping[str, Any]) -> "DynamicsOptions":
        """
        Check ``dynamics_kwargs``, and sort its entries by the function that uses them.

        :param kwargs: the argument
        :raises ValueError: if it is not a mapping of known options to valid values
        """
        _check(kwargs)
        return cls(
            ensemble=MBMPO_DEFAULTS | {name: value for name, value in kwargs.items() if name in ENSEMBLE_OPTIONS},
            fit={name: value for name, value in kwargs.items() if name in FIT_OPTIONS},
            **{name: value for name, value in kwargs.items() if name in OWN_OPTIONS},
        )


OWN_OPTIONS = set(DynamicsOptions.__dataclass_fields__) - {"ensemble", "fit"}


def _check(kwargs: Mapping[str, Any]) -> None:
    check_mapping("dynamics_kwargs", kwargs)
    check_known("dynamics_kwargs", kwargs, ENSEMBLE_OPTIONS | FIT_OPTIONS | OWN_OPTIONS)
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
