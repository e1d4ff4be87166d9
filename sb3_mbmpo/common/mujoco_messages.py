"""A filter of MuJoCo's messages while a command line runs.

By default, its C library prints each warning to the standard output, between the lines of a table or a progress bar, and
appends it to a file MUJOCO_LOG.TXT in the current folder. Most are about deprecated elements of the models that Gymnasium
ships, which a user cannot change.
"""

import re
import sys

import mujoco

_shown: set[str] = set()


def tidy_mujoco_messages() -> None:
    """Drop MuJoCo's deprecation warnings, show each other one once on the standard error, and write no MUJOCO_LOG.TXT."""
    mujoco.set_mju_user_warning(_show)


def _show(message: str) -> None:
    kind = re.sub(r"\d+", "", message)  # simulated times and numbers of joints differ
    if "deprecated" not in message and kind not in _shown:
        _shown.add(kind)
        print(f"MuJoCo: {message}", file=sys.stderr)
