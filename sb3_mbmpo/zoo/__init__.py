"""MBMPO in rl_zoo3: ``register()`` adds the algorithm where the hook that ``pip install`` installs cannot run."""

from sb3_mbmpo.zoo.config import ENV_ENTRIES, config_file, read_config
from sb3_mbmpo.zoo.extension import register

__all__ = ["ENV_ENTRIES", "config_file", "read_config", "register"]
