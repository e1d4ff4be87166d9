"""A video of a MuJoCo rollout beside the model's prediction of it. Needs Pillow, which comes with matplotlib.

The prediction is rendered by setting the simulator to the predicted observation. This works if the observation holds the whole
state except coordinates on which the dynamics do not depend, such as how far a runner has moved: these are integrated from
their velocities.
"""

import io
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw

from sb3_mbmpo.mbmpo import MBMPO
from sb3_mbmpo.report.colours import REAL, member_colours
from sb3_mbmpo.report.episodes import meta_actor, play_episode
from sb3_mbmpo.report.study import open_loop

# Pixels per side; number of steps shown; steps per frame, because rendering without a GPU is slow
SIZE, MAX_STEPS, FRAME_STEPS = 240, 200, 2
# The ensemble member whose prediction is shown
MEMBER = 0


class NoFilmError(Exception):
    """Raised if no video can be made; the message says why."""


class StateLayout(NamedTuple):
    """
    How an observation holds the simulator's state.

    :param n_skipped: number of leading positions that it leaves out
    :param n_positions: number of positions, with which it begins
    :param n_velocities: number of velocities, which follow
    """

    n_skipped: int
    n_positions: int
    n_velocities: int

    def split(self, obs: np.ndarray, skipped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Split an observation into the simulator's positions and velocities.

        :param obs: (O,)
        :param skipped: the positions left out (n_skipped,)
        :return: all positions and velocities
        """
        positions, velocities, _ = np.split(obs, np.cumsum([self.n_positions, self.n_velocities]))
        return np.concatenate([skipped, positions]), velocities


def state_layout(simulator: Any) -> StateLayout:
    """
    Find out by trial how the observation holds the state: reading it in this way must give the simulator's actual state.

    :param simulator: an unwrapped Gymnasium environment, after a reset; its state is set
    :return: the layout
    :raises NoFilmError: if it is not a MuJoCo environment, or the observation does not hold the state
    """
    if not hasattr(simulator, "set_state") or not hasattr(simulator, "_get_obs"):
        raise NoFilmError("only MuJoCo environments have a video, because their state can be set.")
    model, positions, velocities = simulator.model, simulator.data.qpos.copy(), simulator.data.qvel.copy()
    obs = simulator._get_obs()
    # A free joint has more positions than velocities, but its first three positions match its first three velocities
    for n_skipped in range(3):
        layout = StateLayout(n_skipped, model.nq - n_skipped, model.nv)
        if len(obs) < layout.n_positions + layout.n_velocities:
            continue
        found = layout.split(obs, positions[:n_skipped])
        if np.allclose(found[0], positions) and np.allclose(found[1], velocities):
            simulator.set_state(*found)
            return layout
    raise NoFilmError("its observation does not hold the simulator's positions and velocities.")


def film(model: MBMPO, make_env: Callable[..., gym.Env[Any, Any]], seed: int) -> bytes:
    """
    Make a video of a real episode beside its prediction.

    :param model: a trained model
    :param make_env: makes its real environment; takes the arguments of ``gymnasium.make``
    :param seed: seed of the episode
    :return: an animated WebP: the real episode of the meta-policy left, the prediction from its first observation and its
        actions right
    :raises NoFilmError: if the state cannot be set from the observation
    """
    with closing(make_env()) as env:
        env.reset(seed=seed)
        layout = state_layout(env.unwrapped)
    with closing(make_env(render_mode="rgb_array", width=SIZE, height=SIZE)) as env:
        simulator: Any = env.unwrapped
        _follow(simulator)
        states: list[np.ndarray] = []
        frames: list[np.ndarray] = []

        def record() -> None:
            if len(states) % FRAME_STEPS == 0 and len(states) <= MAX_STEPS:
                frames.append(np.asarray(env.render()))
            states.append(simulator.data.qpos[: layout.n_skipped].copy())

        episode = play_episode(env, meta_actor(model), seed, record)
        actions = episode.actions[None, :MAX_STEPS]
        predicted = open_loop(model._model_env(None), episode.obs[:1], actions)[MEMBER, 0]
        skipped, colour = states[0], member_colours(model.n_models)[MEMBER]
        images = [_side_by_side(frames[0], frames[0], 0, colour)]
        for step, obs in enumerate(predicted, start=1):
            positions, velocities = layout.split(obs.astype(float), skipped)
            skipped = skipped + simulator.dt * velocities[: layout.n_skipped]
            if step % FRAME_STEPS == 0:
                simulator.set_state(np.concatenate([skipped, positions[layout.n_skipped :]]), velocities)
                guess = np.asarray(env.render())
                images.append(_side_by_side(frames[step // FRAME_STEPS], guess, step, colour))
        return _webp(images, milliseconds=round(1000 * simulator.dt * FRAME_STEPS))


def _follow(simulator: Any) -> None:
    """Use the camera that follows the robot, if the model has one."""
    cameras = [simulator.model.camera(i).name for i in range(simulator.model.ncam)]
    if "track" in cameras:
        simulator.mujoco_renderer.camera_id = cameras.index("track")


def _side_by_side(real: np.ndarray, guess: np.ndarray, step: int, colour: str) -> Image.Image:
    canvas = Image.new("RGB", (2 * SIZE + 4, SIZE), "white")
    draw = ImageDraw.Draw(canvas)
    texts = (f"real, step {step}", f"member {MEMBER}, {step} steps ahead")
    for x, image, text, fill in zip((0, SIZE + 4), (real, guess), texts, (REAL, colour), strict=True):
        canvas.paste(Image.fromarray(image), (x, 0))
        draw.rectangle((x, 0, x + SIZE, 14), fill="white")
        draw.text((x + 4, 2), text, fill=fill)
    return canvas


def _webp(images: list[Image.Image], milliseconds: int) -> bytes:
    file = io.BytesIO()
    images[0].save(file, "WEBP", save_all=True, append_images=images[1:], duration=milliseconds, loop=0, quality=60)
    return file.getvalue()
