"""The imagined step of an ensemble as a value: a function of tensors that holds its weights and can be pickled.

Legend of shapes: ``M`` members, ``B`` rows, ``O`` observation size, ``A`` width of the encoded action.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch as th

from sb3_mbmpo.dynamics.networks import Layer, forward
from sb3_mbmpo.dynamics.types import Prediction


class OutputLayout(NamedTuple):
    """
    The meaning of the columns of the networks' output.

    :param observation_dim: number of columns for the change of the observation, which come first
    :param target_dim: number of targets: those columns, and the reward if it is learned
    :param probabilistic: whether log-variances of the targets follow
    :param learned_termination: whether the last column is the log-odds of termination
    """

    observation_dim: int
    target_dim: int
    probabilistic: bool
    learned_termination: bool

    @property
    def output_dim(self) -> int:
        """Number of columns."""
        return self.target_dim * (2 if self.probabilistic else 1) + int(self.learned_termination)

    def split(self, output: th.Tensor) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Return the target mean, the raw log-variance (probabilistic only) and the termination logit (learned only)."""
        mean = output[..., : self.target_dim]
        log_var = output[..., self.target_dim : 2 * self.target_dim] if self.probabilistic else None
        logit = output[..., -1] if self.learned_termination else None
        return mean, log_var, logit


class NoiseBounds(NamedTuple):
    """
    Soft bounds of the log-variance that a probabilistic member predicts.

    :param upper: of the logarithm (M, 1, target_dim)
    :param lower_var: the lower bound as a variance (M, 1, target_dim)
    :param upper_var: the upper bound as a variance (M, 1, target_dim)
    :param target_std: makes standardised standard deviations raw ones (target_dim,)
    """

    upper: th.Tensor
    lower_var: th.Tensor
    upper_var: th.Tensor
    target_std: th.Tensor

    @classmethod
    def of(cls, lower: th.Tensor, upper: th.Tensor, target_std: th.Tensor) -> "NoiseBounds":
        """Return the bounds, given those of the logarithm."""
        return cls(upper.clone(), lower.exp(), upper.exp(), target_std.clone())

    def std(self, log_var: th.Tensor) -> th.Tensor:
        """
        Return raw standard deviations.

        :param log_var: what the members predict, unbounded (M, B, target_dim)
        :return: the root of exp(``softly_bounded(log_var)``), which is lower_var + upper_var sigmoid(log_var - upper)
        """
        within = (log_var - self.upper).sigmoid_()
        return th.addcmul(self.lower_var, self.upper_var, within).sqrt_().mul_(self.target_std)


@dataclass(frozen=True)
class EnsembleStep:
    """
    The function of one imagined step of some members.

    :param layers: from raw, centred observations and raw actions to raw targets: the standardisation is part of the weights
    :param activation_fn: a key of ``ACTIVATIONS``
    :param layout: meaning of the output's columns
    :param center: subtracted from observations (O,), in the dtype of the observations
    :param observation_range: predicted observations are clipped to it, lowest and highest (O,); None: no clipping
    :param noise_bounds: bounds of the variance of probabilistic members, else None
    :param generator: draws the noise of probabilistic members if the caller gives none; None: predict their mean
    """

    layers: tuple[Layer, ...]
    activation_fn: str
    layout: OutputLayout
    center: th.Tensor
    observation_range: tuple[th.Tensor, th.Tensor] | None
    noise_bounds: NoiseBounds | None
    generator: th.Generator | None

    @property
    def noise_dim(self) -> int:
        """How many random numbers a row takes."""
        return self.layout.target_dim if self.layout.probabilistic else 0

    def __call__(self, obs: th.Tensor, action: th.Tensor, noise: th.Tensor | None = None) -> Prediction:
        """
        Predict the next observations.

        :param obs: raw (M, B, O)
        :param action: encoded (M, B, A)
        :param noise: standard normal numbers for probabilistic members (M, B, ``noise_dim``)
        :return: one prediction for each of the ``M x B`` rows
        """
        layout = self.layout
        centred = obs - self.center
        if self.center.dtype == th.float64:
            centred = centred.float()
        output = forward(self.layers, th.cat([centred, action], dim=-1), self.activation_fn)
        target, log_var, logit = layout.split(output)
        if log_var is not None and (noise is not None or self.generator is not None):
            assert self.noise_bounds is not None
            std = self.noise_bounds.std(log_var)
            if noise is None:
                noise = th.randn(target.shape, generator=self.generator, device=target.device, dtype=target.dtype)
            target = th.addcmul(target, std, noise)
        next_obs = obs + target[..., : layout.observation_dim]
        if self.observation_range is not None:
            next_obs = th.clamp(next_obs, *self.observation_range)
        return Prediction(next_obs, target[..., -1] if layout.target_dim > layout.observation_dim else None, logit)
