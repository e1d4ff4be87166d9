"""How much the members of an ensemble disagree about a step, and a penalty for steps about which they disagree unusually.

Legend of shapes: ``M`` members, ``B`` rows, ``O`` observation size, ``A`` width of the encoded action.
"""

from dataclasses import dataclass

import torch as th

from sb3_mbmpo.dynamics.step import EnsembleStep

# Rows that are predicted at a time, so that the networks' activations stay in the processor's cache
ROWS_AT_A_TIME = 1_000
# A step whose disagreement is beyond this many times the typical one more is penalised no further
MAX_EXCESS = 5.0


def relative_spread(next_obs: th.Tensor, unit: th.Tensor) -> th.Tensor:
    """
    Return the standard deviation over the members, in standard deviations of the observed changes, averaged over dimensions.

    :param next_obs: predictions (M, B, O)
    :param unit: standard deviations of the observed changes (O,); 0 for dimensions that never change, which count as 0
    :return: (B,), 0 where all members agree
    """
    spread = next_obs.std(0, correction=0) / unit.masked_fill(unit == 0, th.inf)
    return spread.mean(1)


@dataclass(frozen=True)
class Disagreement:
    """
    The disagreement of all members about steps, as a function of tensors that can be pickled.

    :param step: the step of all members, without clipping; it predicts their means
    :param n_models: ``M``
    :param unit: standard deviations of the observed changes (O,)
    """

    step: EnsembleStep
    n_models: int
    unit: th.Tensor

    def __call__(self, obs: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        Measure the disagreement, see ``relative_spread``.

        :param obs: raw (B, O)
        :param action: encoded (B, A)
        :return: (B,) in single precision
        """
        expand = (self.n_models, -1, -1)
        parts = [
            relative_spread(self.step(some_obs.expand(expand), some_actions.expand(expand)).next_obs, self.unit).float()
            for some_obs, some_actions in zip(obs.split(ROWS_AT_A_TIME), action.split(ROWS_AT_A_TIME), strict=True)
        ]
        return th.cat(parts)


@dataclass(frozen=True)
class DisagreementPenalty:
    """
    The penalty of imagined steps about which the members disagree more than about real ones.

    Where they disagree, their errors are large (on HalfCheetah the rank correlation is 0.7 to 0.8), and a policy is drawn to
    errors in its favour. Yu et al. (2020) penalise a model's uncertainty likewise, for offline data; here the unit of both
    disagreement and penalty is taken from the data.

    :param disagreement: of all members
    :param typical: median disagreement about real steps, greater than 0
    :param weight: penalty for a disagreement of twice the typical one, in units of the reward
    """

    disagreement: Disagreement
    typical: float
    weight: float

    def __call__(self, obs: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        Return what is subtracted from the reward, 0 up to the typical disagreement.

        :param obs: raw (B, O)
        :param action: encoded (B, A)
        :return: (B,), from 0 to ``MAX_EXCESS`` times the weight
        """
        excess = (self.disagreement(obs, action) / self.typical - 1).clamp_(0, MAX_EXCESS)
        # Members that overflow, far from the data, agree about nothing
        return excess.nan_to_num_(nan=MAX_EXCESS).mul_(self.weight)
