"""Where a run's files are, and which process may write them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuning.results.records import read_rows
from tuning.results.runs import Run


def csv_file(output: Path, run: Run) -> Path:
    """:return: the file of the run's rows"""
    return output / f"{run.name}.csv"


def work_folder(output: Path, run: Run) -> Path:
    """:return: where the run keeps what nobody needs once it is finished; ignored by git"""
    return output / ".work" / run.name


def beside_work(output: Path, run: Run, suffix: str) -> Path:
    """:return: a file beside the run's work folder, which therefore exists longer"""
    folder = work_folder(output, run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.with_name(f"{folder.name}.{suffix}")


def steps_left(output: Path, run: Run) -> list[int]:
    """:return: the real steps at which the run has no evaluation yet; none once it is finished"""
    done = {int(row["real_steps"]) for row in read_rows(csv_file(output, run))}
    return [step for step in run.evaluate_at if step not in done]


@contextmanager
def claim(output: Path, run: Run) -> Iterator[bool]:
    """
    Claim a run for as long as the block lasts. A process that dies, however it does, loses its claim at once.

    :return: whether nobody else has it
    """
    path = beside_work(output, run, "lock")
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
