"""Processes that share one queue, on one machine or several: each run is trained once, by the first to claim it."""

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

# Exit status of a process whose run another process had claimed first
TAKEN = 3


def work(run: Run, output: Path, machine: Mapping[str, str], checkpoint_seconds: float) -> None:
    """Train one run in a process of its own, which exits with 1 after an error and with ``TAKEN`` if the run is claimed."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    from tuning.results.training import train  # imports PyTorch, which the parent process does not need

    try:
        with claim(output, run) as ours:
            if not ours:
                sys.exit(TAKEN)
            if steps_left(output, run):
                train(run, output, machine, checkpoint_seconds)
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception:  # noqa: BLE001 - a failing run must not stop the others; it is reported at the end
        traceback.print_exc()
        sys.exit(1)


def select(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """
    Select runs by their names.

    :param runs: runs of a queue
    :param patterns: patterns of names, with * and ?; without any, all runs are selected
    :return: runs that match any of the patterns
    :raises ValueError: if a pattern matches no run
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(run.name, pattern) for run in runs):
            raise ValueError(f"--only {pattern!r} matches no run of the queue; names look like {runs[0].name}.")
    return [run for run in runs if not patterns or any(fnmatch.fnmatchcase(run.name, pattern) for pattern in patterns)]


def run_all(
    runs: Sequence[Run], output: Path, machine: Mapping[str, str], n_jobs: int, checkpoint_seconds: float
) -> tuple[list[Run], list[Run]]:
    """
    Train the unfinished runs in the order of the queue, each in a process of its own.

    :param runs: runs of the queue
    :param output: folder of the CSV files
    :param machine: columns that all rows have in common
    :param n_jobs: number of parallel processes
    :param checkpoint_seconds: seconds between two checkpoints
    :return: the runs that failed, and those that other processes are still working on
    """
    # PyTorch reads this once, when the fork server imports it; the processes of the runs are forked from that server
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
                pass  # released at once: the training process must hold the claim itself, to lose it when it dies
            if free:
                tried.add(run.name)
                process = context.Process(target=work, args=(run, output, machine, checkpoint_seconds), daemon=True)
                process.start()
                running.append((run, process))
        if not running:
            return failed, waiting
        time.sleep(0.2)
