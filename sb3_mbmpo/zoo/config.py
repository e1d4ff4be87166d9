"""The hyperparameters that are part of the package, with one entry per environment: `zoo_configs/mbmpo.yml`."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sb3_mbmpo.common.checks import check_integer, check_mapping

# Keys of a configuration that are not arguments of MBMPO
ENV_ENTRIES = ("env_id", "n_envs", "n_timesteps", "env_kwargs")


def config_file() -> Path:
    """Return the path of the shipped hyperparameters: in the source tree's ``zoo_configs``, or in the installed package."""
    package = Path(__file__).parents[1]
    in_source_tree = package.parent / "zoo_configs" / "mbmpo.yml"
    return in_source_tree if in_source_tree.exists() else package / "zoo_configs" / "mbmpo.yml"


def entries() -> dict[str, dict[str, Any]]:
    """
    Read all entries of the configuration file.

    :return: hyperparameters by name of the entry, usually an environment id; "default" has those of all others
    :raises ValueError: if the file is damaged
    """
    path = config_file()
    try:
        configs = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(configs, dict) or not all(isinstance(entry, dict) for entry in configs.values()):
        raise ValueError(f"{path} must have a dictionary of hyperparameters for each environment.")
    return configs


def read_config(name: str) -> dict[str, Any]:
    """
    Read the hyperparameters of an environment from the configuration file.

    :param name: an entry of the configuration file, usually an environment id
    :return: its hyperparameters, or those of ``default``
    :raises ValueError: if the file is damaged
    """
    configs = entries()
    entry = configs.get(name, configs.get("default"))
    if entry is None:
        raise ValueError(f"{config_file()} has no entry for {name!r}, and none named 'default'.")
    return dict(entry)


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated with the entries of ``update``; nested dictionaries are merged recursively."""
    merged = dict(base)
    for key, value in update.items():
        both_nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_nested else value
    return merged


def yaml_mapping(text: str) -> dict[str, Any]:
    """Parse a YAML dictionary."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"must be YAML: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a dictionary such as '{{horizon: 100}}', not {text!r}")
    return value


def check_entry(config: dict[str, Any]) -> None:
    """
    Check the values that are read before there is a model; its constructor checks the others.

    :param config: an entry of the configuration file, with --set over it
    :raises ValueError: for the first invalid value
    """
    for name in ("n_timesteps", "learning_starts", "n_envs"):
        if name in config:
            check_integer(name, config[name], 1)
    for name in ("policy_kwargs", "dynamics_kwargs", "env_kwargs"):
        if config.get(name) is not None:
            check_mapping(name, config[name])
    if not isinstance(config.get("env_id", ""), str):
        raise ValueError(f"`env_id` must be the id of an environment, not {config['env_id']!r}.")
