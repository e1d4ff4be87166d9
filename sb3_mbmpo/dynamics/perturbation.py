"""Deliberately wrong models, to study how much model error a policy tolerates, as Clavera et al. (2018) do.

Legend of shapes: ``M`` members, ``B`` rows, ``O`` observation size, ``A`` width of the encoded action.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch as th

from sb3_mbmpo.common.finite import in_float32
from sb3_mbmpo.dynamics.ensemble import DynamicsEnsemble
from sb3_mbmpo.dynamics.step import EnsembleStep
from sb3_mbmpo.dynamics.types import Prediction


def output_bias_array(output_bias: float | Sequence[Sequence[float]] | np.ndarray, draws: np.ndarray) -> np.ndarray:
    """
    Convert the argument ``output_bias`` to an array.

    :param output_bias: the bias of each member (M, O), or the standard deviation of random biases
    :param draws: standard normal numbers (M, O), which the standard deviation multiplies
    :return: the biases, in standard deviations of the observed changes (M, O)
    :raises ValueError: if ``output_bias`` is a negative number, has another shape, or is not finite
    """
    try:
        bias = np.asarray(output_bias, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`output_bias` must be a number or an array of numbers, not {output_bias!r}.") from error
    if bias.shape not in ((), draws.shape) or not in_float32(bias).all() or (bias.ndim == 0 and bias < 0):
        raise ValueError(
            "`output_bias` must be a finite number of at least 0, or a finite array with a row for each member and a column "
            f"for each observation, of shape {draws.shape}, not {output_bias!r}."
        )
    return bias * draws if bias.ndim == 0 else bias


@dataclass(frozen=True)
class PerturbedStep:
    """
    The imagined step of an ensemble, with deliberate errors in the predicted observations.

    :param exact: the step without these errors, and without clipping
    :param unit: standard deviations of the observed changes (O,)
    :param bias: constant error, raw (M, 1, O)
    :param output_noise: standard deviation of the noise, in multiples of ``unit``
    :param observation_range: lowest and highest observation after the errors (O,); None: no clipping
    :param generator: draws the noise if the caller gives none
    """

    exact: EnsembleStep
    unit: th.Tensor
    bias: th.Tensor
    output_noise: float
    observation_range: tuple[th.Tensor, th.Tensor] | None
    generator: th.Generator | None

    @property
    def noise_dim(self) -> int:
        """How many random numbers a row takes: those of the exact step, then one for each dimension."""
        return self.exact.noise_dim + (len(self.unit) if self.output_noise > 0 else 0)

    def __call__(self, obs: th.Tensor, action: th.Tensor, noise: th.Tensor | None = None) -> Prediction:
        """
        Predict the next observations, with errors.

        :param obs: raw (M, B, O)
        :param action: encoded (M, B, A)
        :param noise: standard normal numbers (M, B, ``noise_dim``); None: the generators draw them
        :return: one prediction for each of the ``M x B`` rows
        """
        inner = self.exact.noise_dim
        prediction = self.exact(obs, action, noise[..., :inner] if noise is not None and inner > 0 else None)
        next_obs = prediction.next_obs + self.bias
        if self.output_noise > 0:
            if noise is None:
                errors = th.randn(obs.shape, generator=self.generator, device=obs.device, dtype=self.unit.dtype)
            else:
                errors = noise[..., inner:]
            next_obs = th.addcmul(next_obs, errors, self.unit, value=self.output_noise)
        if self.observation_range is not None:
            next_obs = th.clamp(next_obs, *self.observation_range)
        return prediction._replace(next_obs=next_obs)


def perturbed_step_fn(
    dynamics: DynamicsEnsemble,
    generator: th.Generator | None,
    *,
    clip_margin: float | None,
    members: Sequence[int] | None,
    output_bias: np.ndarray,
    output_noise: float,
) -> EnsembleStep | PerturbedStep:
    """
    Return ``dynamics.step_fn`` with errors added to the predicted observations; unchanged if there are no errors.

    Errors are in standard deviations of the observed changes, so that one number suits dimensions of any scale; dimensions
    that never change have no error. Errors are added before the clipping, so that the imagination stays near the data however
    bad the models are.

    :param dynamics: the ensemble
    :param generator: draws the noise if the caller of the function gives none; None if nothing is drawn
    :param clip_margin: see ``DynamicsEnsemble.step_fn``
    :param members: the ``M`` members of the function; None: all
    :param output_bias: constant error of every member of the ensemble, chosen or not, (n_models, O)
    :param output_noise: standard deviation of the noise of each step
    :return: a function of (obs (M, B, O), encoded action (M, B, A))
    """
    is_exact = not output_bias.any() and output_noise == 0
    exact = dynamics.step_fn(clip_margin if is_exact else None, generator=generator, members=members)
    if is_exact:
        return exact
    unit = dynamics.target_std[: dynamics.observation_dim].clone()
    chosen = slice(None) if members is None else list(members)
    return PerturbedStep(
        exact=exact,
        unit=unit,
        bias=unit * th.as_tensor(output_bias[chosen], dtype=unit.dtype, device=unit.device).unsqueeze(1),
        output_noise=output_noise,
        observation_range=None if clip_margin is None else dynamics.observation_range(clip_margin),
        generator=generator,
    )
