"""An environment small enough to be inspected completely: ``gymnasium.make("sb3_mbmpo.envs:Point2D-v0")``.

Gymnasium imports the module before the colon, and the module registers the id.
"""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch as th

MAX_EPISODE_STEPS = 50


class Point2D(gym.Env[np.ndarray, np.ndarray]):
    """
    A point between four walls that has to move to the origin.

    It is the point of section 6.3 of Clavera et al. 2018, with walls added, which a model has to learn. Observation: the
    position (2,), each coordinate in [-2, 2]. Action: the displacement of a step (2,), each coordinate in [-0.1, 0.1]; a wall
    stops it. Reward: minus the distance to the origin after the step. Episodes start at a random position, and only the time
    limit of 50 steps ends them. Moving to the origin at full speed earns -10 on average.
    """

    WALL, MAX_DISPLACEMENT = 2.0, 0.1

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}  # type: ignore[misc]

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(-self.WALL, self.WALL, (2,), np.float32)
        self.action_space = gym.spaces.Box(-self.MAX_DISPLACEMENT, self.MAX_DISPLACEMENT, (2,), np.float32)
        self.position = np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode at a uniformly random position."""
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-self.WALL, self.WALL, 2).astype(np.float32)
        return self.position.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        Move the point.

        :param action: the displacement (2,)
        """
        displacement = np.clip(action, -self.MAX_DISPLACEMENT, self.MAX_DISPLACEMENT)
        self.position = np.clip(self.position + displacement, -self.WALL, self.WALL).astype(np.float32)
        return self.position.copy(), -float(np.linalg.norm(self.position)), False, False, {}

    def render(self) -> np.ndarray:
        """Draw the plane from above (200, 200, 3): the origin is green, the point black."""
        image = np.full((200, 200, 3), 255, np.uint8)
        for position, half_width, colour in ((np.zeros(2), 6, (0, 158, 115)), (self.position, 4, (0, 0, 0))):
            column, row = (100 + 95 / self.WALL * position * (1, -1)).astype(int)
            image[row - half_width : row + half_width, column - half_width : column + half_width] = colour
        return image

    @staticmethod
    def reward(obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> th.Tensor:
        """Return the rewards (B,) of transitions (B, 2), for the imagination."""
        distance: th.Tensor = th.linalg.vector_norm(next_obs, dim=1)
        return -distance

    @staticmethod
    def done(next_obs: th.Tensor) -> th.Tensor:
        """Tell which observations (B, 2) end an episode: none do."""
        return th.zeros(len(next_obs), dtype=th.bool, device=next_obs.device)


gym.register("Point2D-v0", entry_point="sb3_mbmpo.envs:Point2D", max_episode_steps=MAX_EPISODE_STEPS)
