"""What each run trains: MBMPO as its entry of ``zoo_configs/mbmpo.yml`` says, its peers as rl_zoo3's tuned settings say."""

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
from sb3_mbmpo.zoo import read_config
from tuning.results.runs import OURS, Run
from tuning.studies import merge, split_entry


class Recipe(NamedTuple):
    """
    All that a run is built from.

    :param algorithm: class of SB3's kind
    :param arguments: of its constructor, but for environment, seed and device
    :param n_envs: environments to train in at once
    :param wrapper: round each environment
    :param normalize: arguments of ``VecNormalize``; None: there is none
    :param settings: where the arguments are from, and what was changed, in words
    """

    algorithm: type[BaseAlgorithm]
    arguments: dict[str, Any]
    n_envs: int
    wrapper: Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]] | None
    normalize: dict[str, Any] | None
    settings: str


def make_recipe(run: Run) -> Recipe:
    """
    :param run: of the queue
    :return: what it trains
    :raises ValueError: if rl_zoo3's settings need what this tool does not know
    """
    return _our_recipe(run) if run.algo == OURS else _peer_recipe(run)


def _our_recipe(run: Run) -> Recipe:
    task, arguments = split_entry(merge(read_config(run.entry), run.overrides))
    settings = "; ".join([f"zoo_configs/mbmpo.yml: {run.entry}", *(f"{key}={value}" for key, value in run.overrides.items())])
    return Recipe(MBMPO, arguments, int(task.get("n_envs", 1)), None, None, settings)


def default_of(algorithm: type[BaseAlgorithm], argument: str) -> Any:
    """:return: what the algorithm's constructor has where it is given nothing; None if it has no such argument"""
    parameter = inspect.signature(algorithm).parameters.get(argument)
    return None if parameter is None else parameter.default


def read_zoo(algo: str, env_id: str) -> tuple[str, dict[str, Any]]:
    """
    Read rl_zoo3's hyperparameters for an environment.

    :param algo: as rl_zoo3 names it
    :param env_id: of Gymnasium. The tuned settings of another version will do: rl_zoo3 has those of the v4 MuJoCo tasks, whose
        v5 differ in details only
    :return: name of the entry, the newest version there is, or "default"; its hyperparameters
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
        raise ValueError(f"tuning.results knows no {sorted(unknown)}, which rl_zoo3's settings {entry} of {run.algo} ask for.")
    changes = {**_fair_changes(algorithm, theirs, run), **run.overrides}
    manager = ExperimentManager(Namespace(), run.algo, run.env_id, log_folder="", n_timesteps=run.n_timesteps, verbose=0)
    # Strings that are schedules or Python, normalisation, numbers of environments: as rl_zoo3 itself reads them
    arguments, wrapper, _, _ = manager._preprocess_hyperparams(theirs | changes)
    if _given(algorithm, arguments, "buffer_size", 0) > run.n_timesteps:
        # It would not be filled: the run is the same, and a checkpoint does not hold the empty rest of a million rows
        arguments["buffer_size"] = run.n_timesteps
    source = f"rl_zoo3: {entry}" if entry != "default" else "defaults of SB3: rl_zoo3 has no tuned entry"
    said = [f"{key}={value} (there {theirs.get(key, default_of(algorithm, key))})" for key, value in changes.items()]
    normalize = dict(manager.normalize_kwargs) if manager.normalize else None
    return Recipe(algorithm, arguments, manager.n_envs, wrapper, normalize, "; ".join([source, *said]))


def _fair_changes(algorithm: type[BaseAlgorithm], theirs: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """:return: fewer random first steps, where there would be more than the queue or, without its word, our entry allows"""
    bound = run.learning_starts
    if bound is None:
        bound = read_config(run.entry).get("learning_starts", default_of(MBMPO, "learning_starts"))
    return {"learning_starts": bound} if _given(algorithm, theirs, "learning_starts", 0) > bound else {}


def _given(algorithm: type[BaseAlgorithm], arguments: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """:return: the argument, or its default; ``otherwise`` if the algorithm has no such argument"""
    return arguments.get(name, default_of(algorithm, name)) or otherwise
