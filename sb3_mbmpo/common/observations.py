"""From raw observations to what the policies' networks see. The functions are values: they pickle.

Legend of shapes: ``O`` observation size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch as th

from sb3_mbmpo.common.finite import LARGE_MEAN


@dataclass(frozen=True)
class Standardization:
    """
    Observations less their mean, in standard deviations.

    :param mean: (O,), in the dtype of the policy
    :param mean_tail: what that dtype leaves of the mean, where it matters (O,) float64
    :param std: (O,)
    """

    mean: th.Tensor
    mean_tail: th.Tensor
    std: th.Tensor

    def __call__(self, obs: th.Tensor) -> th.Tensor:
        """
        Standardise observations.

        :param obs: (..., O), also integers
        :return: (..., O) in the dtype of the policy
        """
        mean, std = self.mean, self.std
        if not obs.is_floating_point() and obs.element_size() >= 4:
            obs = obs.double()  # counts
        centred = obs.to(mean.dtype) - mean
        if obs.dtype == th.float64:
            # Rounding before the subtraction would leave little of a small change of large numbers
            exactly = (obs - mean - self.mean_tail).to(mean.dtype)
            centred = th.where(mean.abs() > LARGE_MEAN * std, exactly, centred)
        return centred / std


@dataclass(frozen=True)
class VecNormalizeScaling:
    """
    What SB3's ``VecNormalize`` does to observations, in tensors.

    :param mean: (O,)
    :param std: (O,)
    :param clip_obs: the result is clipped to [-clip_obs, clip_obs]
    """

    mean: th.Tensor
    std: th.Tensor
    clip_obs: float

    def __call__(self, obs: th.Tensor) -> th.Tensor:
        """Scale raw observations (..., O)."""
        return ((obs - self.mean) / self.std).clamp(-self.clip_obs, self.clip_obs)


def unscaled(obs: th.Tensor) -> th.Tensor:
    """Return the observations as they are: there is no ``VecNormalize``."""
    return obs


@dataclass(frozen=True)
class PolicyInput:
    """
    Raw observations (..., O) -> what the policies' networks see (..., O).

    :param scale: as the environment's ``VecNormalize``, if there is one
    :param standardize: by the policy's own statistics
    """

    scale: Callable[[th.Tensor], th.Tensor]
    standardize: Standardization

    def __call__(self, obs: th.Tensor) -> th.Tensor:
        """Scale and standardise raw observations (..., O)."""
        return self.standardize(self.scale(obs))
