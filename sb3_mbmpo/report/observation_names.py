"""What the numbers of an observation are, from the documentation of Gymnasium's environments.

The tables follow the docstrings of classic control and of the MuJoCo environments in version 5 (https://gymnasium.farama.org).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym

from sb3_mbmpo.envs import Point2D


class Quantity(NamedTuple):
    """
    One number of an observation.

    :param name: what it is
    :param unit: its unit; "" if it has none, or is unknown
    """

    name: str
    unit: str = ""


def _angles(*names: str) -> list[Quantity]:
    return [Quantity(f"{name} angle", "rad") for name in names]


def _angular_velocities(*names: str) -> list[Quantity]:
    return [Quantity(f"{name} angular velocity", "rad/s") for name in names]


def _positions(*names: str) -> list[Quantity]:
    return [Quantity(name, "m") for name in names]


def _velocities(*names: str) -> list[Quantity]:
    return [Quantity(f"{name} velocity", "m/s") for name in names]


def _unitless(*names: str) -> list[Quantity]:
    return [Quantity(name) for name in names]


class Layout(NamedTuple):
    """
    The parts of an observation of a MuJoCo environment.

    :param state: positions and velocities
    :param excluded: positions that come first with ``exclude_current_positions_from_observation=False``
    :param extras: further parts, by the argument of the environment that leaves them out if it is False
    """

    state: Sequence[Quantity]
    excluded: Sequence[Quantity] = ()
    extras: Mapping[str, Sequence[Quantity]] = {}

    def quantities(self, given: Mapping[str, Any]) -> list[Quantity]:
        """
        List what an observation has.

        :param given: the environment's arguments
        :return: one entry per number
        """
        first = [] if given.get("exclude_current_positions_from_observation", True) else [*self.excluded]
        extras = [x for name, quantities in self.extras.items() if given.get(name, True) for x in quantities]
        return [*first, *self.state, *extras]


def _of_bodies(bodies: Sequence[str], field: str, size: int) -> list[Quantity]:
    """List a field of MuJoCo's ``mjData``, which has ``size`` numbers for each body."""
    return [Quantity(f"{body} {field}[{i}]") for body in bodies for i in range(size)]


# -- Walkers --------------------------------------------------------------------------------------------------------------

_CHEETAH_JOINTS = ("back thigh", "back shin", "back foot", "front thigh", "front shin", "front foot")
_HOPPER_JOINTS = ("thigh joint", "leg joint", "foot joint")
_WALKER_JOINTS = (*_HOPPER_JOINTS, *(f"left {joint}" for joint in _HOPPER_JOINTS))
_ROTORS = ("first rotor", "second rotor")

_ANT_LEGS = ("front left", "front right", "back left", "back right")
_ANT_JOINTS = tuple(f"{leg} {joint}" for leg in _ANT_LEGS for joint in ("hip", "ankle"))
_ANT_BODIES = (
    "torso",
    *("front_left_leg", "aux_1", "ankle_1", "front_right_leg", "aux_2", "ankle_2"),
    *("back_leg", "aux_3", "ankle_3", "right_back_leg", "aux_4", "ankle_4"),
)

# As MuJoCo's model orders them: the legs before the arms
_HUMANOID_JOINTS = (
    *("abdomen z", "abdomen y", "abdomen x"),
    *("right hip x", "right hip z", "right hip y", "right knee", "left hip x", "left hip z", "left hip y", "left knee"),
    *("right shoulder1", "right shoulder2", "right elbow", "left shoulder1", "left shoulder2", "left elbow"),
)
_HUMANOID_BODIES = (
    *("torso", "lwaist", "pelvis", "right_thigh", "right_shin", "right_foot", "left_thigh", "left_shin", "left_foot"),
    *("right_upper_arm", "right_lower_arm", "left_upper_arm", "left_lower_arm"),
)

_FREE_TORSO = [*_positions("torso z"), *_unitless(*(f"torso {axis} orientation" for axis in "wxyz"))]
_FREE_TORSO_VELOCITIES = [
    *_velocities("torso x", "torso y", "torso z"),
    *_angular_velocities("torso x", "torso y", "torso z"),
]
_HUMANOID = Layout(
    [*_FREE_TORSO, *_angles(*_HUMANOID_JOINTS), *_FREE_TORSO_VELOCITIES, *_angular_velocities(*_HUMANOID_JOINTS)],
    excluded=_positions("torso x", "torso y"),
    extras={
        "include_cinert_in_observation": _of_bodies(_HUMANOID_BODIES, "cinert", 10),
        "include_cvel_in_observation": _of_bodies(_HUMANOID_BODIES, "cvel", 6),
        "include_qfrc_actuator_in_observation": [Quantity(f"{joint} actuator force") for joint in _HUMANOID_JOINTS],
        "include_cfrc_ext_in_observation": _of_bodies(_HUMANOID_BODIES, "cfrc_ext", 6),
    },
)

