"""Programs that ``test_processes`` starts with ``torchrun ... -m learning_together NAME``."""

import datetime
import os
import signal
import sys
import time
from pathlib import Path

import torch as th
import torch.distributed as dist
from killed_runs import TINY
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize
from test_workers import CASES, state
from tiny import tiny_model, vec_drift

from sb3_mbmpo.__main__ import main
from sb3_mbmpo.cli import training_run
from sb3_mbmpo.common.world import ProcessLostError, World
from sb3_mbmpo.dynamics import groups

WORKER = int(os.environ.get("RANK", 0)) > 0


class At(BaseCallback):
    """Call a function at a number of real steps, and return what it returns, or True."""

    def __init__(self, step, function):
        super().__init__()
        self.step, self.function = step, function

    def _on_step(self):
        return self.function() if self.num_timesteps == self.step else True


def fail():
    raise ArithmeticError("the robot fell over")


def three_models(case):
    env, options = CASES[case]
    env.action_space.seed(0)
    return tiny_model(env, **{"n_models": 3, "n_tasks": 6, **options})


def equal(path, same_digits_up_to):
    """Train every case, with the same groups of models in any number of processes, and save what process 0 learned."""
    groups.SAME_DIGITS_UP_TO = int(same_digits_up_to)
    found = {case: state(three_models(case).learn(60)) for case in CASES}
    normalized = tiny_model(VecNormalize(vec_drift(2)), n_models=3, n_tasks=6)
    found["VecNormalize"] = state(normalized.learn(40).learn(40, reset_num_timesteps=False))
    if not WORKER:
        th.save(found, path)


def stopped():
    model = tiny_model().learn(200, callback=At(50, lambda: False))
    print(f"{World.current().rank} ended after {model.num_timesteps}", flush=True)


def caught():
    """Process 0 catches an error and lives on; the other one must not wait for it."""
    try:
        tiny_model().learn(200, callback=At(50, fail))
    except ArithmeticError:
        time.sleep(5)  # torchrun ends it as soon as the other process has failed
        print("0 was not ended", flush=True)
    except ProcessLostError as error:
        print(f"1 says: {error}", flush=True)


def worker_fails():
    """A process other than 0 cannot imagine, and torchrun ends the others."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        tiny_model(reward_fn=lambda obs, action, next_obs: next_obs[:, 0] * (float("nan") if WORKER else 1)).learn(200)
    except ProcessLostError as error:
        print(f"0 says: {error}", flush=True)


def different():
    tiny_model(inner_lr=0.2 if WORKER else 0.1).learn(40)


def too_many():
    tiny_model().learn(40)


def command_line(path, kill_at=None):
    """Train by the command line; a process other than 0 kills itself in the iteration with the given number."""
    training_run.read_config = lambda name: dict(TINY)
    groups.SAME_DIGITS_UP_TO = 2  # the same groups in one process and in two
    if WORKER and kill_at is not None:
        from sb3_mbmpo import MBMPO

        left, original = [int(kill_at)], MBMPO._improve

        def counted(*arguments):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        MBMPO._improve = counted
    options = ["--no-progress-bar", "--eval-episodes", "1", "--eval-at", "60", "--total-timesteps", "100"]
    main(["train", "--env", "Tiny", "--save", path, *options, *(["--resume"] if Path(path).exists() else [])])


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name != "command_line":
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    globals()[name](*arguments)
