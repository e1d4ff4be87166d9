"""The scripts in docs/examples run unchanged, one after the other in the same folder, with a few steps each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
# In this order, because the second and third load what the first one saved; with the last line that each one prints
LAST_LINES = {
    "train.py": r"Return after 300 real steps: -\d+ .*",
    "adapt.py": r"adapted: mean return -\d+",
    "ppo_in_model.py": r"PPO's return in the real environment: -\d+ .* after 300 real steps of MB-MPO",
    "custom_reward.py": r"Return of spinning: -?\d+ .*",
    "offline.py": r"PPO's return in the real environment, .*: -\d+ .*",
}


def run(script, folder, *arguments):
    """Run a script and return the last line that it prints."""
    # Users of the examples can ignore the warnings of libraries, but not ours
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parents[1])}
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1].strip()


def test_every_example_runs(tmp_path):
    assert set(LAST_LINES) == {path.name for path in EXAMPLES.glob("*.py")}
    for script, expected in LAST_LINES.items():
        assert re.fullmatch(expected, run(script, tmp_path, "--fast")), script


def test_examples_are_short():
    for script in LAST_LINES:
        assert len((EXAMPLES / script).read_text().splitlines()) <= 50, script


@pytest.mark.slow
def test_ppo_inside_the_model_reaches_the_bar(tmp_path):
    run("train.py", tmp_path)
    last_line = run("ppo_in_model.py", tmp_path)
    assert int(re.search(r"-\d+", last_line).group()) >= -300, last_line
