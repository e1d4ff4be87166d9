"""Files of replay buffers, from MBMPO and from SB3's other algorithms.

A file is a pickled ``ReplayBuffer``, so that SB3's algorithms can load it too, followed by a checksum, which they ignore.
SB3's buffers hold the actions of a Box space scaled to [-1, 1], MBMPO's hold them in the environment's units. A file holds
both: the scaled ones where SB3 expects them, and the unscaled ones beside them, because scaling back would round them.

Legend of shapes: ``C`` capacity, ``E`` environments, ``A`` action size.
"""

import copy
import hashlib
import io
import pickle
from typing import Any, BinaryIO

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_mbmpo.common.save_util import TAKE_A_COPY, Path, file_name, opened, output

BUFFER_ARRAYS = ("observations", "actions", "next_observations", "rewards", "dones", "timeouts")
# Attribute of buffers in files: the actions as the environment received them
ENV_ACTIONS = "env_actions"
# Beginning of the checksum of everything before it
_SEAL = b"sb3_mbmpo:sha256:"
_SEAL_LENGTH = len(_SEAL) + 2 * hashlib.sha256().digest_size
_CHUNK = 1 << 20
# Because of rounding, actions may exceed their bounds by this share of the range
_SLACK = 1e-4


class _Hashing:
    """A file for writing that also computes the checksum of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        """Write the content, and add it to the checksum."""
        self.hash.update(content)
        return self.file.write(content)


def save_buffer(path: Path, buffer: ReplayBuffer) -> None:
    """
    Save a replay buffer.

    :param path: a file name (".pkl" is appended if it has no suffix) or an open file
    :param buffer: the buffer, with actions in the environment's units
    """
    stored = copy.copy(buffer)
    setattr(stored, ENV_ACTIONS, buffer.actions)
    stored.actions = _rescaled(buffer.actions, buffer.action_space, to_env=False)
    with output(path, "pkl") as file:
        hashing = _Hashing(file)
        pickle.dump(stored, hashing, protocol=pickle.HIGHEST_PROTOCOL)
        file.write(_SEAL + hashing.hash.hexdigest().encode())


def load_buffer(path: Path, empty: ReplayBuffer) -> ReplayBuffer:
    """
    Load a replay buffer.

    :param path: a file name, with or without ".pkl", or an open file
    :param empty: an empty buffer with the desired spaces, capacity and number of environments
    :return: ``empty``, filled with the newest steps that fit
    :raises ValueError: if the file is damaged, or holds something else or steps of other spaces
    """
    name = file_name(path)
    stored = _read(path, name)
    if not isinstance(stored, ReplayBuffer):
        raise ValueError(f"{name} holds no replay buffer, but a {type(stored).__name__}.")
    try:
        _check_spaces(stored, empty)
        arrays = _checked_arrays(stored)
        arrays["actions"] = _env_actions(stored, arrays["actions"])
    except ValueError as error:
        raise ValueError(f"The replay buffer in {name} cannot be used: {error}") from error
    return _filled(empty, arrays, stored)


def _read(path: Path, name: str) -> Any:
    """Verify the checksum, if there is one, and return the unpickled object."""
    with opened(path, "pkl") as file:
        start = file.tell()
        end = file.seek(0, io.SEEK_END)
        file.seek(max(start, end - _SEAL_LENGTH))
        seal = file.read()
        file.seek(start)
        is_sealed = seal.startswith(_SEAL)
        if is_sealed:
            digest = hashlib.sha256()
            left = end - start - _SEAL_LENGTH
            while left > 0:
                chunk = file.read(min(left, _CHUNK))
                digest.update(chunk)
                left -= len(chunk)
            if digest.hexdigest().encode() != seal[len(_SEAL) :]:
                raise ValueError(f"{name} does not match its checksum. {TAKE_A_COPY}")
            file.seek(start)
        try:
            stored = pickle.load(file)
        except Exception as error:
            raise ValueError(f"{name} cannot be read ({type(error).__name__}: {error}). {TAKE_A_COPY}") from error
    if hasattr(stored, ENV_ACTIONS) and not is_sealed:
        raise ValueError(f"{name} has lost its checksum. {TAKE_A_COPY}")
    return stored


# ---------------------------------------------------------------- what is in it


def _check_spaces(stored: ReplayBuffer, empty: ReplayBuffer) -> None:
    for name in ("observation_space", "action_space"):
        theirs, ours = getattr(stored, name, None), getattr(empty, name)
        if theirs != ours:
            raise ValueError(f"it is of another task: its {name} is {theirs}, the model's is {ours}.")
    if getattr(stored, "optimize_memory_usage", False):
        raise ValueError(
            "it was filled with `optimize_memory_usage=True`, which overwrites the last observation of every episode with the "
            "first one of the next. Fill one without this option."
        )


def _check_position(stored: ReplayBuffer) -> None:
    """Raise ``ValueError`` unless size and position are such as ``ReplayBuffer.add`` leaves."""
    for name, low in (("n_envs", 1), ("buffer_size", 1), ("pos", 0)):
        value = getattr(stored, name, None)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
            raise ValueError(f"its `{name}` must be an integer of at least {low}, not {value!r}. {TAKE_A_COPY}")
    full = getattr(stored, "full", None)
    if not isinstance(full, (bool, np.bool_)) or stored.pos >= stored.buffer_size:
        raise ValueError(
            f"`pos`={stored.pos!r}, `full`={full!r} is not a position in its {stored.buffer_size} rows. {TAKE_A_COPY}"
        )


def _checked_arrays(stored: ReplayBuffer) -> dict[str, np.ndarray]:
    """Return the buffer's arrays; raise ``ValueError`` unless they are such as ``ReplayBuffer.add`` leaves."""
    _check_position(stored)
    one_row = ReplayBuffer(1, stored.observation_space, stored.action_space, "cpu", stored.n_envs)
    rows = stored.size()
    arrays: dict[str, np.ndarray] = {}
    for name in BUFFER_ARRAYS:
        expected, array = getattr(one_row, name), getattr(stored, name, None)
        shape = (stored.buffer_size, *expected.shape[1:])
        if not isinstance(array, np.ndarray) or array.shape != shape:
            found = f"of shape {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
            raise ValueError(f"its `{name}` must be an array of shape {shape}, and is {found}. {TAKE_A_COPY}")
        if array.dtype != bool and not np.issubdtype(array.dtype, np.number):
            raise ValueError(f"its `{name}` must hold numbers, not {array.dtype}. {TAKE_A_COPY}")
        # Checked in the dtype of storage: a number that is too large for float32 becomes infinite
        with np.errstate(over="ignore"):
            bad = np.argwhere(~np.isfinite(array[:rows].astype(expected.dtype)))
        if len(bad) > 0:
            raise ValueError(f"its `{name}` has NaN or infinite numbers, first in row {bad[0][0]}: {array[tuple(bad[0])]}.")
        if name in ("dones", "timeouts") and not np.isin(array[:rows], (0, 1)).all():
            raise ValueError(f"its `{name}` must be 0 or 1. {TAKE_A_COPY}")
        arrays[name] = array
    dones, timeouts = arrays["dones"][:rows], arrays["timeouts"][:rows]
    if not getattr(stored, "handle_timeout_termination", False) and dones.any():
        raise ValueError(
            "it was filled with `handle_timeout_termination=False`, so time limits cannot be told from terminations. "
            "Fill one without this option."
        )
    if (timeouts > dones).any():
        raise ValueError(f"its `timeouts` mark steps that did not end an episode. {TAKE_A_COPY}")
    return arrays


