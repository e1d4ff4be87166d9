"""Kill a training of the command line over and over, at random moments and at each step of a save, and resume it each time.

``test_training_run`` runs this module in a process of its own, which imports PyTorch once and forks a training for each kill.
It prints its findings as JSON.
"""

import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch as th
from test_resume import state
from tiny import ENTRY, tiny_model

from sb3_mbmpo import MBMPO
from sb3_mbmpo.__main__ import main
from sb3_mbmpo.cli import training_run
from sb3_mbmpo.report.run_log import read_progress, run_folder

N_RANDOM, N_PRECISE = 18, 12
TOTAL = 200
TINY = ENTRY | dict(
    policy="MlpPolicy",
    n_timesteps=TOTAL,
    env_id="sb3_mbmpo.envs:Point2D-v0",  # episodes of 50 steps from random starts: an iteration ends in the middle of one
    buffer_size=1000,
    n_imagined_rollouts=3,
    horizon=4,
)


def start(path, *options, before=lambda: None):
    """Fork a process that trains, and return its id."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(path.with_name("output"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        before()
        code = 0
        try:
            main(["train", "--env", "Tiny", "--save", str(path), "--no-progress-bar", "--eval-episodes", "1", *options])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            if isinstance(error.code, str):
                print(error.code)
        except BaseException as error:  # noqa: BLE001 - the child must not continue with the code of its parent
            print(f"not an exit: {error!r}")
            code = 99
        sys.stdout.flush()
        os._exit(code)
    return child


def end(child):
    """Wait for a process and return its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def found(path):
    """Check that the newest model and everything that belongs to it is intact, and return its number of real steps."""
    model = MBMPO.load(path)
    run = vars(model)[training_run.RUN]
    model.load_replay_buffer(run_folder(path) / run["buffer"])
    assert model.replay_buffer.size() == model.num_timesteps
    log = run_folder(path) / "progress.csv"
    if model.num_timesteps > 0:
        assert read_progress(log)["time/total_timesteps"][-1] >= model.num_timesteps
    return model.num_timesteps


def kill_at(when, count):
    """Return a function that makes a process kill itself "before" or "after" one of the calls that save a file."""

    def arm():
        left = [count]
        for name in ("fsync", "replace", "unlink"):
            original = getattr(os, name)

            def counted(*arguments, _original=original, **kwargs):
                left[0] -= 1
                if left[0] == 0 and when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                _original(*arguments, **kwargs)
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            setattr(os, name, counted)

    return arm


def signal_in_iteration(number, count):
    """Return a function that makes a process send itself a signal in the middle of an iteration."""

    def arm():
        left, original = [count], MBMPO.train

        def counted(self, *arguments):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            original(self, *arguments)

        MBMPO.train = counted

    return arm


def learned(path):
    """Return everything that determines how the run in ``path`` continues."""
    model = MBMPO.load(path)
    model.load_replay_buffer(run_folder(path) / vars(model)[training_run.RUN]["buffer"])
    return state(model)


def kill_over_and_over(folder):
    """Kill and resume a training until enough kills have happened, and return a report."""
    reference, path = folder / "reference.zip", folder / "killed.zip"
    begin = time.perf_counter()
    assert end(start(reference)) == 0, (folder / "output").read_text()
    seconds = time.perf_counter() - begin
    chance = random.Random(0)
    steps, kills, lost = [0], 0, 0
    report = {"seconds": seconds}
    while kills < N_RANDOM + N_PRECISE:
        if kills % 5 in (1, 3):
            kills_so_far = kills // 5 * 2 + kills % 5 // 2 + 1
            child = start(path, "--resume", before=kill_at(("before", "after")[kills_so_far % 2], kills_so_far))
        else:
            child = start(path, "--resume")
            time.sleep(chance.uniform(0, 0.25 * seconds))
            os.kill(child, signal.SIGKILL)
        code = end(child)
        assert code in (0, -signal.SIGKILL), (code, (folder / "output").read_text())
        kills += 1
        if path.exists():
            steps.append(found(path))
            lost += steps[-1] < steps[-2]
        if steps[-1] == TOTAL:  # the run is finished: the next one starts over in its place
            report.setdefault("finished", learned(path))
            for file in [path, *run_folder(path).iterdir()]:
                file.unlink()
            steps.append(0)
    report["kills"], report["lost"], report["resumed_from"] = kills, lost, sorted(set(steps))

    # Ctrl-C, SIGTERM, and a full disk
    path = folder / "ended.zip"
    for number in (signal.SIGINT, signal.SIGTERM):
        child = start(path, "--resume", before=signal_in_iteration(number, 3))
        report[number.name] = end(child), (folder / "output").read_text(), found(path)
    size = path.stat().st_size // 2
    child = start(path, "--resume", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    report["full"] = end(child), (folder / "output").read_text(), found(path)
    assert end(start(path, "--resume")) == 0, (folder / "output").read_text()
    expected = learned(reference)
    for name, other in (("finished", report.pop("finished", expected)), ("ended", learned(path))):
        report[f"{name}_differs_in"] = [
            key for key in expected if not th.equal(th.as_tensor(expected[key]), th.as_tensor(other[key]))
        ]
    report["left_behind"] = sorted(file.name for file in folder.rglob("*.part"))
    return report


if __name__ == "__main__":
    th.set_num_threads(1)
    tiny_model().learn(20)  # otherwise each child would repeat the imports that PyTorch defers to first use
    training_run.read_config = lambda name: dict(TINY)
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(kill_over_and_over(Path(temporary))))
