"""The files of a run, and the claim that decides which process may write them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuning.results.records import read_rows
from tuning.results.runs import Run


def csv_file(output: Path, run: Run) -> Path:
    """Return the CSV file of the run's rows."""
    return output / f"{run.name}.csv"


def work_folder(output: Path, run: Run) -> Path:
    """Return the folder for what the run needs only until it is finished; git ignores it."""
    return output / ".work" / run.name


def beside_work(output: Path, run: Run, suffix: str) -> Path:
    """Return a path next to the run's work folder, for a file that must outlive the folder."""
    folder = work_folder(output, run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.with_name(f"{folder.name}.{suffix}")


def steps_left(output: Path, run: Run) -> list[int]:
    """Return the real steps at which the run still has to be evaluated, an empty list once it is finished."""
    done = {int(row["real_steps"]) for row in read_rows(csv_file(output, run))}
    return [step for step in run.evaluate_at if step not in done]


@contextmanager
def claim(output: Path, run: Run) -> Iterator[bool]:
    """
    Claim a run for the duration of the block.

    The operating system releases the claim of a process that dies, however it dies.

    :return: whether the claim succeeded; False if another process holds it
    """
    path = beside_work(output, run, "lock")
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
