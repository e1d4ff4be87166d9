"""The CSV file of a run: one row for each evaluation, which also records the code and the machine that produced it."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import sb3_mbmpo

MEASURED = ("real_steps", "wall_seconds", "cpu_seconds", "mean_return", "std_return")
LIBRARIES = ("stable_baselines3", "sb3_contrib", "rl_zoo3", "torch", "gymnasium", "mujoco", "numpy")
ORIGIN = ("environment", "settings", "commit", "sb3_mbmpo", *LIBRARIES, "cpu", "threads")
COLUMNS = (*MEASURED, *ORIGIN)
ROOT = Path(__file__).parents[2]


def read_commit(given: str | None = None) -> str:
    """
    Return the commit of the code.

    :param given: commit given by the user; by default the environment variable ``MBMPO_COMMIT``, otherwise git is asked
    :return: its hash, with "-dirty" appended if the code has uncommitted changes
    :raises ValueError: if the commit is unknown, for example in an archive of the code
    """
    given = given or os.environ.get("MBMPO_COMMIT")
    if given:
        return given
    # An archive may be unpacked inside another repository, whose hash would be wrong
    if Path(_git("rev-parse", "--show-toplevel") or "/").resolve() != ROOT.resolve():
        raise ValueError("The commit of this code is unknown, as it is in no git repository: set --commit or MBMPO_COMMIT.")
    changed = _git("status", "--porcelain", "--", "sb3_mbmpo", "tuning", "zoo_configs")
    return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def describe_machine(commit: str, threads: int) -> dict[str, str]:
    """
    Return the columns that are the same in all rows that this process writes.

    :param commit: commit of the code
    :param threads: number of threads of the training
    :return: value of each column
    :raises ValueError: if ``sb3_mbmpo`` is imported from elsewhere, so that the commit would not apply to it
    """
    package = Path(sb3_mbmpo.__file__).parents[1]
    if package.resolve() != ROOT.resolve():
        raise ValueError(f"tuning is in {ROOT}, but sb3_mbmpo in {package}: run the command in the folder that has both.")
    versions = {library: _version(library) for library in LIBRARIES}
    return {"commit": commit, "sb3_mbmpo": sb3_mbmpo.__version__, **versions, "cpu": cpu_model(), "threads": str(threads)}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def cpu_model() -> str:
    """Return the CPU's model name if the system reveals it, otherwise the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read_rows(path: Path) -> list[dict[str, str]]:
    """
    Read the complete rows of a run.

    A last line that a full disk or a power failure has cut short is ignored.

    :param path: CSV file of a run, which need not exist
    :return: rows in ascending order of real steps
    :raises ValueError: if the file has other columns
    """
    text = path.read_text() if path.exists() else ""
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    if any(set(row) != set(COLUMNS) or None in row.values() for row in rows):
        raise ValueError(
            f"{path} does not have the columns {', '.join(COLUMNS)}: it was not written by this version of tuning.results."
        )
    return sorted(rows, key=lambda row: int(row["real_steps"]))


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """
    Append a row atomically.

    A reader sees all of the row or none of it, even if the process is killed at any moment.

    :param path: CSV file; only one process may append at a time
    :param row: a value for each of ``COLUMNS``
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        written = file.read()
        complete = written.rfind(b"\n") + 1
        file.seek(complete)
        file.truncate()
        lines = [] if complete else [",".join(COLUMNS)]
        lines.append(",".join(_quote(str(row[column])) for column in COLUMNS))
        file.write("".join(line + "\n" for line in lines).encode())  # unbuffered: a single system call
        os.fsync(file.fileno())


def _quote(text: str) -> str:
    text = " ".join(text.split())
    return '"' + text.replace('"', '""') + '"' if any(letter in text for letter in ',"') else text
