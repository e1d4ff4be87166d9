"""Learning curves: ``python -m tuning.results run`` trains MBMPO and its peers, ``python -m tuning.results page`` shows them.

``run`` trains all unfinished runs of the queue. However it ends, the same command resumes it: finished runs are kept, and
interrupted ones continue from their checkpoints. Several such commands can share the queue, even at the same time.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from tuning.arguments import positive

QUEUE = Path("docs/results/queue.yml")


def require(*modules: str) -> None:
    """Exit with installation instructions if an optional package is missing."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        sys.exit(f"tuning.results needs {', '.join(missing)}: pip install -c constraints.txt '.[tuning,zoo]'")


def run(arguments: argparse.Namespace) -> None:
    """Train the unfinished runs of the queue."""
    require("optuna")  # imported by the helpers that are shared with tuning's other commands
    from tuning.results.records import describe_machine, read_commit
    from tuning.results.runs import OURS, read_queue
    from tuning.results.workers import run_all, select

    try:
        all_runs = read_queue(arguments.queue)
        runs = select(all_runs, arguments.only)
        machine = describe_machine(read_commit(arguments.commit), arguments.threads)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if any(each.algo != OURS for each in runs):
        require("rl_zoo3", "sb3_contrib")
    # Without a handler, the processes of the runs would outlive this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated: the same command resumes it."))
    try:
        failed, taken = run_all(runs, arguments.output, machine, arguments.jobs, 60 * arguments.checkpoint_minutes)
    except KeyboardInterrupt:
        sys.exit("Interrupted: the same command resumes it.")
    if taken:
        print(f"Other processes are still working on {', '.join(each.name for each in taken)}.")
    if failed:
        sys.exit(f"Failed, see above: {', '.join(each.name for each in failed)}. The same command tries them again.")
    print(f"Finished: {len(runs) - len(taken)} of {len(runs)} runs.")


def page(arguments: argparse.Namespace) -> None:
    """Write the page of all runs so far."""
    require("matplotlib")
    from tuning.results.page import write_page

    try:
        print(f"Page: {write_page(arguments.queue, arguments.output, arguments.time)}")
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tuning.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    functions: dict[str, Callable[[argparse.Namespace], None]] = {"run": run, "page": page}
    commands = {name: verbs.add_parser(name, help=function.__doc__) for name, function in functions.items()}
    for command in commands.values():
        command.add_argument("--queue", type=Path, default=QUEUE, help="YAML file that lists the runs; default: %(default)s")
        command.add_argument("--output", type=Path, help="folder of the CSV files; default: folder 'runs' next to the queue")
    command = commands["run"]
    command.add_argument("--jobs", type=positive, default=1, help="number of parallel runs; default: %(default)s")
    command.add_argument("--threads", type=positive, default=1, help="threads of each run; default: %(default)s")
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="names of runs, such as 'sac-*-seed0'")
    command.add_argument("--commit", help="commit of the code, if it is not in a git repository (or set MBMPO_COMMIT)")
    command.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=10.0,
        help="minutes of training between checkpoints; default: %(default)s",
    )
    words = "training time to show; wall time depends on what else the machine was doing; default: %(default)s"
    commands["page"].add_argument("--time", choices=("processor", "wall"), default="processor", help=words)
    arguments = parser.parse_args(argv)
    arguments.output = arguments.output or arguments.queue.parent / "runs"
    functions[arguments.verb](arguments)


if __name__ == "__main__":
    main()
