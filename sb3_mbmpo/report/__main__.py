"""A report on a run: ``python -m sb3_mbmpo.report RUN_OR_MODEL`` writes one HTML file that needs no network, and the PNGs.

Needs matplotlib: ``pip install "sb3-mbmpo[plots]"``.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym

from sb3_mbmpo.common.mujoco_messages import tidy_mujoco_messages
from sb3_mbmpo.report.loading import load_run
from sb3_mbmpo.report.page import write_report
from sb3_mbmpo.report.run_log import find_run, read_run, run_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report on a run."""
    parser = argparse.ArgumentParser(prog="python -m sb3_mbmpo.report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_OR_MODEL", help="folder of a run, or a model's zip file")
    parser.add_argument("--env", help="environment id, or MODULE:ID to import a module first; by default the model's own")
    parser.add_argument(
        "--trust", action="store_true", help="import and call the environment and the functions that the file names"
    )
    parser.add_argument("--output", type=Path, help="folder; by default `report` in the folder of the model's name")
    parser.add_argument("--episodes", type=int, default=20, help="real episodes of the meta-policy, and of random actions")
    parser.add_argument(
        "--seed", type=int, help="seed of the run whose evaluation episodes these are; by default this run's own"
    )
    parser.add_argument("--no-video", action="store_true", help="leave out the video of MuJoCo environments")
    arguments = parser.parse_args(argv)
    if arguments.episodes < 1:
        parser.error(f"--episodes must be at least 1, not {arguments.episodes}")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # Gymnasium would look for a window
    tidy_mujoco_messages()
    try:
        import sb3_mbmpo.report.matplotlib_parts  # noqa: F401 - an ImportError before the work, not after it

        files = find_run(arguments.run)
        model, make_env = load_run(files, arguments.env, arguments.trust)
        folder = arguments.output or run_folder(files.model) / "report"
        run = read_run(files, model)
        path = write_report(run, files, make_env, folder, arguments.episodes, arguments.seed, not arguments.no_video)
    except (ImportError, OSError, ValueError, gym.error.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(f"Report: {path}")


if __name__ == "__main__":
    main()
