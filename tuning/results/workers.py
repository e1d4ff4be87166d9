"""Several processes, here or elsewhere, share one queue: each run is done once, by whoever claims it first."""

import fnmatch
import multiprocessing as mp
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from tuning.optimize import end_with_parent
from tuning.results.files import claim, steps_left
from tuning.results.runs import Run

# Exit status of a process that was not the first to claim its run
TAKEN = 3


def work(run: Run, output: Path, machine: Mapping[str, str], checkpoint_seconds: float) -> None:
    """A process of its own: train one run. It ends with 1 after an error, with ``TAKEN`` if another process is at the run."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    from tuning.results.training import train  # PyTorch, which the waiting process can do without

    try:
        with claim(output, run) as ours:
            if not ours:
                sys.exit(TAKEN)
            if steps_left(output, run):
                train(run, output, machine, checkpoint_seconds)
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception:  # noqa: BLE001 - a run that fails must not keep the others from theirs; it says so at the end
        traceback.print_exc()
        sys.exit(1)


def select(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """
    :param runs: of a queue
    :param patterns: of names, with * and ?; none: all runs
    :raises ValueError: if a pattern fits no run
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(run.name, pattern) for run in runs):
            raise ValueError(f"--only {pattern!r} fits no run of the queue; their names are like {runs[0].name}.")
    return [run for run in runs if not patterns or any(fnmatch.fnmatchcase(run.name, pattern) for pattern in patterns)]


def run_all(
    runs: Sequence[Run], output: Path, machine: Mapping[str, str], n_jobs: int, checkpoint_seconds: float
) -> tuple[list[Run], list[Run]]:
    """
    Train what is not finished, each run in a process of its own, in the order of the queue.

    :param runs: of the queue
    :param output: folder of the CSV files
    :param machine: columns that all rows have in common
    :param n_jobs: processes at a time
    :param checkpoint_seconds: between two checkpoints
    :return: the runs that failed, and those that other processes are still at
    """
    # Before PyTorch is imported, which reads it once: in a process of which those of the runs are copies
    os.environ["OMP_NUM_THREADS"] = machine["threads"]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tuning.results.training"])
    tried: set[str] = set()
    failed: list[Run] = []
    running: list[tuple[Run, BaseProcess]] = []
    while True:
        for run, process in running:
            if process.exitcode == TAKEN:
                tried.remove(run.name)
            elif process.exitcode not in (None, 0):
                failed.append(run)
        running = [(run, process) for run, process in running if process.exitcode is None]
        waiting = [run for run in runs if run.name not in tried and steps_left(output, run)]
        for run in waiting:
            if len(running) == n_jobs:
                break
            with claim(output, run) as free:
                pass  # given back at once: the process that trains must hold it, to lose it when it dies
            if free:
                tried.add(run.name)
                process = context.Process(target=work, args=(run, output, machine, checkpoint_seconds), daemon=True)
                process.start()
                running.append((run, process))
        if not running:
            return failed, waiting
        time.sleep(0.2)
