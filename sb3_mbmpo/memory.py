"""Estimates of the memory that arguments need, so that sizes that are too large are rejected by name."""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sb3_mbmpo import policies
from sb3_mbmpo.common.actions import ActionCodec
from sb3_mbmpo.dynamics import ensemble as dynamics

FLOAT = 4  # bytes of a number in single precision
ROW_NUMBER = 8
# Copies of the weights: the gradient, two averages of Adam, and the best so far
TRAINED = 5


def check_memory(arguments: Mapping[str, Any]) -> None:
    """
    Reject sizes for which this machine has too little memory.

    :param arguments: MBMPO's arguments by name, already checked one by one, and its spaces
    :raises ValueError: for the first part that this machine cannot hold, naming the arguments that determine its size
    """
    available = machine_memory()
    for names, needed in _needs(arguments).items():
        if needed > available:
            values = {name: _value(arguments, name) for name in names}
            raise ValueError(
                f"{_listed(values)} would need {needed / 2**30:.3g} GiB of memory, this machine has "
                f"{available / 2**30:.3g}: lower them."
            )


def machine_memory() -> float:
    """Return the memory of this machine in bytes, or infinity if the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _needs(arguments: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """Return lower bounds of the bytes needed, by the names of the arguments that determine them."""
    space, codec = arguments["observation_space"], ActionCodec(arguments["action_space"])
    obs, action, encoded = math.prod(space.shape), codec.sample_dim, codec.dynamics_dim
    dynamics_arch = arguments["dynamics_kwargs"].get("net_arch", dynamics.NET_ARCH)
    given_arch = arguments["policy_kwargs"].get("net_arch")
    arch = policies.NET_ARCH if given_arch is None else given_arch
    actor_arch, critic_arch = (arch.get(name, []) if isinstance(arch, Mapping) else arch for name in ("pi", "vf"))
    n_policy = _n_weights([obs, *actor_arch, action])
    # The data of every inner step is kept
    imagined = ("n_tasks", "n_imagined_rollouts", "horizon", "n_inner_steps")
    imagined_steps = math.prod(arguments[name] for name in imagined)
    minibatch = min(arguments["batch_size"], imagined_steps)
    n_critic_updates = arguments["n_critic_updates"] if arguments["baseline"] == "critic" else 0
    return {
        ("buffer_size",): arguments["buffer_size"] * (2 * obs * np.dtype(space.dtype).itemsize + FLOAT * (action + 3)),
        ("n_models", "dynamics_kwargs['net_arch']"): TRAINED
        * FLOAT
        * arguments["n_models"]
        * _n_weights([obs + encoded, *dynamics_arch, obs]),
        ("n_tasks", "policy_kwargs['net_arch']"): FLOAT * n_policy * arguments["n_tasks"],
        ("policy_kwargs['net_arch']",): TRAINED * FLOAT * _n_weights([obs, *critic_arch, 1]),
        ("n_critic_updates", "batch_size"): ROW_NUMBER * n_critic_updates * minibatch,  # all drawn at once
        imagined: FLOAT * imagined_steps * (2 * obs + action + 3),
    }


def _n_weights(sizes: Sequence[int]) -> float:
    return float(sum(float(a) * float(b) for a, b in pairwise(sizes)))


def _value(arguments: Mapping[str, Any], name: str) -> Any:
    if "[" not in name:
        return arguments[name]
    kwargs, key = name.rstrip("']").split("['")
    return arguments[kwargs].get(key, "default")


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}` = {value!r}" for name, value in values.items())