def _env_actions(stored: ReplayBuffer, actions: np.ndarray) -> np.ndarray:
    """Return the actions as the environment received them (C, E, A)."""
    rows, space = stored.size(), stored.action_space
    ours = getattr(stored, ENV_ACTIONS, None)
    if isinstance(space, spaces.Box):
        largest = float(np.abs(actions[:rows]).max(initial=0))
        if largest > 1 + _SLACK:
            raise ValueError(
                f"its actions should be in [-1, 1], as SB3's algorithms store them, and are up to {largest:.4g}. If they are "
                f"in units of the environment, scale them from {space.low} ... {space.high} to that."
            )
        return _rescaled(actions, space, to_env=True) if ours is None else ours
    choices = actions[:rows]
    highest: Any = 1
    if isinstance(space, spaces.Discrete):
        highest = space.n - 1
    elif isinstance(space, spaces.MultiDiscrete):
        highest = space.nvec - 1
    if (choices < 0).any() or (choices > highest).any() or (choices != np.trunc(choices)).any():
        raise ValueError(f"its actions must be choices of {space}, and are from {choices.min()} to {choices.max()}.")
    return actions


def _rescaled(actions: np.ndarray, space: spaces.Space[Any], to_env: bool) -> np.ndarray:
    """
    Convert actions between [-1, 1] and the environment's range.

    :param actions: (C, E, A)
    :param space: the action space
    :param to_env: from [-1, 1] to the environment's range, else the other way round
    :return: (C, E, A) of the same dtype; discrete choices are unchanged
    """
    if not isinstance(space, spaces.Box):
        return actions
    low, high = (bound.reshape(-1).astype(np.float64) for bound in (space.low, space.high))
    scaled: np.ndarray
    if to_env:
        scaled = np.clip(low + 0.5 * (actions + 1.0) * (high - low), low, high)
    else:
        scaled = np.clip(2.0 * (actions - low) / np.where(high > low, high - low, 1) - 1.0, -1, 1)
    return scaled.astype(actions.dtype)


def _filled(empty: ReplayBuffer, arrays: dict[str, np.ndarray], stored: ReplayBuffer) -> ReplayBuffer:
    """Fill ``empty`` with the arrays of ``stored``: unchanged if they fit exactly, else with the newest steps in order."""
    result = empty
    if (stored.n_envs, stored.buffer_size) == (result.n_envs, result.buffer_size):
        rows = stored.size()
        for name, values in arrays.items():
            getattr(result, name)[:rows] = values[:rows]
        result.pos, result.full = int(stored.pos), bool(stored.full)
        return result
    oldest = stored.pos if stored.full else 0
    order = (oldest + np.arange(stored.size())) % stored.buffer_size
    rows = min(stored.size() * stored.n_envs // result.n_envs, result.buffer_size)
    for name, array in arrays.items():
        values, target = array[order], getattr(result, name)
        values = values.reshape(-1, *values.shape[2:])
        target[:rows] = values[len(values) - rows * result.n_envs :].reshape(rows, *target.shape[1:])
    result.pos, result.full = rows % result.buffer_size, rows == result.buffer_size
    return result
