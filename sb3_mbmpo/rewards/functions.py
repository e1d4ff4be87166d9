"""Rewards and terminations of Gymnasium's environments as functions of batches of transitions.

Shapes: ``B`` rows, ``O`` observation size, ``A`` action size. Every function is vectorised torch, keeps the dtype and device
of the observations and can be pickled (module-level functions under ``functools.partial``), because models are saved.

Where Gymnasium rewards a displacement divided by ``dt``, the position is not in the observation. It is approximated by the
velocities at both ends of the step; the velocity of ``obs`` or ``next_obs`` alone is 2 to 20 times less accurate.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

# (obs [B, O], action, next_obs [B, O]) -> float [B]. The action is what the environment received: float [B, A] within the
# bounds (Box), long [B] (Discrete), long [B, k] (MultiDiscrete, MultiBinary).
RewardFn = Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor]
# next_obs [B, O] -> bool [B]. Termination only: a time limit is not one.
TerminationFn = Callable[[th.Tensor], th.Tensor]
# A number computed from an observation: [B, O] -> [B]
Feature = Callable[[th.Tensor], th.Tensor]

Interval = tuple[float, float]
Bounds = tuple[tuple[slice, Interval], ...]


class EnvFunctions(NamedTuple):
    """
    The reward and the termination of an environment.

    :param reward_fn: (obs [B, O], action, next_obs [B, O]) -> float [B]
    :param termination_fn: next_obs [B, O] -> bool [B]
    :param approximation: what is not exact, and the error; "" if both are exact up to rounding
    :param is_termination_exact: whether ``approximation`` is about the reward only
    """

    reward_fn: RewardFn
    termination_fn: TerminationFn
    approximation: str = ""
    is_termination_exact: bool = True


# -- Termination ----------------------------------------------------------------------------------------------------------


def never_terminates(next_obs: th.Tensor) -> th.Tensor:
    """Return False for every row; callers may test ``fn is never_terminates`` to skip the masks."""
    return th.zeros(len(next_obs), dtype=th.bool, device=next_obs.device)


def outside(next_obs: th.Tensor, *, bounds: Bounds) -> th.Tensor:
    """
    Tell which rows leave their bounds.

    :param next_obs: [B, O]
    :param bounds: pairs of columns and the open interval in which they must lie; (-inf, inf) requires finite numbers
    :return: whether any column is outside its interval, or NaN; bool [B]
    """
    terminated = never_terminates(next_obs)
    for columns, (low, high) in bounds:
        values = next_obs[:, columns]
        terminated = terminated | ~((values > low) & (values < high)).all(dim=1)
    return terminated


def reached(next_obs: th.Tensor, *, goal_position: float, goal_velocity: float) -> th.Tensor:
    """Tell which rows have reached MountainCar's flag."""
    return (next_obs[:, 0] >= goal_position) & (next_obs[:, 1] >= goal_velocity)


def swung_up(next_obs: th.Tensor) -> th.Tensor:
    """Tell where Acrobot's free end is above the line. Observation: cos and sin of both angles, two velocities."""
    cos1, sin1, cos2, sin2 = next_obs[:, :4].unbind(dim=1)
    return -cos1 - (cos1 * cos2 - sin1 * sin2) > 1.0


