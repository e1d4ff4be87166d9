"""The hyperparameters that are part of the package, with one entry per environment: `zoo_configs/mbmpo.yml`."""

from pathlib import Path
from typing import Any

import yaml

# Keys of a configuration that are not arguments of MBMPO
ENV_ENTRIES = ("env_id", "n_envs", "n_timesteps", "env_kwargs")


def config_file() -> Path:
    """Return the path of the shipped hyperparameters: in the source tree's ``zoo_configs``, or in the installed package."""
    package = Path(__file__).parents[1]
    in_source_tree = package.parent / "zoo_configs" / "mbmpo.yml"
    return in_source_tree if in_source_tree.exists() else package / "zoo_configs" / "mbmpo.yml"


def read_config(name: str) -> dict[str, Any]:
    """
    Read the hyperparameters of an environment from a configuration file.

    :param name: an entry of the configuration file, usually an environment id
    :return: its hyperparameters, or those of ``default``
    :raises ValueError: if the file is damaged
    """
    path = config_file()
    try:
        configs = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    entry = configs.get(name, configs.get("default")) if isinstance(configs, dict) else None
    if not isinstance(entry, dict):
        raise ValueError(f"{path} has no entry for {name!r}, and none named 'default'.")
    return dict(entry)
