"""The environments whose reward and termination are known: classic control and MuJoCo, by Gymnasium's ids.

One factory per environment reads the constructor arguments that the user may have changed, and combines the functions of
``functions``.
"""

from collections.abc import Callable
from functools import partial
from math import inf, radians
from typing import Any, NamedTuple

from sb3_mbmpo.common.env_reading import Get, attribute
from sb3_mbmpo.rewards.functions import (
    Bounds,
    EnvFunctions,
    Feature,
    Interval,
    TerminationFn,
    centre_of_mass_velocity,
    column,
    constant_reward,
    contact_force_cost,
    distance_reward,
    double_pendulum_reward,
    fallen,
    locomotion_reward,
    mountain_car_reward,
    never_terminates,
    outside,
    pendulum_reward,
    pusher_distance,
    reached,
    reacher_distance,
    swung_up,
)


class Parameters:
    """
    The constructor arguments of an environment, read from the attributes in which Gymnasium keeps them.

    ``_name`` is tried before ``name``, because ``healthy_reward`` is a property that depends on the state. Numbers are
    returned as plain floats, which do not change a tensor's dtype.

    :param get_attribute: reads an attribute of the environment by name
    """

    def __init__(self, get_attribute: Get) -> None:
        self._get_attribute = get_attribute

    def get(self, name: str, default: Any) -> Any:
        """Return the argument, or ``default`` if this version of the environment has none of that name."""
        values = (attribute(key, self._get_attribute) for key in (f"_{name}", name))
        return next((value for value in values if value is not None), default)

    def number(self, name: str, default: float) -> float:
        """Return a numeric argument, see ``get``."""
        return float(self.get(name, default))

    def interval(self, name: str, default: Interval) -> Interval:
        """Return an argument that is a pair of bounds, see ``get``."""
        low, high = self.get(name, default)
        return float(low), float(high)


def _cart_pole(given: Parameters) -> EnvFunctions:
    x, angle = given.number("x_threshold", 2.4), given.number("theta_threshold_radians", radians(12))
    terminated = partial(outside, bounds=((slice(0, 1), (-x, x)), (slice(2, 3), (-angle, angle))))
    running, final = (0.0, -1.0) if given.get("sutton_barto_reward", False) else (1.0, 1.0)
    return EnvFunctions(partial(constant_reward, running=running, final=final, terminated=terminated), terminated)


def _mountain_car(given: Parameters, *, continuous: bool) -> EnvFunctions:
    goal_position = given.number("goal_position", 0.45 if continuous else 0.5)
    terminated = partial(reached, goal_position=goal_position, goal_velocity=given.number("goal_velocity", 0.0))
    if continuous:
        return EnvFunctions(partial(mountain_car_reward, terminated=terminated), terminated)
    return EnvFunctions(partial(constant_reward, running=-1.0, final=-1.0, terminated=terminated), terminated)


def _pendulum(given: Parameters) -> EnvFunctions:
    return EnvFunctions(pendulum_reward, never_terminates)


def _acrobot(given: Parameters) -> EnvFunctions:
    return EnvFunctions(partial(constant_reward, running=-1.0, final=0.0, terminated=swung_up), swung_up)


def _inverted_pendulum(given: Parameters, *, version: int) -> EnvFunctions:
    terminated = partial(outside, bounds=((slice(None), (-inf, inf)), (slice(1, 2), (-0.2, 0.2))))
    return EnvFunctions(partial(constant_reward, running=1.0, final=float(version == 4), terminated=terminated), terminated)


def _inverted_double_pendulum(given: Parameters, *, version: int) -> EnvFunctions:
    bonus = given.number("healthy_reward", 10.0)
    reward = partial(double_pendulum_reward, healthy_reward=bonus, fallen_reward=bonus if version == 4 else 0.0)
    # MuJoCo leaves the tip where the last Runge-Kutta stage put it, and the observation clips the velocities at 10
    approximation = "tip off by up to a Runge-Kutta stage, clipped velocities: mean absolute error below 0.01"
    return EnvFunctions(reward, fallen, approximation, is_termination_exact=False)


