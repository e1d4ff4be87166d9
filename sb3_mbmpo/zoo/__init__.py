"""MBMPO in rl_zoo3: ``register()`` adds the algorithm where the hook that ``pip install`` installs cannot run."""

from sb3_mbmpo.zoo.config import ENV_ENTRIES, check_entry, config_file, merge, read_config, yaml_mapping
from sb3_mbmpo.zoo.extension import register

__all__ = ["ENV_ENTRIES", "check_entry", "config_file", "merge", "read_config", "register", "yaml_mapping"]
