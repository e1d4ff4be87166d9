"""Where imagined rollouts start.

Legend of shapes: ``B`` rows, ``O`` observation size.
"""

from dataclasses import dataclass

import torch as th


@dataclass(frozen=True)
class StartSampler:
    """
    Sampler of the first observations of imagined rollouts.

    :param pool: raw observations to choose from (B, O), the most recent ones last
    :param n_recent: how many of them are new since the previous fit
    :param recent_share: share of the starts that are drawn from the new ones
    :param generator: draws the starts
    """

    pool: th.Tensor
    n_recent: int
    recent_share: float
    generator: th.Generator

    def __call__(self, rows: int) -> th.Tensor:
        """
        Draw first observations with replacement.

        :param rows: how many
        :return: raw observations (rows, O)
        """
        device = self.pool.device
        chosen = th.randint(len(self.pool), (rows,), generator=self.generator, device=device)
        if self.recent_share > 0 and self.n_recent > 0:
            is_recent = th.rand(rows, generator=self.generator, device=device) < self.recent_share
            recent = th.randint(self.n_recent, (rows,), generator=self.generator, device=device)
            chosen = th.where(is_recent, len(self.pool) - self.n_recent + recent, chosen)
        return self.pool[chosen]
