"""Several processes of this machine from one command, ``--workers``: it becomes ``torchrun`` with the same arguments."""

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch as th
from stable_baselines3.common.utils import get_device

from sb3_mbmpo.common.threads import worker_threads
from sb3_mbmpo.dynamics.ensemble import NET_ARCH
from sb3_mbmpo.dynamics.groups import worthwhile_processes
from sb3_mbmpo.mbmpo import MBMPO
from sb3_mbmpo.zoo import merge, read_config


def number_or_auto(text: str) -> int | str:
    """
    Read the value of ``--workers``.

    :raises argparse.ArgumentTypeError: if it is neither a positive integer nor "auto"
    """
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a number of processes, at least 1, or auto, not {text!r}")
    return int(text)


def chosen_number(config: dict[str, Any], device: str) -> int:
    """
    Choose the number of processes for settings.

    :param config: an entry of ``zoo_configs/mbmpo.yml``
    :param device: as for ``MBMPO``
    """
    cpu = get_device(device)
    if cpu.type != "cpu":
        return 1
    n_models = config.get("n_models", inspect.signature(MBMPO).parameters["n_models"].default)
    # The widths of inputs and outputs, which the environment would tell, hardly matter
    hidden = (config.get("dynamics_kwargs") or {}).get("net_arch", NET_ARCH)
    return worthwhile_processes(n_models, 2 * sum(a * b for a, b in pairwise(hidden)), worker_threads(cpu))


def become_torchrun(argv: Sequence[str], number: int) -> None:
    """
    Replace this process by ``torchrun``, which starts processes of the same command; the CPUs are divided among them.

    :param argv: the arguments of the command line
    :param number: number of processes
    """
    threads = max(1, worker_threads(th.device("cpu")) // number)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    command += ["-m", "sb3_mbmpo", *argv, "--workers", "1"]  # the last one counts
    sys.stdout.flush()
    os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": str(threads)})


def start_workers(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """
    Start the processes that ``--workers`` asks for; return if it is one, which is this process.

    :param arguments: the parsed arguments
    :param argv: the arguments
    :raises ValueError: if ``torchrun`` has started this process already
    """
    if arguments.workers == 1:
        return
    if th.distributed.is_torchelastic_launched():
        raise ValueError("--workers starts the processes by itself: leave it out with torchrun, which has started this one.")
    number = arguments.workers
    if number == "auto":
        number = chosen_number(merge(read_config(arguments.env), arguments.set), arguments.device)
    if number > 1:
        become_torchrun(argv, number)
