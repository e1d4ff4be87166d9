"""A MuJoCo rollout beside the model's prediction of it, both rendered. Needs Pillow, which comes with matplotlib.

The prediction is rendered by setting the simulator to the predicted observation, where that holds the whole state but for
coordinates that the task does not depend on, such as how far a runner has got: those are integrated from their velocities.
"""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw

from sb3_mbmpo.diagnostics import meta_actor, open_loop, play_episode
from sb3_mbmpo.mbmpo import MBMPO

SIZE, MAX_FRAMES, MAX_STEPS = 240, 100, 200


class NoFilmError(Exception):
    """There is nothing to film, and the message says why."""


class StateLayout(NamedTuple):
    """
    How an observation holds the simulator's state.

    :param n_skipped: leading positions that it leaves out
    :param n_positions: positions that it begins with
    :param n_velocities: velocities that come next
    """

    n_skipped: int
    n_positions: int
    n_velocities: int

    def split(self, obs: np.ndarray, skipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        :param obs: (O,)
        :param skipped: the positions left out (n_skipped,)
        :return: all positions and velocities
        """
        positions, velocities, _ = np.split(obs, np.cumsum([self.n_positions, self.n_velocities]))
        return np.concatenate([skipped, positions]), velocities


def state_layout(simulator: Any) -> StateLayout:
    """
    Found by trial: the simulator is set to the state that its observation seems to hold, and must then observe the same.

    :param simulator: an unwrapped Gymnasium environment, after a reset; its state is set
    :raises NoFilmError: if it is none of MuJoCo, or the observation does not hold the state
    """
    if not hasattr(simulator, "set_state") or not hasattr(simulator, "_get_obs"):
        raise NoFilmError("only MuJoCo environments are filmed, whose state can be set.")
    model, positions, velocities = simulator.model, simulator.data.qpos.copy(), simulator.data.qvel.copy()
    obs = simulator._get_obs()
    # A free joint has more positions than velocities, but its first three are those of the other's
    for n_skipped in range(3):
        layout = StateLayout(n_skipped, model.nq - n_skipped, model.nv)
        if len(obs) < layout.n_positions + layout.n_velocities:
            continue
        found = layout.split(obs, positions[:n_skipped])
        if np.allclose(found[0], positions) and np.allclose(found[1], velocities):
            simulator.set_state(*found)
            return layout
    raise NoFilmError("its observation does not hold positions and velocities as the simulator has them.")


def film(model: MBMPO, make_env: Callable[[], gym.Env[Any, Any]], seed: int, member: int = 0) -> bytes:
    """
    :param model: trained
    :param make_env: makes its real environment, with ``render_mode="rgb_array"``
    :param seed: of the episode
    :param member: whose prediction is shown
    :return: an animated WebP: the real episode of the meta-policy left, the prediction from its first observation and its
        actions right
    :raises NoFilmError: if the state cannot be set from the observation
    """
    env = make_env()
    frames: list[np.ndarray] = []
    starts: list[np.ndarray] = []  # of the positions that the observation leaves out
    simulator: Any = env.unwrapped
    env.reset(seed=seed)
    layout = state_layout(simulator)

    def record() -> None:
        if len(frames) <= MAX_STEPS:
            frames.append(np.asarray(env.render()))
            starts.append(simulator.data.qpos[: layout.n_skipped].copy())

    episode = play_episode(env, meta_actor(model), seed, record)
    n_steps = len(frames) - 1
    predicted = open_loop(model.dynamics, episode.obs[:1], episode.actions[None, :n_steps], model._clip_margin)[member, 0]
    skipped, imagined = starts[0], [frames[0]]
    for obs in predicted:
        positions, velocities = layout.split(obs.astype(float), skipped)
        skipped = skipped + simulator.dt * velocities[: layout.n_skipped]
        positions[: layout.n_skipped] = skipped
        simulator.set_state(positions, velocities)
        imagined.append(np.asarray(env.render()))
    env.close()
    every = -(-len(frames) // MAX_FRAMES)
    pairs = [
        _side_by_side(real, guess, f"real, step {t}", f"member {member}, {t} steps ahead")
        for t, (real, guess) in enumerate(zip(frames, imagined, strict=True))
    ]
    return _webp(pairs[::every], milliseconds=round(1000 * simulator.dt * every))


def _side_by_side(real: np.ndarray, guess: np.ndarray, real_text: str, guess_text: str) -> Image.Image:
    canvas = Image.new("RGB", (2 * SIZE + 4, SIZE), "white")
    for x, image, text in ((0, real, real_text), (SIZE + 4, guess, guess_text)):
        canvas.paste(Image.fromarray(image).resize((SIZE, SIZE)), (x, 0))
        draw = ImageDraw.Draw(canvas)
        draw.rectangle((x, 0, x + SIZE, 14), fill="white")
        draw.text((x + 4, 2), text, fill="black")
    return canvas


def _webp(images: list[Image.Image], milliseconds: int) -> bytes:
    file = io.BytesIO()
    images[0].save(file, "WEBP", save_all=True, append_images=images[1:], duration=milliseconds, loop=0, quality=60)
    return file.getvalue()
