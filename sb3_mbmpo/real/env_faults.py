"""What vectorised environments get wrong without raising: observations that are overwritten, and ends that cannot be known.

Legend of shapes: ``B`` environments, ``O`` observation size.
"""

import warnings
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_mbmpo.real.replay_files import BUFFER_ARRAYS

# In small discrete spaces an episode may well end where the next one begins, but not all of them do
ENDS_TO_BELIEVE = 3


class EnvFaults:
    """
    Sees every real step and warns once of each fault. Plain numbers, so that it is saved with the model.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._n_ends = self._n_overwritten_ends = 0

    def reused(self, new_obs: np.ndarray, handed_out: np.ndarray | None) -> None:
        """
        Take note if the environment reuses the array that it returned.

        :param new_obs: what the environment returned (B, O)
        :param handed_out: what it returned the step before
        """
        if handed_out is not None and np.may_share_memory(new_obs, handed_out):
            self._warn(
                "reused",
                "The environment writes every observation into the same array: whoever keeps one finds another in it. Here "
                "they are copied; let its `step` and `reset` return copies, for callbacks and other algorithms.",
            )

    def unknown_ends(
        self, dones: np.ndarray, infos: list[dict[str, Any]], new_obs: np.ndarray, unchanged: np.ndarray
    ) -> np.ndarray:
        """
        Find the steps that end an episode and do not say where.

        :param dones: (B,)
        :param infos: of each environment
        :param new_obs: (B, O) the first ones of the next episode where one has ended
        :param unchanged: which environments' new observation is the one before the step (B,): an end there is no sign
        :return: which environments' last observation is not known (B,)
        """
        unknown = np.zeros(len(dones), dtype=bool)
        for i in np.flatnonzero(dones):
            terminal = infos[i].get("terminal_observation")
            if terminal is None:
                unknown[i] = True
                self._warn(
                    "missing",
                    "The environment ended an episode without `infos[i]['terminal_observation']`: the observation it returned "
                    "is the first one of the next episode, and where the last step led is not known. Such steps are left "
                    "out, so nothing is learned of how episodes end: let the VecEnv put it there, as those of "
                    "Stable-Baselines3 do.",
                )
            elif not unchanged[i]:
                self._n_ends += 1
                self._n_overwritten_ends += np.array_equal(np.asarray(terminal, new_obs.dtype), new_obs[i])
                unknown[i] = self._n_overwritten_ends == self._n_ends
                if unknown[i] and self._n_ends >= ENDS_TO_BELIEVE:
                    self._warn(
                        "overwritten",
                        "Every episode so far seems to have ended at the first observation of the next one: `reset` writes "
                        "into the array that `step` has returned. Such steps are left out, so nothing is learned of how "
                        "episodes end: let the environment's `step` return a copy.",
                    )
        return unknown

    def _warn(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message)


def leave_out_last_step(buffer: ReplayBuffer, left_out: np.ndarray) -> None:
    """
    Put the step before in the place of the last one, which is not to be learned from: a buffer has no holes.

    :param buffer: has just received the step
    :param left_out: of which environments (B,)
    """
    last = (buffer.pos - 1) % buffer.buffer_size
    if buffer.size() == 1:  # there is none before
        buffer.pos, buffer.full = 0, False
        return
    for name in BUFFER_ARRAYS:
        values = getattr(buffer, name)
        values[last, left_out] = values[last - 1, left_out]
