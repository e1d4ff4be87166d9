"""Resuming a simulator in another process. A file cannot hold a simulator, so its episode is repeated action by action."""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np


class EpisodeSoFar(NamedTuple):
    """
    The history of the current episode of an environment.

    :param seed: seed of the reset that began the episode, or None
    :param start: state of the random numbers before that reset; None if there was a seed, or the state is unknown
    :param actions: the actions since the reset
    :param obs: the latest observation
    """

    seed: int | None
    start: dict[str, Any] | None
    actions: list[np.ndarray]
    obs: np.ndarray


class RepeatableEpisode(gym.Wrapper[np.ndarray, Any, np.ndarray, Any]):
    """
    A wrapper that records the actions of the current episode, so that the episode can be repeated.

    An environment that draws all random numbers from Gymnasium's ``np_random``, or none at all, can be restored exactly.

    :param env: the environment to wrap
    """

    def __init__(self, env: gym.Env[np.ndarray, Any]) -> None:
        super().__init__(env)
        self._so_far: EpisodeSoFar | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """See ``gymnasium.Env``. It begins a new record."""
        start = self._random_state() if seed is None else None
        obs, info = self.env.reset(seed=seed, options=options)
        self._so_far = EpisodeSoFar(seed, start, [], np.array(obs))
        return obs, info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """See ``gymnasium.Env``. It records the action."""
        result = self.env.step(action)
        assert self._so_far is not None
        self._so_far.actions.append(np.array(action))
        self._so_far = self._so_far._replace(obs=np.array(result[0]))
        return result

    def so_far(self) -> EpisodeSoFar:
        """Return what ``repeat`` needs; the environment must have been reset before."""
        assert self._so_far is not None
        return self._so_far._replace(actions=list(self._so_far.actions))

    def repeat(self, episode: EpisodeSoFar) -> bool:
        """
        Repeat the episode of another environment.

        :param episode: the history of an environment that was made in the same way
        :return: whether this environment is now in the same state, as far as its observation shows
        """
        if episode.seed is None and episode.start is not None:
            self.unwrapped.np_random.bit_generator.state = episode.start
        obs, _ = self.reset(seed=episode.seed)
        for action in episode.actions:
            obs, _, terminated, truncated, _ = self.step(action)
            if terminated or truncated:  # the other environment's episode went on
                return False
        return np.array_equal(obs, episode.obs)

    def _random_state(self) -> dict[str, Any] | None:
        """Return the state of the random numbers, or None if the environment has another kind of generator."""
        generator = getattr(self.unwrapped, "np_random", None)
        return dict(generator.bit_generator.state) if isinstance(generator, np.random.Generator) else None
