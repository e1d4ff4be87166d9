"""What each run trains: MBMPO with its entry of ``zoo_configs/mbmpo.yml``, its peers with rl_zoo3's tuned settings."""

import inspect
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_mbmpo import MBMPO
from sb3_mbmpo.zoo import merge, read_config
from tuning.results.runs import OURS, Run
from tuning.studies import split_entry


class Recipe(NamedTuple):
    """
    Everything that a run is built from.

    :param algorithm: class with the interface of SB3's algorithms
    :param arguments: arguments of its constructor, except environment, seed and device
    :param n_envs: number of parallel training environments
    :param wrapper: wrapper of each environment
    :param normalize: arguments of ``VecNormalize``; None: the environment is not normalised
    :param settings: text that says where the arguments come from and what was changed
    """

    algorithm: type[BaseAlgorithm]
    arguments: dict[str, Any]
    n_envs: int
    wrapper: Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]] | None
    normalize: dict[str, Any] | None
    settings: str


def make_recipe(run: Run) -> Recipe:
    """
    Return what a run trains.

    :param run: run of the queue
    :return: its recipe
    :raises ValueError: if rl_zoo3's settings need something that this tool does not support
    """
    return _our_recipe(run) if run.algo == OURS else _peer_recipe(run)


def _our_recipe(run: Run) -> Recipe:
    env_entries, arguments = split_entry(merge(read_config(run.entry), run.overrides))
    settings = "; ".join([f"zoo_configs/mbmpo.yml: {run.entry}", *(f"{key}={value}" for key, value in run.overrides.items())])
    return Recipe(MBMPO, arguments, int(env_entries.get("n_envs", 1)), None, None, settings)


def default_of(algorithm: type[BaseAlgorithm], argument: str) -> Any:
    """Return the default of an argument of the algorithm's constructor, or None if it has no such argument."""
    parameter = inspect.signature(algorithm).parameters.get(argument)
    return None if parameter is None else parameter.default


def read_zoo(algo: str, env_id: str) -> tuple[str, dict[str, Any]]:
    """
    Read rl_zoo3's hyperparameters for an environment.

    If the environment has no entry, that of its newest version is used: rl_zoo3 has settings for the v4 MuJoCo environments,
    and v5 differs from them in details only.

    :param algo: rl_zoo3's name of the algorithm
    :param env_id: Gymnasium's id of the environment
    :return: name of the entry ("default" if there is none for any version) and its hyperparameters
    """
    import rl_zoo3

    entries: dict[str, dict[str, Any]] = yaml.safe_load(
        (Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml").read_text()
    )
    family = re.escape(env_id.rpartition("-v")[0])
    versions = sorted(int(name.rpartition("-v")[2]) for name in entries if re.fullmatch(rf"{family}-v\d+", name))
    name = env_id if env_id in entries else f"{env_id.rpartition('-v')[0]}-v{versions[-1]}" if versions else "default"
    return name, dict(entries[name])


def _peer_recipe(run: Run) -> Recipe:
    from rl_zoo3 import ALGOS
    from rl_zoo3.exp_manager import ExperimentManager

    algorithm = ALGOS[run.algo]
    entry, theirs = read_zoo(run.algo, run.env_id)
    unknown = {"callback", "frame_stack", "noise_type", "vec_env_wrapper"} & set(theirs)
    if unknown:
        raise ValueError(
            f"tuning.results does not support {sorted(unknown)}, which rl_zoo3's settings {entry} of {run.algo} ask for."
        )
    changes = {**_fair_changes(algorithm, theirs, run), **run.overrides}
    manager = ExperimentManager(Namespace(), run.algo, run.env_id, log_folder="", n_timesteps=run.n_timesteps, verbose=0)
    # rl_zoo3 itself evaluates schedules, Python strings, normalisation and the number of environments
    arguments, wrapper, _, _ = manager._preprocess_hyperparams(theirs | changes)
    if _given(algorithm, arguments, "buffer_size", 0) > run.n_timesteps:
        # The buffer would never fill up. A smaller one trains the same, and keeps the empty rest of a million rows out of
        # checkpoints
        arguments["buffer_size"] = run.n_timesteps
    source = f"rl_zoo3: {entry}" if entry != "default" else "defaults of SB3: rl_zoo3 has no tuned entry"
    said = [f"{key}={value} (there {theirs.get(key, default_of(algorithm, key))})" for key, value in changes.items()]
    normalize = dict(manager.normalize_kwargs) if manager.normalize else None
    return Recipe(algorithm, arguments, manager.n_envs, wrapper, normalize, "; ".join([source, *said]))


def _fair_changes(algorithm: type[BaseAlgorithm], theirs: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Return a lower ``learning_starts`` if the peer's exceeds the limit, which is the queue's or, by default, our entry's."""
    bound = run.learning_starts
    if bound is None:
        bound = read_config(run.entry).get("learning_starts", default_of(MBMPO, "learning_starts"))
    return {"learning_starts": bound} if _given(algorithm, theirs, "learning_starts", 0) > bound else {}


def _given(algorithm: type[BaseAlgorithm], arguments: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """Return the argument, its default, or ``otherwise`` if the algorithm has no such argument."""
    return arguments.get(name, default_of(algorithm, name)) or otherwise
