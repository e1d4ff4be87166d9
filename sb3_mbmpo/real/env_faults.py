"""Silent faults of vectorised environments: observations that are overwritten, and unknown final observations.

Legend of shapes: ``B`` environments, ``O`` observation size.
"""

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_mbmpo.common.warn_once import WarnsOnce
from sb3_mbmpo.real.replay_files import BUFFER_ARRAYS

# In small discrete spaces an episode may end where the next one begins, but not every episode does
ENDS_TO_BELIEVE = 3


class EnvFaults(WarnsOnce):
    """
    Detector of faults in the real steps, which warns once of each. Its state is plain numbers, saved with the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self._n_ends = self._n_overwritten_ends = 0

    def reused(self, new_obs: np.ndarray, handed_out: np.ndarray | None) -> None:
        """
        Warn if the environment reuses the array that it returned.

        :param new_obs: what the environment returned (B, O)
        :param handed_out: what it returned in the previous step (B, O)
        """
        if handed_out is not None and np.may_share_memory(new_obs, handed_out):
            self._warn(
                "reused",
                "The environment writes every observation into the same array, so an observation that is kept changes later. "
                "MBMPO copies them; for callbacks and other algorithms, let `step` and `reset` return copies.",
            )

    def unknown_ends(
        self, dones: np.ndarray, infos: list[dict[str, Any]], new_obs: np.ndarray, unchanged: np.ndarray
    ) -> np.ndarray:
        """
        Find the steps that end an episode without a usable final observation.

        :param dones: (B,) bool
        :param infos: one dictionary per environment
        :param new_obs: (B, O), the first observation of the next episode where one has ended
        :param unchanged: whether the new observation equals the one before the step (B,) bool: such ends prove nothing
        :return: whether the final observation is unknown (B,) bool
        """
        unknown = np.zeros(len(dones), dtype=bool)
        for i in np.flatnonzero(dones):
            terminal = infos[i].get("terminal_observation")
            if terminal is None:
                unknown[i] = True
                self._warn(
                    "missing",
                    "The environment ended an episode without `infos[i]['terminal_observation']`: the observation it returned "
                    "is the first one of the next episode, so the result of the last step is unknown. Such steps are left "
                    "out, so nothing is learned about how episodes end: let the VecEnv set it, as those of "
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
                        "into the array that `step` has returned. Such steps are left out, so nothing is learned about how "
                        "episodes end: let the environment's `step` return a copy.",
                    )
        return unknown


def leave_out_last_step(buffer: ReplayBuffer, left_out: np.ndarray) -> None:
    """
    Replace the last step, which must not be learned from, by a copy of the one before: a buffer cannot have gaps.

    :param buffer: the buffer, which has just received the step
    :param left_out: the environments whose step is left out (B,) bool
    """
    last = (buffer.pos - 1) % buffer.buffer_size
    if buffer.size() == 1:  # there is no step before
        buffer.pos, buffer.full = 0, False
        return
    for name in BUFFER_ARRAYS:
        values = getattr(buffer, name)
        values[last, left_out] = values[last - 1, left_out]
