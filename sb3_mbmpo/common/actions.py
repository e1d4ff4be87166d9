"""The three forms of an action: the policy's sample, the environment's action, the dynamics model's input.

For a Box space the policy works in [-1, 1], as the authors' does, so that an initial standard deviation of 1 covers any
range. The environment, the reward function and the replay buffer see the action in the environment's units, clipped to
its bounds. The log-probability is that of the unclipped sample. Discrete choices enter the dynamics one-hot, with the
width of the *space* (a width inferred from the data is wrong whenever a batch lacks the last action).
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F
from gymnasium import spaces

from sb3_mbmpo.common.finite import in_float32


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """
    Reject spaces that MB-MPO cannot work with.

    :param observation_space: the environment's
    :param action_space: the environment's
    :raises ValueError: if MB-MPO cannot work with a space; the message names the wrapper that helps
    """
    if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 1:
        raise ValueError(
            f"MBMPO learns a dynamics model of a flat vector: the observation space must be a Box of one dimension, "
            f"not {observation_space}. Wrap the environment: `env = gymnasium.wrappers.FlattenObservation(env)` "
            "(images first need an encoder that turns them into a vector)."
        )
    _check_dtype(observation_space, "DtypeObservation(env, np.float64)")
    if isinstance(action_space, spaces.Box):
        if not np.issubdtype(action_space.dtype, np.floating):
            raise ValueError(
                f"The action space {action_space} holds integers, but MBMPO's policy acts in real numbers. Describe the "
                "choices by a `MultiDiscrete` space, or round: `gymnasium.wrappers.TransformAction(env, lambda a: "
                "np.rint(a).astype(int), Box(low, high, dtype=np.float32))`."
            )
        _check_dtype(action_space, "TransformAction(env, lambda a: a, Box(low, high, dtype=np.float64))")
        if not in_float32(np.stack([action_space.low, action_space.high])).all():
            raise ValueError(
                f"The action space must have finite bounds, not {action_space}. "
                "Map bounded actions to its range with `gymnasium.wrappers.TransformAction`."
            )
    elif isinstance(action_space, spaces.MultiDiscrete):
        if action_space.nvec.ndim != 1:
            raise ValueError(f"A MultiDiscrete action space must have one dimension, not {action_space}: flatten it.")
    elif isinstance(action_space, spaces.MultiBinary):
        if len(action_space.shape) != 1:
            raise ValueError(f"A MultiBinary action space must have one dimension, not {action_space}: flatten it.")
    elif not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            f"The action space must be Box, Discrete, MultiDiscrete or MultiBinary, not {action_space}. "
            "Write a `gymnasium.ActionWrapper` that maps one of these spaces to it."
        )
    if isinstance(action_space, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(action_space.start != 0):
        raise ValueError(
            f"The action space must count from 0, not from {action_space.start}, because SB3's policies do. "
            "Shift the action in a `gymnasium.ActionWrapper`."
        )


def _check_dtype(space: spaces.Box, wrapper: str) -> None:
    try:
        th.as_tensor(np.empty(0, space.dtype))
    except TypeError as error:
        raise ValueError(
            f"PyTorch has no numbers like those of {space}, which are {space.dtype}. "
            f"Wrap the environment in `gymnasium.wrappers.{wrapper}`."
        ) from error


@dataclass(frozen=True)
class ActionCodec:
    """
    Conversion of actions between the policy, the environment and the dynamics model.

    :param action_space: a space that ``check_spaces`` accepts
    """

    action_space: spaces.Space[Any]
    _scales: dict[tuple[th.device, th.dtype], tuple[th.Tensor, th.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def is_continuous(self) -> bool:
        """Whether the policy's actions are real numbers rather than discrete choices."""
        return isinstance(self.action_space, spaces.Box)

    @property
    def sample_dim(self) -> int:
        """Size of the policy's action: A real numbers or K choices."""
        return math.prod(self.action_space.shape or (1,))

    @property
    def dynamics_dim(self) -> int:
        """Size of an encoded action, the dynamics model's input."""
        return spaces.flatdim(self.action_space)

    def to_env(self, sample: th.Tensor) -> th.Tensor:
        """
        Convert the policy's samples to environment actions.

        :param sample: the policy's action, (..., A) scaled to [-1, 1], or (..., K) choices
        :return: what the environment receives: (..., A) in its units and clipped, or the same choices
        """
        if not isinstance(self.action_space, spaces.Box):
            return sample
        clipped = sample.clamp(-1, 1)
        if self._is_unit:
            return clipped
        center, half_range = self._scale(sample.device, sample.dtype)
        return th.addcmul(center, half_range, clipped)

    def gaussian_to_env(self, mean: th.Tensor, log_std: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Convert a Gaussian over the policy's actions to the environment's units.

        :param mean: mean of the policy's actions (..., A), scaled to [-1, 1]
        :param log_std: logarithm of their standard deviation (..., A)
        :return: mean and log standard deviation in the environment's units, not clipped
        """
        if self._is_unit:
            return mean, log_std
        center, half_range = self._scale(mean.device, mean.dtype)
        # Where both bounds are equal, the half range is 0 and its logarithm infinite
        return th.addcmul(center, half_range, mean), log_std + half_range.clamp(min=1e-20).log()

    def to_dynamics(self, env_action: th.Tensor) -> th.Tensor:
        """
        Encode environment actions for the dynamics model.

        :param env_action: what the environment received, (..., A) or (..., K) choices
        :return: the dynamics model's input (..., ``dynamics_dim``), float
        """
        if isinstance(self.action_space, (spaces.Box, spaces.MultiBinary)):
            return env_action if env_action.is_floating_point() else env_action.float()
        n_choices = self._n_choices()
        columns = env_action.long().unbind(-1)
        return th.cat([F.one_hot(column, n) for column, n in zip(columns, n_choices, strict=True)], dim=-1).float()

    def to_reward(self, env_action: th.Tensor) -> th.Tensor:
        """
        Shape environment actions as reward functions expect them.

        :param env_action: (B, A) or (B, K) choices
        :return: (B,) for Discrete, else unchanged
        """
        return env_action.squeeze(-1) if isinstance(self.action_space, spaces.Discrete) else env_action

    def to_numpy(self, env_action: th.Tensor) -> np.ndarray:
        """
        Convert environment actions to NumPy.

        :param env_action: (B, A) or (B, K) choices
        :return: (B, ``*action_space.shape``) in the dtype of the space
        """
        array: np.ndarray = env_action.cpu().numpy().astype(self.action_space.dtype)
        if isinstance(self.action_space, spaces.Box):
            # In float32, rounding of low + (high - low) may exceed the bounds by one unit in the last place
            low, high = self.action_space.low, self.action_space.high
            array = array.reshape(-1, *self.action_space.shape)
            clipped: np.ndarray = np.clip(array, low, high)
            return clipped
        shape: tuple[int, ...] = self.action_space.shape or ()
        return array.reshape(-1, *shape)

    def from_numpy(self, action: np.ndarray, device: th.device) -> th.Tensor:
        """
        Convert environment actions to tensors.

        :param action: (B, ``*action_space.shape``), as an environment takes it
        :param device: where to put the result
        :return: (B, A) float32 or (B, K) long
        """
        continuous = isinstance(self.action_space, spaces.Box)
        flat = np.asarray(action).reshape(len(action), -1)
        return th.as_tensor(flat, device=device, dtype=th.float32 if continuous else th.long)

    @cached_property
    def _is_unit(self) -> bool:
        """Whether the environment's bounds are -1 and 1, as in most robotics tasks, so that nothing has to be scaled."""
        space = self.action_space
        return isinstance(space, spaces.Box) and bool((space.low == -1).all() and (space.high == 1).all())

    def _scale(self, device: th.device, dtype: th.dtype) -> tuple[th.Tensor, th.Tensor]:
        """Return the center and half width of a Box's bounds (A,); cached, because every imagined step needs them."""
        if (device, dtype) in self._scales:
            return self._scales[device, dtype]
        assert isinstance(self.action_space, spaces.Box)
        low, high = (bound.reshape(-1).astype(np.float64) for bound in (self.action_space.low, self.action_space.high))
        both = th.as_tensor(np.stack([(low + high) / 2, (high - low) / 2]), device=device, dtype=dtype)
        scale = both[0], both[1]
        if not th.compiler.is_compiling():  # while `torch.export` or `torch.compile` traces the policy, there are no numbers
            self._scales[device, dtype] = scale
        return scale

    def _n_choices(self) -> tuple[int, ...]:
        if isinstance(self.action_space, spaces.Discrete):
            return (int(self.action_space.n),)
        assert isinstance(self.action_space, spaces.MultiDiscrete)
        return tuple(int(n) for n in self.action_space.nvec)
