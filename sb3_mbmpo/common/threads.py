"""Coarse parallelism: a few threads, each of which does a large share of the work with single-threaded operations.

PyTorch's own threads split every small operation and synchronise after each. If another process takes one of their cores,
all of them wait for it each time, and two threads are many times slower than one. Threads that synchronise only after a whole
imagined rollout, or a gradient, lose no more than the core that was taken.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch as th

Result = TypeVar("Result")


def worker_threads(device: th.device) -> int:
    """
    Return the number of threads that may work at a time.

    :param device: where the tensors are
    :return: ``torch.get_num_threads()`` (which ``OMP_NUM_THREADS`` sets), but never more than the CPUs that this process may
        use by its affinity or its container's quota; 1 on GPUs, which are parallel themselves
    """
    return min(th.get_num_threads(), _usable_cpus()) if device.type == "cpu" else 1


def _usable_cpus() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")  # a container's quota: microseconds of CPU time, or "max", per period
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            cpus = min(cpus, max(1, int(limit) // int(period)))
    return cpus


def worthwhile_threads(work: float, cost: float) -> int:
    """
    Return how many threads should share some work.

    Because of the GIL, threads wait for one another between operations: ``n`` of them take work / n + n cost, which is least
    for ``n`` = sqrt(work / cost). It is rounded down, because a thread that gains nothing may slow down others.

    :param work: of a single thread, between two points at which threads may wait for one another
    :param cost: what each further thread costs all others at such a point, in the same unit
    """
    return max(1, math.isqrt(int(work / cost)))


def even_shares(number: int, n_shares: int) -> list[slice]:
    """Split ``range(number)`` into slices whose sizes differ by at most one."""
    return [slice(*bounds) for bounds in pairwise(i * number // n_shares for i in range(n_shares + 1))]


@contextmanager
def single_threaded_operations() -> Iterator[None]:
    """Make PyTorch's operations on CPUs use one thread inside the block, and as many as before afterwards."""
    before = th.get_num_threads()
    th.set_num_threads(1)
    try:
        yield
    finally:
        th.set_num_threads(before)


def in_parallel(jobs: Sequence[Callable[[], Result]], n_threads: int) -> list[Result]:
    """
    Run all jobs in threads with single-threaded operations.

    The threads end with the call: starting them takes only 0.1 ms, and a permanent pool would not survive a fork.

    :param jobs: functions without arguments that write to nothing shared. Gradients are recorded unless a job disables them,
        whatever the caller's mode
    :param n_threads: maximum number of threads; with 1, or a single job, everything runs in the caller's thread
    :return: the results, in the order of the jobs
    :raises Exception: the first exception of a job, raised once the running jobs have ended
    """
    if n_threads == 1 or len(jobs) == 1:
        with th.enable_grad():
            return [job() for job in jobs]
    # PyTorch keeps this setting for each thread, and for threads that start later
    with (
        single_threaded_operations(),
        ThreadPoolExecutor(min(n_threads, len(jobs)), initializer=th.set_num_threads, initargs=(1,)) as pool,
    ):
        return list(pool.map(lambda job: job(), jobs))
