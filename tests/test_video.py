"""The video of the report: states found in observations, and what is filmed."""

import io

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from PIL import Image
from tiny import tiny_model

from sb3_mbmpo.report import loading, video
from sb3_mbmpo.report.page import film_section


@pytest.mark.parametrize(
    ("name", "n_skipped"),
    [("HalfCheetah", 1), ("Hopper", 1), ("Walker2d", 1), ("Swimmer", 2), ("Ant", 2), ("InvertedPendulum", 0)],
)
def test_the_state_is_found_in_the_observation(name, n_skipped):
    simulator = gym.make(f"{name}-v5").unwrapped
    obs, _ = simulator.reset(seed=0)
    layout = video.state_layout(simulator)
    assert layout.n_skipped == n_skipped
    simulator.set_state(*layout.split(obs, np.full(n_skipped, 7.0)))
    np.testing.assert_allclose(simulator._get_obs(), obs, atol=1e-6)
    np.testing.assert_array_equal(simulator.data.qpos[:n_skipped], 7)


@pytest.mark.parametrize("env_id", ["Reacher-v5", "InvertedDoublePendulum-v5", "Pendulum-v1"])
def test_an_observation_without_the_state_is_not_filmed(env_id):
    simulator = gym.make(env_id).unwrapped
    simulator.reset(seed=0)
    with pytest.raises(video.NoFilmError, match=r"only MuJoCo|does not hold"):
        video.state_layout(simulator)


class Painted(gym.Wrapper):
    """An environment that renders without a graphics driver, and records its state."""

    def __init__(self, env, seen):
        super().__init__(env)
        self.seen = seen

    def render(self):
        self.seen.append(self.unwrapped.data.qpos.copy())
        return np.zeros((video.SIZE, video.SIZE, 3), np.uint8)


def test_a_film_shows_predicted_states_and_how_far_they_have_got():
    def make_env(**kwargs):
        return Painted(gym.make("HalfCheetah-v5", max_episode_steps=6), seen)

    seen = []
    model = tiny_model(gym.make("HalfCheetah-v5"))
    film = Image.open(io.BytesIO(video.film(model, make_env, seed=3)))
    assert film.n_frames == 4
    real, imagined = np.array(seen[:4]), np.array(seen[4:])

    simulator = gym.make("HalfCheetah-v5", max_episode_steps=6)
    first, _ = simulator.reset(seed=3)
    x, dt = simulator.unwrapped.data.qpos[0], simulator.unwrapped.dt
    np.testing.assert_allclose(real[0], simulator.unwrapped.data.qpos)
    obs, steps = first, model.dynamics.step_fn(model._dynamics_options.clip_margin)
    predicted = []
    for _ in range(6):
        action, _ = model.predict(first, deterministic=True)
        first, *_ = simulator.step(action)
        batch = (th.as_tensor(value, dtype=th.float32).expand(2, 1, -1) for value in (obs, action))
        obs = steps(*batch).next_obs[0, 0].numpy()
        x += dt * obs[8]
        predicted.append([x, *obs[:8]])
    np.testing.assert_allclose(imagined, predicted[1::2], rtol=1e-3, atol=1e-4)


def test_a_simulator_that_cannot_render_gets_a_sentence(tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("no driver")

    monkeypatch.setattr(gym.Wrapper, "render", broken)
    model = tiny_model(gym.make("HalfCheetah-v5"))
    text = film_section(model, loading.env_maker("HalfCheetah-v5", model), 0, tmp_path)
    assert "Left out: the simulator cannot render here (RuntimeError: no driver)" in text
    assert not list(tmp_path.iterdir())
