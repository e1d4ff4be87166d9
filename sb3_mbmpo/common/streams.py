"""Random streams that belong to the work, not to the worker: a task's numbers are the same, whoever computes it."""

import numpy as np
import torch as th


def spawned(generator: th.Generator, number: int) -> list[th.Generator]:
    """
    Return independent generators, one for each piece of work.

    The given generator draws one seed, from which ``np.random.SeedSequence`` derives the others. So its own state afterwards,
    and the i-th stream, do not depend on ``number``.

    :param generator: draws the seed
    :param number: number of pieces of work
    """
    seed = int(th.randint(2**63 - 1, (), generator=generator, device=generator.device))
    seeds = np.random.SeedSequence(seed).generate_state(number, np.uint64)
    return [th.Generator(generator.device).manual_seed(int(child) >> 1) for child in seeds]
