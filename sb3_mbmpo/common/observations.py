"""Functions from raw observations to the input of the policies' networks. They are values, so they can be pickled.

Legend of shapes: ``O`` observation size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch as th

from sb3_mbmpo.common.finite import LARGE_MEAN


@dataclass(frozen=True)
class Standardization:
    """
    Standardisation of observations: the mean is subtracted, and the result is divided by the standard deviation.

    :param mean: (O,), in the dtype of the policy
    :param mean_tail: the part of the mean that rounding to that dtype loses, where it matters (O,) float64
    :param std: (O,)
    """

    mean: th.Tensor
    mean_tail: th.Tensor
    std: th.Tensor

    def __call__(self, obs: th.Tensor) -> th.Tensor:
        """
        Standardise observations.

        :param obs: (..., O), floating or integer
        :return: (..., O) in the dtype of the policy
        """
        mean, std = self.mean, self.std
        if not obs.is_floating_point() and obs.element_size() >= 4:
            obs = obs.double()  # single precision cannot hold all integers of 32 bits
        centred = obs.to(mean.dtype) - mean
        if obs.dtype == th.float64:
            # Rounding before the subtraction would lose small changes of large numbers
            exactly = (obs - mean - self.mean_tail).to(mean.dtype)
            centred = th.where(mean.abs() > LARGE_MEAN * std, exactly, centred)
        return centred.div_(std)


@dataclass(frozen=True)
class VecNormalizeScaling:
    """
    The scaling of observations by SB3's ``VecNormalize``, for tensors.

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
    """Return the observations unchanged, for environments without ``VecNormalize``."""
    return obs


@dataclass(frozen=True)
class PolicyInput:
    """
    The function from raw observations (..., O) to the input of the policies' networks (..., O).

    :param scale: the scaling of the environment's ``VecNormalize``, or ``unscaled``
    :param standardize: standardisation by the policy's own statistics
    """

    scale: Callable[[th.Tensor], th.Tensor]
    standardize: Standardization

    def __call__(self, obs: th.Tensor) -> th.Tensor:
        """Scale and standardise raw observations (..., O)."""
        return self.standardize(self.scale(obs))
