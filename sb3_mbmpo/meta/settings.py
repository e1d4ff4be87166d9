"""The hyperparameters of meta-learning as a value."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sb3_mbmpo.imagination.rollouts import ImaginedRollouts
from sb3_mbmpo.meta.advantages import AdvantageEstimate, ValueFn, estimate_advantages


class MetaSettings(NamedTuple):
    """
    The hyperparameters of meta-training, which are documented at ``MBMPO``.

    :param outer_kwargs: keyword arguments of the outer step
    """

    n_tasks: int
    n_imagined_rollouts: int
    horizon: int
    n_inner_steps: int
    first_order: bool
    unadapted_share: float
    outer_optimizer: str
    outer_kwargs: Mapping[str, Any]
    gamma: float
    gae_lambda: float
    baseline: str
    normalize_advantage: bool
    ent_coef: float
    chunk_size: int

    def estimate(self, rollouts: ImaginedRollouts, critic: ValueFn | None) -> AdvantageEstimate:
        """
        Estimate the advantages of rollouts.

        :param rollouts: imagined rollouts, or real episodes in their format
        :param critic: the value function of the baseline "critic"
        """
        return estimate_advantages(
            rollouts,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            baseline=self.baseline,
            normalize=self.normalize_advantage,
            critic=critic,
        )
