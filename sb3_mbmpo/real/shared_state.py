"""What processes that learn together send one another: the state on which an iteration depends, apart from the arguments."""

from collections.abc import Iterable, Mapping
from typing import Any

from sb3_mbmpo.dynamics import Transitions
from sb3_mbmpo.real.resumable import ResumableAlgorithm

# Arguments in which processes that learn together may differ
OWN_TO_A_PROCESS = {"policy", "env", "device", "verbose", "tensorboard_log", "reward_fn", "termination_fn", "learning_rate"}
# What an iteration depends on besides arguments, parameters, data and random generators
SENT_ATTRIBUTES = (
    "num_timesteps",
    "learned_inner_lr",
    "_bias_draws",
    "_current_progress_remaining",
    "_initial_obs",
    "_n_fits",
    "_n_new_steps",
    "_n_updates",
)
SENT_OF_NORMALIZER = ("obs_rms", "norm_obs", "clip_obs", "epsilon")


def shared_arguments(model: ResumableAlgorithm, names: Iterable[str]) -> dict[str, Any]:
    """
    Return the arguments on which all processes must agree.

    :param model: the algorithm of this process
    :param names: names of its constructor's arguments
    """
    return {name: vars(model)[name] for name in sorted({*names} & vars(model).keys() - OWN_TO_A_PROCESS)}


def sent_state(model: ResumableAlgorithm, arguments: Mapping[str, Any], data: Transitions) -> dict[str, Any]:
    """
    Return all that the next iteration of another process depends on.

    :param model: the algorithm of process 0
    :param arguments: its shared arguments
    :param data: its real steps so far
    """
    normalizer = model.get_vec_normalize_env()
    return {
        "arguments": dict(arguments),
        "data": data,
        "attributes": {name: getattr(model, name) for name in SENT_ATTRIBUTES},
        "parameters": model.get_parameters(),
        "generators": {purpose: generator.get_state() for purpose, generator in model._generators.items()},
        "normalizer": {} if normalizer is None else {name: getattr(normalizer, name) for name in SENT_OF_NORMALIZER},
    }


def adopt_state(model: ResumableAlgorithm, arguments: Mapping[str, Any], state: Mapping[str, Any]) -> Transitions:
    """
    Adopt the state that process 0 has sent.

    :param model: the algorithm of this process
    :param arguments: its shared arguments
    :param state: what ``sent_state`` returned in process 0
    :return: the real steps of process 0
    :raises ValueError: if the arguments differ
    """
    different = sorted(name for name in arguments if repr(arguments[name]) != repr(state["arguments"].get(name)))
    if different:
        raise ValueError(f"The processes have different arguments, and must have the same: {', '.join(different)}.")
    vars(model).update(state["attributes"])
    model.set_parameters(state["parameters"], device=model.device)
    for purpose, generator in model._generators.items():
        generator.set_state(state["generators"][purpose])
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        vars(normalizer).update(state["normalizer"])
    return Transitions(*(x.to(model.device) for x in state["data"]))
