"""
Compare the speed of an iteration on several processes with that on one: ``python -m tests.benchmarks.processes``.

Every repetition runs one training after another, so that a slow hour of the machine affects all of them. A process has one
thread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_mbmpo import MBMPO
from sb3_mbmpo.common.threads import worker_threads
from sb3_mbmpo.common.world import process_group
from sb3_mbmpo.zoo import ENV_ENTRIES, read_config
from tests.benchmarks.engine import CPU, ENTRIES

STAGES = ("dynamics_fit", "imagination", "meta_update")


class Clock(BaseCallback):
    """Collect the seconds of each iteration's stages."""

    def __init__(self) -> None:
        super().__init__()
        self.iterations: list[dict[str, float]] = []

    def _on_rollout_start(self) -> None:
        seconds = self.model.logger.name_to_value
        if "time/meta_update" in seconds:
            self.iterations.append({stage: seconds[f"time/{stage}"] for stage in STAGES})

    _on_training_end = _on_rollout_start

    def _on_step(self) -> bool:
        return True


def measure(arguments: argparse.Namespace) -> None:
    """Train in this process and those that ``torchrun`` started beside it, and let process 0 write the seconds."""
    entry = read_config(ENTRIES[arguments.size])
    env = make_vec_env(entry.get("env_id", ENTRIES[arguments.size]), seed=0, env_kwargs=entry.get("env_kwargs"))
    hyperparams = {key: value for key, value in entry.items() if key not in ENV_ENTRIES} | arguments.override
    with process_group() as world, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MBMPO(env=env, seed=0, device="cpu", **hyperparams)
        clock = Clock()
        # The last iteration has no step after it
        model.learn(model.learning_starts + (arguments.iterations - 1) * model.n_steps, clock, log_interval=None)
        if world.rank == 0:
            arguments.output.write_text(json.dumps(clock.iterations))


def seconds(arguments: argparse.Namespace, size: str, n_processes: int) -> dict[str, float]:
    """Return the median seconds of an iteration's stages, and of a whole one."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
        command += ["-m", "tests.benchmarks.processes", "--size", size, "--output", str(output)]
        command += ["--iterations", str(arguments.iterations), "--override", json.dumps(arguments.override)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        iterations = json.loads(output.read_text())
    found = {stage: median(iteration[stage] for iteration in iterations) for stage in STAGES}
    return found | {"whole": median(sum(iteration.values()) for iteration in iterations)}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure the requested sizes with the requested numbers of processes, and print the ratios."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.processes", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=ENTRIES, default=["pendulum", "half-cheetah"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeat", type=int, default=5, help="number of repetitions; the median ratio counts")
    parser.add_argument("--iterations", type=int, default=2, help="iterations of a training")
    parser.add_argument("--override", type=json.loads, default={}, help="arguments of MBMPO as JSON")
    parser.add_argument("--size", choices=ENTRIES, help="train in this process instead, as torchrun starts it")
    parser.add_argument("--output", type=Path, default=Path(".benchmarks/processes.json"))
    arguments = parser.parse_args(argv)
    if arguments.size is not None:
        measure(arguments)
        return []
    print(f"{worker_threads(CPU)} usable threads; load of the machine: {os.getloadavg()[0]:.1f}", flush=True)
    results = []
    for size in arguments.sizes:
        turns = [{n: seconds(arguments, size, n) for n in arguments.processes} for _ in range(arguments.repeat)]
        first = arguments.processes[0]
        for n in arguments.processes:
            times = {stage: median(turn[n][stage] for turn in turns) for stage in turns[0][n]}
            ratios = {stage: median(turn[first][stage] / turn[n][stage] for turn in turns) for stage in turns[0][n]}
            results.append({"size": size, "processes": n, "seconds": times, "times_as_fast": ratios})
            shown = ", ".join(f"{stage} {times[stage]:.1f} s ({ratios[stage]:.2f} x)" for stage in times)
            print(f"{size}, {n} process(es), compared with {first}: {shown}", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