# -- Arms -----------------------------------------------------------------------------------------------------------------

_PUSHER_JOINTS = (
    *("shoulder panning", "shoulder lifting", "shoulder rolling", "elbow flexed"),
    *("forearm rolls", "wrist flexing", "wrist rolling"),
)

# -- All ------------------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Layout] = {
    "Pendulum-v1": Layout([*_unitless("cos(theta)", "sin(theta)"), Quantity("angular velocity", "rad/s")]),
    "CartPole-v1": Layout(
        [*_unitless("cart position", "cart velocity"), *_angles("pole"), *_angular_velocities("pole")],
    ),
    "Acrobot-v1": Layout(
        [
            *_unitless("cosine of theta1", "sine of theta1", "cosine of theta2", "sine of theta2"),
            *_angular_velocities("theta1", "theta2"),
        ]
    ),
    "MountainCarContinuous-v0": Layout([*_positions("car position"), *_unitless("car velocity")]),
    "MountainCar-v0": Layout([*_positions("car position"), *_unitless("car velocity")]),
    "InvertedPendulum-v5": Layout(
        [*_positions("cart position"), *_angles("pole"), *_velocities("cart"), *_angular_velocities("pole")]
    ),
    "InvertedDoublePendulum-v5": Layout(
        [
            *_positions("cart position"),
            *_unitless("sine of the first pole", "sine of the angle between poles"),
            *_unitless("cosine of the first pole", "cosine of the angle between poles"),
            Quantity("cart velocity", "m/s"),
            *_angular_velocities("first pole", "between poles"),
            Quantity("constraint force x", "N"),
        ]
    ),
    "Reacher-v5": Layout(
        [
            *_unitless("cosine of the first arm", "cosine of the second arm"),
            *_unitless("sine of the first arm", "sine of the second arm"),
            *_positions("target x", "target y"),
            *_angular_velocities("first arm", "second arm"),
            *_positions("x fingertip - target", "y fingertip - target"),
        ]
    ),
    "Pusher-v5": Layout(
        [
            *(Quantity(f"{joint} rotation", "rad") for joint in _PUSHER_JOINTS),
            *(Quantity(f"{joint} velocity", "rad/s") for joint in _PUSHER_JOINTS),
            *_positions(*(f"{what} {axis}" for what in ("fingertip", "object", "goal") for axis in "xyz")),
        ]
    ),
    "HalfCheetah-v5": Layout(
        [
            *_positions("front tip z"),
            *_angles("front tip", *_CHEETAH_JOINTS),
            *_velocities("front tip x", "front tip z"),
            *_angular_velocities("front tip", *_CHEETAH_JOINTS),
        ],
        excluded=_positions("front tip x"),
    ),
    "Hopper-v5": Layout(
        [
            *_positions("torso z"),
            *_angles("torso", *_HOPPER_JOINTS),
            *_velocities("torso x", "torso z"),
            *_angular_velocities("torso", *_HOPPER_JOINTS),
        ],
        excluded=_positions("torso x"),
    ),
    "Walker2d-v5": Layout(
        [
            *_positions("torso z"),
            *_angles("torso", *_WALKER_JOINTS),
            *_velocities("torso x", "torso z"),
            *_angular_velocities("torso", *_WALKER_JOINTS),
        ],
        excluded=_positions("torso x"),
    ),
    "Swimmer-v5": Layout(
        [
            *_angles("front tip", *_ROTORS),
            *_velocities("tip x", "tip y"),
            *_angular_velocities("front tip", *_ROTORS),
        ],
        excluded=_positions("tip x", "tip y"),
    ),
    "Ant-v5": Layout(
        [*_FREE_TORSO, *_angles(*_ANT_JOINTS), *_FREE_TORSO_VELOCITIES, *_angular_velocities(*_ANT_JOINTS)],
        excluded=_positions("torso x", "torso y"),
        extras={"include_cfrc_ext_in_observation": _of_bodies(_ANT_BODIES, "cfrc_ext", 6)},
    ),
    "Humanoid-v5": _HUMANOID,
    "HumanoidStandup-v5": _HUMANOID,
}


def quantities(env: gym.Env[Any, Any]) -> list[Quantity]:
    """
    Name the numbers of an environment's observations.

    :param env: an environment with flat observations
    :return: one entry per number: obs[0], obs[1], ... where no documentation is known, or a wrapper changes observations
    """
    size = gym.spaces.flatdim(env.observation_space)
    known: list[Quantity] = []
    if isinstance(env.unwrapped, Point2D):
        known = _unitless("x", "y")
    elif env.spec is not None and env.spec.id in LAYOUTS:
        known = LAYOUTS[env.spec.id].quantities(env.spec.kwargs)
    if len(known) != size or _changes_observations(env):
        return [Quantity(f"obs[{i}]") for i in range(size)]
    return known


def _changes_observations(env: gym.Env[Any, Any]) -> bool:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, gym.ObservationWrapper):
            return True
        env = env.env
    return False