def tip(next_obs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Return x [B] and height [B] of the end of InvertedDoublePendulum's second pole (both poles are 0.6 long)."""
    x, sin1, sin2, cos1, cos2 = next_obs[:, :5].unbind(dim=1)
    return x + 0.6 * (sin1 + sin1 * cos2 + cos1 * sin2), 0.6 * (cos1 + cos1 * cos2 - sin1 * sin2)


def fallen(next_obs: th.Tensor) -> th.Tensor:
    """Tell where InvertedDoublePendulum has fallen."""
    return tip(next_obs)[1] <= 1.0


# -- Rewards --------------------------------------------------------------------------------------------------------------


def squared_norm(vectors: th.Tensor) -> th.Tensor:
    """Return the squared Euclidean norm of each row, [B, A] -> [B]."""
    return vectors.square().sum(dim=1)


def column(obs: th.Tensor, *, index: int) -> th.Tensor:
    """Return one column of the observations, [B, O] -> [B]."""
    return obs[:, index]


def constant_reward(
    obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor, *, running: float, final: float, terminated: TerminationFn
) -> th.Tensor:
    """Return ``running`` for every step except the terminal one, which earns ``final``."""
    return running + (final - running) * terminated(next_obs).to(next_obs.dtype)


def pendulum_reward(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
    """Return Pendulum's reward, of the state *before* the step. Observation: cos, sin, angular velocity."""
    angle, velocity = th.atan2(obs[:, 1], obs[:, 0]), obs[:, 2]
    return -(angle.square() + 0.1 * velocity.square() + 0.001 * squared_norm(action))


def mountain_car_reward(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor, *, terminated: TerminationFn) -> th.Tensor:
    """Return MountainCarContinuous's reward: 100 at the flag, minus the control cost."""
    return 100.0 * terminated(next_obs).to(next_obs.dtype) - 0.1 * squared_norm(action)


def double_pendulum_reward(
    obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor, *, healthy_reward: float, fallen_reward: float
) -> th.Tensor:
    """Return InvertedDoublePendulum's reward: a bonus, minus costs of the tip's distance from (0, 2) and of velocities."""
    x, height = tip(next_obs)
    bonus = healthy_reward + (fallen_reward - healthy_reward) * fallen(next_obs).to(next_obs.dtype)
    distance = 0.01 * x.square() + (height - 2.0).square()
    return bonus - distance - 0.001 * next_obs[:, 6].square() - 0.005 * next_obs[:, 7].square()


def distance_reward(
    obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor, *, distance: Feature, version: int, ctrl_cost_weight: float
) -> th.Tensor:
    """Return the reward of Reacher and Pusher for closeness, which v4 measures before the step and v5 after it."""
    return -distance(obs if version == 4 else next_obs) - ctrl_cost_weight * squared_norm(action)


def reacher_distance(obs: th.Tensor, *, dist_weight: float) -> th.Tensor:
    """Return Reacher's weighted distance from columns 8 and 9, fingertip - target (v4 adds z, which is always 0)."""
    return dist_weight * squared_norm(obs[:, 8:10]).sqrt()


def pusher_distance(obs: th.Tensor, *, near_weight: float, dist_weight: float) -> th.Tensor:
    """Return Pusher's weighted distances from the last nine columns: the arm's tip, the object, the goal."""
    arm, thing, goal = obs[:, 14:17], obs[:, 17:20], obs[:, 20:23]
    return near_weight * squared_norm(thing - arm).sqrt() + dist_weight * squared_norm(thing - goal).sqrt()


def locomotion_reward(
    obs: th.Tensor,
    action: th.Tensor,
    next_obs: th.Tensor,
    *,
    velocity: Feature,
    next_share: float,
    forward_reward_weight: float,
    ctrl_cost_weight: float,
    healthy_reward: float = 0.0,
    unhealthy: TerminationFn = never_terminates,
    contact_cost: Feature | None = None,
) -> th.Tensor:
    """
    Return the reward of a locomotion environment: forward velocity + healthy reward - control cost - contact cost.

    :param obs: [B, O]
    :param action: [B, A]
    :param next_obs: [B, O]
    :param velocity: computes the forward velocity of an observation
    :param next_share: weight of the velocity of next_obs, the rest is that of obs: 0.5 is the trapezoidal rule
    :param forward_reward_weight: weight of the velocity
    :param ctrl_cost_weight: weight of the squared norm of the action
    :param healthy_reward: reward of a step that does not end ``unhealthy``
    :param unhealthy: next_obs -> bool [B]
    :param contact_cost: next_obs -> cost [B]; None: no cost
    :return: [B]
    """
    speed = th.lerp(velocity(obs), velocity(next_obs), next_share)
    health = healthy_reward * (~unhealthy(next_obs)).to(next_obs.dtype)
    reward = forward_reward_weight * speed + health - ctrl_cost_weight * squared_norm(action)
    return reward if contact_cost is None else reward - contact_cost(next_obs)


def centre_of_mass_velocity(obs: th.Tensor, *, n_bodies: int) -> th.Tensor:
    """
    Return the forward velocity of Humanoid's centre of mass, which the environment rewards.

    The torso's velocity would be off by more than the rewards vary (0.3 instead of 0.0015). MuJoCo's ``cinert`` holds each
    body's mass m and m * r, where r points from the centre of mass of the whole model to that of the body. ``cvel`` holds the
    body's angular velocity w and its linear velocity v at the whole model's centre of mass. That centre moves with velocity
    sum(m v + w x m r) / sum(m).

    :param obs: [B, O]: 45 positions and velocities, n_bodies * 10 ``cinert``, n_bodies * 6 ``cvel``, ...
    :param n_bodies: 14 with the world (v4), 13 without it (v5)
    :return: forward velocity [B]
    """
    first, last = 45 + 10 * n_bodies, 45 + 16 * n_bodies
    cinert = obs[:, 45:first].reshape(len(obs), n_bodies, 10)
    cvel = obs[:, first:last].reshape(len(obs), n_bodies, 6)
    mass, mr_y, mr_z = cinert[..., 9], cinert[..., 7], cinert[..., 8]
    momentum = mass * cvel[..., 3] + cvel[..., 1] * mr_z - cvel[..., 2] * mr_y
    return momentum.sum(dim=1) / mass.sum(dim=1)


def contact_force_cost(next_obs: th.Tensor, *, first_column: int, weight: float, cost_range: Interval) -> th.Tensor:
    """Return the cost of the external forces, the observation's last columns; the world's, omitted in v5, are always 0."""
    return (weight * squared_norm(next_obs[:, first_column:])).clamp(*cost_range)
