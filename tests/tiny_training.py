"""The command line, with an environment and settings so small that an iteration takes a fraction of a second."""

import gymnasium as gym
from killed_runs import TINY
from tiny import Drift

from sb3_mbmpo.__main__ import main
from sb3_mbmpo.cli import training_run


class Point(Drift):
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - as Gymnasium has it


gym.register("Point-v0", Point, disable_env_checker=True)


def command_line(monkeypatch, folder):
    """Return the command `train`, which trains in ``Point-v0`` and saves in a folder unless it is told otherwise."""
    monkeypatch.setattr(training_run, "read_config", lambda name: {**TINY, "env_id": name})

    def run(*options, env="Point-v0", save="run", steps=60):
        common = ["--total-timesteps", str(steps), "--eval-episodes", "1", "--no-progress-bar"]
        main(["train", "--env", env, "--save", str(folder / save), *common, *options])

    return run