def _distance(given: Parameters, distance: Feature, version: int, ctrl_cost_weight: float) -> EnvFunctions:
    weight = given.number("reward_control_weight", ctrl_cost_weight)
    return EnvFunctions(
        partial(distance_reward, distance=distance, version=version, ctrl_cost_weight=weight), never_terminates
    )


def _reacher(given: Parameters, *, version: int) -> EnvFunctions:
    return _distance(given, partial(reacher_distance, dist_weight=given.number("reward_dist_weight", 1.0)), version, 1.0)


def _pusher(given: Parameters, *, version: int) -> EnvFunctions:
    near, dist = given.number("reward_near_weight", 0.5), given.number("reward_dist_weight", 1.0)
    return _distance(given, partial(pusher_distance, near_weight=near, dist_weight=dist), version, 0.1)


def _locomotion(
    given: Parameters,
    velocity: Feature,
    *,
    version: int,
    error: float,
    weights: tuple[float, float, float],
    bounds: Bounds = (),
    next_share: float = 0.5,
    contact_cost: Feature | None = None,
) -> EnvFunctions:
    """
    Describe a locomotion environment of MuJoCo.

    :param given: the environment's arguments
    :param velocity: computes the forward velocity of an observation
    :param version: of the environment, 4 or 5
    :param error: stated bound of the mean absolute error, the worst of uniformly random, sinusoidal and bang-bang actions
    :param weights: defaults of forward_reward_weight, ctrl_cost_weight, healthy_reward
    :param bounds: where the environment is healthy, see ``outside``; empty if it always is
    :param next_share: see ``locomotion_reward``
    :param contact_cost: see ``locomotion_reward``
    """
    unhealthy: TerminationFn = partial(outside, bounds=bounds) if bounds else never_terminates
    ends = bool(given.get("terminate_when_unhealthy", True))
    reward = partial(
        locomotion_reward,
        velocity=velocity,
        next_share=next_share,
        forward_reward_weight=given.number("forward_reward_weight", weights[0]),
        ctrl_cost_weight=given.number("ctrl_cost_weight", weights[1]),
        healthy_reward=given.number("healthy_reward", weights[2]),
        # v4 pays the healthy reward for the terminal step, too; fixed in v5
        unhealthy=never_terminates if version == 4 and ends else unhealthy,
        contact_cost=contact_cost,
    )
    approximation = f"displacement / dt from the velocities at both ends of the step: mean absolute error below {error}"
    return EnvFunctions(reward, unhealthy if ends else never_terminates, approximation)


def _swimmer(given: Parameters, *, version: int) -> EnvFunctions:
    return _locomotion(given, partial(column, index=3), version=version, error=0.025, weights=(1.0, 1e-4, 0.0))


def _half_cheetah(given: Parameters, *, version: int) -> EnvFunctions:
    # MuJoCo integrates HalfCheetah by semi-implicit Euler, so the velocity after the step has the larger weight: 0.6 for five
    # frames of constant acceleration, 0.65 as measured (mean absolute error at 0, 0.5, 0.65, 1: 0.32, 0.10, 0.07, 0.17)
    velocity = partial(column, index=8)
    return _locomotion(given, velocity, version=version, error=0.12, weights=(1.0, 0.1, 0.0), next_share=0.65)


def _hopper(given: Parameters, *, version: int) -> EnvFunctions:
    bounds = (
        (slice(0, 1), given.interval("healthy_z_range", (0.7, inf))),
        (slice(1, 2), given.interval("healthy_angle_range", (-0.2, 0.2))),
        # The observation clips velocities at 10, so one that leaves a wider range cannot be seen
        (slice(1, 11), given.interval("healthy_state_range", (-100.0, 100.0))),
    )
    velocity = partial(column, index=5)
    return _locomotion(given, velocity, version=version, error=0.005, weights=(1.0, 1e-3, 1.0), bounds=bounds)


def _walker(given: Parameters, *, version: int) -> EnvFunctions:
    bounds = (
        (slice(0, 1), given.interval("healthy_z_range", (0.8, 2.0))),
        (slice(1, 2), given.interval("healthy_angle_range", (-1.0, 1.0))),
    )
    velocity = partial(column, index=8)
    return _locomotion(given, velocity, version=version, error=0.025, weights=(1.0, 1e-3, 1.0), bounds=bounds)


