"""Command line: ``python -m sb3_mbmpo train --env Pendulum-v1`` trains, compares with a random policy, and saves."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The imports take seconds, during which there is nothing to save, so the process may end at once
    for _signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_signal, lambda number, _: os._exit(128 + number))

from sb3_mbmpo.cli.environments import listing
from sb3_mbmpo.cli.training_run import train
from sb3_mbmpo.cli.workers import number_or_auto, start_workers
from sb3_mbmpo.zoo import yaml_mapping

__all__ = ["main", "train"]


class ListAction(argparse.Action):
    """An option that prints the list of environments and ends the program, as ``--help`` does with its text."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(
            option_strings, dest, nargs=0, help="list the environments with settings of their own, and what these reach"
        )

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print the list."""
        print(listing())
        parser.exit()


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m sb3_mbmpo", description=__doc__)
    parser.add_argument("--list", action=ListAction)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train", help=train.__doc__, description=train.__doc__)
    verb.add_argument("--list", action=ListAction)
    verb.add_argument("--env", default="Pendulum-v1", help="environment id, or another entry of zoo_configs/mbmpo.yml")
    verb.add_argument(
        "--set",
        type=yaml_mapping,
        default={},
        metavar="YAML",
        help="changes to the environment's settings, for example '{horizon: 50, dynamics_kwargs: {max_epochs: 50}}'",
    )
    verb.add_argument("--total-timesteps", type=int, help="real steps; by default those of the configuration")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--eval-at", type=int, nargs="*", default=[], help="evaluate at these real steps too")
    verb.add_argument("--eval-episodes", type=int, default=20)
    verb.add_argument(
        "--save", type=Path, metavar="FILE", help="by default runs/mbmpo-ENV-seedSEED, to which .zip is appended"
    )
    verb.add_argument(
        "--save-every", type=int, default=0, metavar="STEPS", help="real steps between two saves; 0: each iteration"
    )
    verb.add_argument(
        "--tensorboard-log", type=Path, metavar="FOLDER", help="log to TensorBoard, in a folder of the model's name in FOLDER"
    )
    verb.add_argument("--resume", action="store_true", help="continue the run in FILE.zip, if there is one")
    verb.add_argument("--overwrite", action="store_true", help="start a new run, even if FILE.zip exists")
    verb.add_argument("--device", default="auto")
    verb.add_argument(
        "--workers",
        type=number_or_auto,
        default=1,
        metavar="N",
        help="processes of this machine that learn together, with an equal share of the CPUs; auto: as many as pay off",
    )
    verb.add_argument("--verbose", type=int, default=0)
    verb.add_argument("--no-progress-bar", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.resume and arguments.overwrite:
        parser.error("--resume and --overwrite contradict each other")
    try:
        start_workers(arguments, sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        sys.exit(f"ValueError: {error}")
    train(arguments)


if __name__ == "__main__":
    main()
