"""Recorded transitions from files, for ``DynamicsEnsemble`` and ``ModelVecEnv``; no environment is needed.

Legend of shapes: ``B`` transitions, ``O`` observation size, ``A`` action size, ``K`` choices, ``S`` first observations.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_mbmpo.common.actions import ActionCodec, check_spaces
from sb3_mbmpo.common.finite import check_counts, in_float32
from sb3_mbmpo.common.save_util import read_npz
from sb3_mbmpo.dynamics import Transitions

# Names of Minari and Gymnasium, and those names in D4RL's files that differ
KEYS = ("observations", "actions", "next_observations", "rewards", "terminations")
D4RL_KEYS = {"terminals": "terminations", "timeouts": "truncations"}


class OfflineData(NamedTuple):
    """
    Recorded transitions, with their spaces and first observations.

    :param observation_space: as given, or unbounded
    :param action_space: as given, or with the range of the recorded actions
    :param transitions: for ``DynamicsEnsemble.fit``
    :param start_obs: first observations of the recorded episodes (S, O), for ``ModelVecEnv``
    """

    observation_space: spaces.Box
    action_space: spaces.Space[Any]
    transitions: Transitions
    start_obs: np.ndarray


def load_transitions(
    path: str | Path,
    observation_space: spaces.Box | None = None,
    action_space: spaces.Space[Any] | None = None,
) -> OfflineData:
    """
    Read an ``.npz`` file with one row per transition, in raw units and in the order of recording.

    The arrays are:

    - ``observations`` and ``next_observations`` (B, O); never the first observation of the next episode;
    - ``actions``, as the environment received them: (B, A) floats, (B,) integers, (B, K) integers or (B, K) booleans;
    - ``rewards`` (B,);
    - ``terminations`` (B,), or D4RL's ``terminals``: where an episode terminated, not by a time limit;
    - optionally ``truncations`` (B,), or D4RL's ``timeouts``: where an episode ended in another way.

    An episode also begins where an observation differs from the next observation of the row before.

    :param path: the file
    :param observation_space: by default an unbounded Box of O numbers
    :param action_space: by default a Box with the range of the recorded floats, a Discrete or MultiDiscrete space with
        the largest of the recorded integers, or a MultiBinary space
    :return: spaces, transitions and first observations
    :raises ValueError: if the file holds something else, shapes disagree, a number is NaN or infinite, or an action is
        outside its space
    """
    arrays = {D4RL_KEYS.get(name, name): array for name, array in read_npz(path).items()}
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks the arrays {missing}; it has {sorted(arrays)}, and needs {list(KEYS)}.")
    try:
        return _offline_data(arrays, observation_space, action_space)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_minari(dataset: Any) -> OfflineData:
    """
    Load a dataset of Minari.

    :param dataset: a ``minari.MinariDataset``, or the id of a dataset on this computer ("mujoco/hopper/medium-v0")
    :return: its spaces, transitions and first observations
    :raises ImportError: if an id is given and Minari is not installed
    :raises ValueError: if the data cannot be used, as in ``load_transitions``
    """
    if isinstance(dataset, str):
        try:
            import minari
        except ImportError as error:
            raise ImportError('Minari is not installed: `pip install "minari[hdf5]"`, or use `load_transitions`.') from error
        dataset = minari.load_dataset(dataset)
    observation_space = dataset.observation_space
    if not isinstance(observation_space, spaces.Box):
        raise ValueError(f"The observations of the Minari dataset are {observation_space}: only a Box can be modelled.")
    episodes = list(dataset.iterate_episodes())
    if not episodes:
        raise ValueError("The Minari dataset has no episodes.")
    parts = {
        "observations": [episode.observations[:-1] for episode in episodes],
        "next_observations": [episode.observations[1:] for episode in episodes],
        **{name: [getattr(episode, name) for episode in episodes] for name in ("actions", "rewards", "terminations")},
        # The last step ends an episode, even if the recording was cut off there
        "truncations": [np.arange(len(episode.rewards)) == len(episode.rewards) - 1 for episode in episodes],
    }
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    return _offline_data(arrays, observation_space, dataset.action_space)


def _offline_data(
    arrays: Mapping[str, np.ndarray], observation_space: spaces.Box | None, action_space: spaces.Space[Any] | None
) -> OfflineData:
    """Build the data; raise ``ValueError`` if the arrays do not match one another or the spaces."""
    _check_arrays(arrays)
    obs, next_obs, actions = (np.asarray(arrays[name]) for name in ("observations", "next_observations", "actions"))
    if observation_space is None:
        observation_space = spaces.Box(-np.inf, np.inf, obs.shape[1:], np.float32)
    if observation_space.shape != obs.shape[1:]:
        raise ValueError(f"`observations` have shape {obs.shape}: they are not of the observation space {observation_space}.")
    if action_space is None:
        action_space = _space_of(actions)
    check_spaces(observation_space, action_space)
    _check_actions(actions, action_space)
    terminated = arrays["terminations"].astype(bool)
    ends = terminated | arrays.get("truncations", terminated).astype(bool)
    begins = np.ones(len(obs), dtype=bool)
    begins[1:] = ends[:-1] | (obs[1:] != next_obs[:-1]).any(axis=1)
    cpu = th.device("cpu")
    transitions = Transitions(
        th.as_tensor(obs, dtype=th.float64),
        ActionCodec(action_space).from_numpy(actions, cpu),
        th.as_tensor(next_obs, dtype=th.float64),
        th.as_tensor(arrays["rewards"], dtype=th.float64),
        th.as_tensor(terminated),
    )
    return OfflineData(observation_space, action_space, transitions, obs[begins].astype(np.float32))


def _check_arrays(arrays: Mapping[str, np.ndarray]) -> None:
    obs = arrays["observations"]
    if obs.ndim != 2 or obs.shape[0] == 0:
        raise ValueError(f"`observations` must have shape (B, O), one row per transition, not {obs.shape}.")
    if arrays["next_observations"].shape != obs.shape:
        raise ValueError(
            f"`next_observations` must have the shape of `observations`, {obs.shape}, not {arrays['next_observations'].shape}."
        )
    flags = [name for name in ("terminations", "truncations") if name in arrays]
    for name in ("rewards", *flags):
        if arrays[name].shape != (len(obs),):
            raise ValueError(f"`{name}` must have shape ({len(obs)},), one number per transition, not {arrays[name].shape}.")
    if len(arrays["actions"]) != len(obs):
        raise ValueError(f"`actions` must have a row for each of the {len(obs)} transitions, not {len(arrays['actions'])}.")
    for name in ("observations", "next_observations", "actions", "rewards", *flags):
        array = arrays[name]
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
            raise ValueError(f"`{name}` must hold numbers, not {array.dtype}.")
        # In single precision, in which models are fitted
        bad = np.flatnonzero(~in_float32(array.reshape(len(obs), -1)).all(axis=1))
        if len(bad) > 0:
            raise ValueError(
                f"`{name}` has NaN or infinite numbers in {len(bad)} of {len(obs)} rows, first in row {bad[0]}: "
                f"{array[bad[0]]}. Leave these transitions out."
            )
        check_counts(f"`{name}`", array)
    for name in flags:
        if not np.isin(arrays[name], (0, 1)).all():
            raise ValueError(f"`{name}` must be True or False, 1 or 0.")


def _space_of(actions: np.ndarray) -> spaces.Space[Any]:
    """Return the smallest space that holds the actions."""
    if actions.dtype == bool and actions.ndim == 2:
        return spaces.MultiBinary(actions.shape[1])
    if np.issubdtype(actions.dtype, np.integer) and actions.ndim in (1, 2):
        if actions.min() < 0:
            raise ValueError(f"`actions` are integers down to {actions.min()}, but choices must count from 0.")
        largest = actions.max(axis=0).astype(int)
        return spaces.Discrete(int(largest) + 1) if actions.ndim == 1 else spaces.MultiDiscrete(largest + 1)
    if np.issubdtype(actions.dtype, np.floating) and actions.ndim == 2:
        low, high = (bound.astype(np.float32) for bound in (actions.min(axis=0), actions.max(axis=0)))
        constant = np.flatnonzero(low == high)
        if len(constant) > 0:
            raise ValueError(
                f"`actions` are always {low[constant[0]]} in column {constant[0]}, so their range is unknown: "
                "pass `action_space`."
            )
        return spaces.Box(low, high)
    raise ValueError(
        "`actions` must be (B, A) floats, (B,) integers, (B, K) integers or (B, K) booleans, "
        f"not {actions.dtype} of shape {actions.shape}."
    )


def _check_actions(actions: np.ndarray, space: spaces.Space[Any]) -> None:
    """Raise ``ValueError`` if an action is outside the space by more than rounding."""
    if actions.shape[1:] != space.shape:
        raise ValueError(f"`actions` have shape {actions.shape}: they are not of the action space {space}.")
    flat = actions.reshape(len(actions), -1)
    if isinstance(space, spaces.Box):
        slack = 1e-5 * (space.high - space.low)
        low, high = (space.low - slack).reshape(-1), (space.high + slack).reshape(-1)
    else:
        if not np.array_equal(flat, flat.astype(int)):
            raise ValueError(f"`actions` must be whole numbers in the action space {space}.")
        low, high = np.zeros(flat.shape[1]), np.ones(flat.shape[1])
        if isinstance(space, spaces.Discrete):
            high = np.array([space.n - 1])
        elif isinstance(space, spaces.MultiDiscrete):
            high = space.nvec - 1
    outside = np.flatnonzero(((flat < low) | (flat > high)).any(axis=1))
    if len(outside) > 0:
        raise ValueError(
            f"{len(outside)} of {len(actions)} `actions` are outside the action space {space}, first in row {outside[0]}: "
            f"{actions[outside[0]]}. Record the actions that the environment received, after clipping, or pass the right "
            "`action_space`."
        )
