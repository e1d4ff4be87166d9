"""A simulator that goes on where it was in another process. No file holds one: it repeats its episode, action by action."""

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np


class EpisodeSoFar(NamedTuple):
    """
    How an environment came to where it is.

    :param seed: of the reset that began the episode; None: it had none
    :param start: state of the random numbers before that reset; None: the seed says it, or there is no telling
    :param actions: those since, one a row
    :param obs: where they led
    """

    seed: int | None
    start: dict[str, Any] | None
    actions: list[np.ndarray]
    obs: np.ndarray


class RepeatableEpisode(gym.Wrapper[np.ndarray, Any, np.ndarray, Any]):
    """
    Keeps the actions of the present episode. Environments whose random numbers are all from Gymnasium's ``np_random``, or that
    have none, can be brought back to where they were, to the last bit.

    :param env: to wrap
    """

    def __init__(self, env: gym.Env[np.ndarray, Any]) -> None:
        super().__init__(env)
        self._so_far: EpisodeSoFar | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        start = self._random_state() if seed is None else None
        obs, info = self.env.reset(seed=seed, options=options)
        self._so_far = EpisodeSoFar(seed, start, [], np.array(obs))
        return obs, info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        assert self._so_far is not None
        self._so_far.actions.append(np.array(action))
        self._so_far = self._so_far._replace(obs=np.array(result[0]))
        return result

    def so_far(self) -> EpisodeSoFar:
        """Return what ``repeat`` needs; the environment was reset before."""
        assert self._so_far is not None
        return self._so_far._replace(actions=list(self._so_far.actions))

    def repeat(self, episode: EpisodeSoFar) -> bool:
        """
        Repeat the episode of another environment so far.

        :param episode: of an environment that was made alike
        :return: whether this one is now where that one was
        """
        if episode.seed is None and episode.start is not None:
            self.unwrapped.np_random.bit_generator.state = episode.start
        obs, _ = self.reset(seed=episode.seed)
        for action in episode.actions:
            obs, _, terminated, truncated, _ = self.step(action)
            if terminated or truncated:  # that one went on
                return False
        return np.array_equal(obs, episode.obs)

    def _random_state(self) -> dict[str, Any] | None:
        """Return the state of the random numbers; None where an environment has those of another kind."""
        generator = getattr(self.unwrapped, "np_random", None)
        return dict(generator.bit_generator.state) if isinstance(generator, np.random.Generator) else None