def _ant(given: Parameters, *, version: int) -> EnvFunctions:
    bounds = ((slice(0, 1), given.interval("healthy_z_range", (0.2, 1.0))), (slice(0, 27), (-inf, inf)))
    # v4 has a contact cost only with use_contact_forces, which changes the layout; v5 observes the forces that it charges for
    cost = partial(contact_force_cost, first_column=27, cost_range=(-inf, inf))
    contact = partial(cost, weight=given.number("contact_cost_weight", 5e-4)) if version == 5 else None
    velocity, weights = partial(column, index=13), (1.0, 0.5, 1.0)
    return _locomotion(given, velocity, version=version, error=0.08, weights=weights, bounds=bounds, contact_cost=contact)


def _humanoid(given: Parameters, *, version: int) -> EnvFunctions:
    bounds = ((slice(0, 1), given.interval("healthy_z_range", (1.0, 2.0))),)
    velocity = partial(centre_of_mass_velocity, n_bodies=14 if version == 4 else 13)
    contact = _impact(given, "contact", version) if version == 5 else None
    weights = (1.25, 0.1, 5.0)
    return _locomotion(given, velocity, version=version, error=0.005, weights=weights, bounds=bounds, contact_cost=contact)


def _humanoid_standup(given: Parameters, *, version: int) -> EnvFunctions:
    """Describe HumanoidStandup, whose reward is exact: the height, as a velocity that reaches it in one frame."""
    # Not uph_cost_weight, which Gymnasium stores but does not use
    frames_a_second = given.number("frame_skip", 5) / given.number("dt", 0.015)
    height, weights, impact = partial(column, index=0), (frames_a_second, 0.1, 1.0), _impact(given, "impact", version)
    functions = _locomotion(given, height, version=version, error=0.0, weights=weights, next_share=1.0, contact_cost=impact)
    return functions._replace(approximation="")


def _impact(given: Parameters, name: str, version: int) -> Feature:
    weight, cost_range = given.number(f"{name}_cost_weight", 5e-7), given.interval(f"{name}_cost_range", (-inf, 10.0))
    return partial(contact_force_cost, first_column=292 if version == 4 else 270, weight=weight, cost_range=cost_range)


class KnownEnv(NamedTuple):
    """A factory of reward and termination, and the size of the observation's default layout, the only one it supports."""

    obs_size: int
    build: Callable[[Parameters], EnvFunctions]


# Observation size of v4, of v5
_MUJOCO: dict[str, tuple[int, int, Callable[..., EnvFunctions]]] = {
    "InvertedPendulum": (4, 4, _inverted_pendulum),
    "InvertedDoublePendulum": (11, 9, _inverted_double_pendulum),
    "Reacher": (11, 10, _reacher),
    "Pusher": (23, 23, _pusher),
    "Swimmer": (8, 8, _swimmer),
    "HalfCheetah": (17, 17, _half_cheetah),
    "Hopper": (11, 11, _hopper),
    "Walker2d": (17, 17, _walker),
    "Ant": (27, 105, _ant),
    "Humanoid": (376, 348, _humanoid),
    "HumanoidStandup": (376, 348, _humanoid_standup),
}

# Box2D's environments are missing, because their contacts and shaping state are not in the observation
KNOWN_ENVS = {
    "CartPole-v0": KnownEnv(4, _cart_pole),
    "CartPole-v1": KnownEnv(4, _cart_pole),
    "MountainCar-v0": KnownEnv(2, partial(_mountain_car, continuous=False)),
    "MountainCarContinuous-v0": KnownEnv(2, partial(_mountain_car, continuous=True)),
    "Pendulum-v1": KnownEnv(3, _pendulum),
    "Acrobot-v1": KnownEnv(6, _acrobot),
    **{f"{name}-v4": KnownEnv(size, partial(build, version=4)) for name, (size, _, build) in _MUJOCO.items()},
    **{f"{name}-v5": KnownEnv(size, partial(build, version=5)) for name, (_, size, build) in _MUJOCO.items()},
}
