"""Advantages of imagined rollouts: baselines, bootstrapping and generalised advantage estimation, for all tasks at once.

Legend of shapes: ``T`` tasks, ``H`` horizon, ``N`` rollouts per task, ``O`` observation size, ``F`` features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_mbmpo.imagination.rollouts import ImaginedRollouts

RIDGE = 1e-5
# Added to the standard deviation by which advantages are divided; for small advantages, it is this share of the largest
STD_FLOOR, RELATIVE_STD_FLOOR = 1e-8, 1e-4
# Standardised observations (..., O) -> values (...), in units of the reward
ValueFn = Callable[[th.Tensor], th.Tensor]
# A hundred further features need more regularisation; the scale suits standardised observations
N_FOURIER, FOURIER_SCALE, FOURIER_RIDGE = 100, 1.2, 1e-3


def discounted_returns(rewards: th.Tensor, alive: th.Tensor, gamma: float) -> th.Tensor:
    """
    Compute the discounted return from each step on.

    :param rewards: (T, H, N)
    :param alive: (T, H, N) bool; rewards of other steps do not count
    :param gamma: discount factor
    :return: discounted sum of the rewards from each step on (T, H, N)
    """
    returns = rewards * alive
    _accumulate(returns, th.tensor(gamma, dtype=rewards.dtype, device=rewards.device).expand_as(rewards))
    return returns


def _accumulate(values: th.Tensor, decay: th.Tensor) -> None:
    """
    Accumulate values_t += decay_t values_{t+1}, in place and backwards in time, by one small operation per step.

    :param values: (T, H, N)
    :param decay: (T, H, N)
    """
    steps = list(zip(values.unbind(1), decay.unbind(1), strict=True))
    for (value, factor), (following, _) in zip(steps[-2::-1], steps[:0:-1], strict=True):
        value.addcmul_(factor, following)


def linear_features(policy_input: th.Tensor) -> th.Tensor:
    """
    Compute the features of the authors' linear baseline (Duan et al. 2016).

    They are s, s^2, t/100, (t/100)^2, (t/100)^3 and 1, with s clipped to [-10, 10].

    :param policy_input: standardised observations (T, H, N, O)
    :return: (T, H, N, 2 O + 4)
    """
    observation_dim = policy_input.shape[-1]
    features = policy_input.new_empty((*policy_input.shape[:-1], 2 * observation_dim + 4))
    clipped = th.clamp(policy_input, -10, 10, out=features[..., :observation_dim])
    th.square(clipped, out=features[..., observation_dim : 2 * observation_dim])
    features[..., 2 * observation_dim :] = _time_features(policy_input)
    return features


def _time_features(policy_input: th.Tensor) -> th.Tensor:
    """Return t/100, (t/100)^2, (t/100)^3, 1 for each step, the same for all tasks and rollouts (H, 1, 4)."""
    time = th.arange(policy_input.shape[1], device=policy_input.device, dtype=policy_input.dtype).view(-1, 1, 1) / 100
    return th.cat([time, time**2, time**3, th.ones_like(time)], dim=-1)


def linear_baseline(policy_input: th.Tensor, returns: th.Tensor, alive: th.Tensor) -> th.Tensor:
    """
    Fit each task's returns by ridge regression on the linear features (Duan et al. 2016), and return the predictions.

    :param policy_input: standardised observations (T, H, N, O)
    :param returns: discounted returns (T, H, N)
    :param alive: (T, H, N) bool; other steps do not enter the fit
    :return: predicted values (T, H, N)
    """
    return _ridge_regression(linear_features(policy_input), returns, alive, RIDGE)


def time_baseline(policy_input: th.Tensor, returns: th.Tensor, alive: th.Tensor) -> th.Tensor:
    """
    Fit each task's returns by ridge regression on the time only: t/100, (t/100)^2, (t/100)^3, 1.

    :param policy_input: standardised observations (T, H, N, O); only their shape matters
    :param returns: discounted returns (T, H, N)
    :param alive: (T, H, N) bool; other steps do not enter the fit
    :return: predicted values (T, H, N)
    """
    features = _time_features(policy_input).expand(*policy_input.shape[:-1], -1).clone()
    return _ridge_regression(features, returns, alive, RIDGE)


def fourier_baseline(policy_input: th.Tensor, returns: th.Tensor, alive: th.Tensor) -> th.Tensor:
    """
    Fit each task's returns by ridge regression on the linear and random Fourier features (Rahimi and Recht 2007).

    The latter are cosines along fixed random directions, for values that are not a sum of squares, such as where an action
    comes too late to prevent something. It is slower, and suits many rows only.

    :param policy_input: standardised observations (T, H, N, O)
    :param returns: discounted returns (T, H, N)
    :param alive: (T, H, N) bool; other steps do not enter the fit
    :return: predicted values (T, H, N)
    """
    observation_dim = policy_input.shape[-1]
    generator = th.Generator().manual_seed(0)
    directions = th.randn((observation_dim, N_FOURIER), generator=generator) * (FOURIER_SCALE / observation_dim**0.5)
    phases = 2 * th.pi * th.rand(N_FOURIER, generator=generator)
    angles = policy_input.clamp(-10, 10) @ directions.to(policy_input) + phases.to(policy_input)
    features = th.cat([linear_features(policy_input), th.cos(angles)], dim=-1)
    # Otherwise the stronger ridge would pull the mean towards 0
    mean = (returns * alive).sum((1, 2), keepdim=True) / alive.sum((1, 2), keepdim=True).clamp(min=1)
    return mean + _ridge_regression(features, returns - mean, alive, FOURIER_RIDGE)


def _ridge_regression(features: th.Tensor, returns: th.Tensor, alive: th.Tensor, strength: float) -> th.Tensor:
    """Return the predictions (T, H, N) of each task's regression on features (T, H, N, F), which are overwritten."""
    features = features.flatten(1, 2)
    features *= alive.flatten(1).unsqueeze(-1)
    # Means, not sums: the strength of the ridge does not depend on the number of rows, and float32 keeps its precision
    n_rows = alive.sum((1, 2)).clamp(min=1).to(features.dtype).view(-1, 1, 1)
    gram = (features.transpose(1, 2) @ features / n_rows).double()
    moment = (features.transpose(1, 2) @ returns.flatten(1).unsqueeze(-1) / n_rows).double()
    ridge = strength * th.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    weights: th.Tensor = th.linalg.solve(gram + ridge, moment).to(features.dtype)
    return (features @ weights).view_as(returns)


