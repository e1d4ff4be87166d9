"""Where imagined rollouts start.

Legend of shapes: ``T`` tasks, ``B`` rows, ``O`` observation size.
"""

from dataclasses import dataclass

import torch as th

from sb3_mbmpo.common.streams import spawned


@dataclass(frozen=True)
class StartSampler:
    """
    Sampler of the first observations of imagined rollouts.

    :param pool: raw observations to choose from (B, O), the most recent ones last
    :param n_recent: how many of them are new since the previous fit
    :param recent_share: share of the starts that are drawn from the new ones
    :param generator: determines each task's own stream of starts
    """

    pool: th.Tensor
    n_recent: int
    recent_share: float
    generator: th.Generator

    def __call__(self, n_tasks: int, rows: int) -> th.Tensor:
        """
        Draw first observations with replacement.

        :param n_tasks: number of tasks
        :param rows: how many for each task
        :return: raw observations (T, rows, O)
        """
        return self.pool[th.stack([self._draw(rows, stream) for stream in spawned(self.generator, n_tasks)])]

    def _draw(self, rows: int, stream: th.Generator) -> th.Tensor:
        """Return row numbers of the pool (rows,)."""
        device = self.pool.device
        chosen = th.randint(len(self.pool), (rows,), generator=stream, device=device)
        if self.recent_share > 0 and self.n_recent > 0:
            is_recent = th.rand(rows, generator=stream, device=device) < self.recent_share
            recent = th.randint(self.n_recent, (rows,), generator=stream, device=device)
            chosen = th.where(is_recent, len(self.pool) - self.n_recent + recent, chosen)
        return chosen
