"""Discounted returns of real episodes, with which a critic's values can be compared.

Legend of shapes: ``E`` environments, ``O`` observation size.
"""

from typing import NamedTuple

import numpy as np


class DiscountedEpisode(NamedTuple):
    """
    A finished real episode.

    :param first_obs: raw (O,)
    :param final_obs: raw (O,), after the last step
    :param discounted_return: sum of gamma^t r_t
    :param bootstrap: weight of the final observation's value: gamma^length, or 0 after a termination
    """

    first_obs: np.ndarray
    final_obs: np.ndarray
    discounted_return: float
    bootstrap: float


class DiscountedReturns:
    """
    Running sums of the discounted rewards of unfinished episodes, in plain arrays, which are saved with the model.

    :param n_envs: number of environments ``E``
    :param gamma: discount factor
    """

    def __init__(self, n_envs: int, gamma: float) -> None:
        self._gamma = gamma
        self._discount, self._sum = np.ones(n_envs), np.zeros(n_envs)
        self._first_obs: list[np.ndarray | None] = [None] * n_envs
        self._over: list[DiscountedEpisode] = []

    def step(
        self, obs: np.ndarray, rewards: np.ndarray, next_obs: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
    ) -> None:
        """
        Record one step of every environment.

        :param obs: raw, before the step (E, O)
        :param rewards: raw (E,)
        :param next_obs: raw, after the step and before a reset (E, O)
        :param terminated: whether the episode terminated (E,) bool
        :param truncated: whether a time limit ended it (E,) bool
        """
        for i in range(len(rewards)):
            if self._first_obs[i] is None:
                self._first_obs[i] = obs[i].copy()
        self._sum += self._discount * rewards
        self._discount *= self._gamma
        for i in np.flatnonzero(terminated | truncated).tolist():
            first_obs = self._first_obs[i]
            assert first_obs is not None
            bootstrap = 0.0 if terminated[i] else float(self._discount[i])
            self._over.append(DiscountedEpisode(first_obs, next_obs[i].copy(), float(self._sum[i]), bootstrap))
            self._discount[i], self._sum[i], self._first_obs[i] = 1, 0, None

    def take(self) -> list[DiscountedEpisode]:
        """Return the episodes that ended since the last call."""
        over, self._over = self._over, []
        return over