def generalized_advantages(
    rewards: th.Tensor,
    values: th.Tensor,
    *,
    alive: th.Tensor,
    terminated: th.Tensor,
    gamma: float,
    gae_lambda: float,
) -> th.Tensor:
    """
    Estimate advantages by GAE (Schulman et al. 2016).

    Nothing is bootstrapped after a termination; at the horizon, the value of the following observation is.

    :param rewards: (T, H, N)
    :param values: baseline values of each step's observation, and of the one after the last step (T, H + 1, N)
    :param alive: (T, H, N) bool
    :param terminated: (T, H, N) bool
    :param gamma: discount factor
    :param gae_lambda: trade-off of bias (0) and variance (1)
    :return: advantages (T, H, N), 0 where not alive
    """
    goes_on = (alive & ~terminated).to(rewards.dtype)
    advantages = (rewards + gamma * goes_on * values[:, 1:] - values[:, :-1]) * alive
    _accumulate(advantages, gamma * gae_lambda * goes_on)
    return advantages


def standardize(advantages: th.Tensor, alive: th.Tensor) -> th.Tensor:
    """
    Standardise the advantages of each task.

    :param advantages: (T, H, N)
    :param alive: (T, H, N) bool
    :return: advantages with mean 0 and standard deviation 1 over the living steps of each task, 0 elsewhere
    """
    smallest = th.finfo(advantages.dtype).tiny
    # Dividing by a power of two is exact, and keeps the squares of advantages of any size within single precision
    living = advantages * alive
    largest = living.abs().amax((1, 2), keepdim=True).clamp(min=smallest)
    unit = largest / (2 * th.frexp(largest).mantissa)
    living /= unit
    count = alive.sum((1, 2), keepdim=True).clamp(min=1)
    centred = (living - living.sum((1, 2), keepdim=True) / count) * alive
    std = (centred.square().sum((1, 2), keepdim=True) / count).sqrt()
    return centred / (std + (STD_FLOOR / unit).clamp(smallest, RELATIVE_STD_FLOOR))


FITTED_BASELINES = {"linear": linear_baseline, "fourier": fourier_baseline, "time": time_baseline}
BASELINES = ("critic", *FITTED_BASELINES, "zero")


@th.no_grad()
def baseline_values(rollouts: ImaginedRollouts, gamma: float, baseline: str, critic: ValueFn | None = None) -> th.Tensor:
    """
    Evaluate a baseline at every imagined observation.

    Only a critic has a value after the last step. For the other baselines it is 0, as in the authors' code: they treat the
    horizon as the end of the task, and know the time.

    :param rollouts: imagined rollouts
    :param gamma: discount factor
    :param baseline: "critic", "linear", "fourier", "time" or "zero"
    :param critic: the value function of "critic"
    :return: values of each step's observation, and of the one after the last step (T, H + 1, N)
    """
    if baseline == "critic":
        assert critic is not None
        return th.cat([critic(rollouts.policy_input), critic(rollouts.final_input)], dim=1)
    if baseline in FITTED_BASELINES:
        returns = discounted_returns(rollouts.rewards, rollouts.alive, gamma)
        values = FITTED_BASELINES[baseline](rollouts.policy_input, returns, rollouts.alive)
    else:
        values = th.zeros_like(rollouts.rewards)
    return th.cat([values, th.zeros_like(values[:, :1])], dim=1)


class AdvantageEstimate(NamedTuple):
    """
    Advantages of imagined rollouts, with the values and returns from which they are computed.

    :param advantages: for the policy gradient, standardised if requested (T, H, N)
    :param values: values of the baseline (T, H, N)
    :param returns: lambda-returns, the targets of a critic (T, H, N)
    """

    advantages: th.Tensor
    values: th.Tensor
    returns: th.Tensor


@th.no_grad()
def estimate_advantages(
    rollouts: ImaginedRollouts,
    *,
    gamma: float,
    gae_lambda: float,
    baseline: str,
    normalize: bool,
    critic: ValueFn | None = None,
) -> AdvantageEstimate:
    """
    Estimate the advantages of imagined rollouts.

    :param rollouts: imagined rollouts; what counts are their rewards less the penalties
    :param gamma: discount factor
    :param gae_lambda: see ``generalized_advantages``
    :param baseline: "critic", "linear", "fourier", "time" or "zero"
    :param normalize: standardise the advantages of each task
    :param critic: the value function of the baseline "critic"
    :return: advantages, and the values and lambda-returns whose difference they are
    """
    rollouts = rollouts._replace(rewards=rollouts.rewards - rollouts.penalties)
    values = baseline_values(rollouts, gamma, baseline, critic)
    raw = generalized_advantages(
        rollouts.rewards,
        values,
        alive=rollouts.alive,
        terminated=rollouts.terminated,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    values = values[:, :-1] * rollouts.alive
    return AdvantageEstimate(
        advantages=standardize(raw, rollouts.alive) if normalize else raw, values=values, returns=raw + values
    )
