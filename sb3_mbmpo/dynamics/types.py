"""Inputs and outputs of the dynamics.

Legend of shapes: ``M`` members, ``B`` rows, ``O`` observation size, ``A`` width of an action, ``K`` choices.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th


class Transitions(NamedTuple):
    """
    Real transitions in raw units.

    :param obs: (B, O) float
    :param action: what the environment received, (B, A) float or (B, K) long
    :param next_obs: (B, O) float, never the first observation of the next episode
    :param reward: (B,) float
    :param terminated: (B,) bool; a time limit does not count
    """

    obs: th.Tensor
    action: th.Tensor
    next_obs: th.Tensor
    reward: th.Tensor
    terminated: th.Tensor


class Prediction(NamedTuple):
    """
    One imagined step of all members.

    :param next_obs: (M, B, O)
    :param reward: (M, B) if the ensemble learns the reward, else None
    :param termination_logit: (M, B) log-odds of termination if the ensemble learns it, else None
    """

    next_obs: th.Tensor
    reward: th.Tensor | None
    termination_logit: th.Tensor | None


# (obs (M, B, O), encoded action (M, B, A)[, standard normal noise (M, B, noise_dim)]) -> Prediction
StepFn = Callable[..., Prediction]
