"""Command line: ``python -m sb3_mbmpo train --env Pendulum-v1`` trains, compares with a random policy, and saves."""

import argparse
import os
import signal
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    # The imports take seconds, during which there is nothing to save, so the process may end at once
    for _signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_signal, lambda number, _: os._exit(128 + number))

from sb3_mbmpo.cli.training_run import train

__all__ = ["main", "train"]


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run the verb."""
    parser = argparse.ArgumentParser(prog="python -m sb3_mbmpo", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train", help=train.__doc__, description=train.__doc__)
    verb.add_argument("--env", default="Pendulum-v1", help="environment id, or another entry of zoo_configs/mbmpo.yml")
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
    verb.add_argument("--resume", action="store_true", help="continue the run in FILE.zip, if there is one")
    verb.add_argument("--overwrite", action="store_true", help="start a new run, even if FILE.zip exists")
    verb.add_argument("--device", default="auto")
    verb.add_argument("--verbose", type=int, default=0)
    verb.add_argument("--no-progress-bar", action="store_true")
    verbs_to_functions: dict[str, Callable[[argparse.Namespace], None]] = {"train": train}
    arguments = parser.parse_args(argv)
    if arguments.resume and arguments.overwrite:
        parser.error("--resume and --overwrite contradict each other")
    verbs_to_functions[arguments.verb](arguments)


if __name__ == "__main__":
    main()
