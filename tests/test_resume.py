"""A model that is saved at the end of an iteration and loaded in a fresh process continues as if it had never stopped."""

import multiprocessing

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize
from tiny import ACTION_SPACES, Drift, Unknown, assert_same, parameters, tiny_model, vec_drift

from sb3_mbmpo import MBMPO

# No file contains the environment. Every episode starts in the same state and every iteration ends with an episode, so that
# it is the same for a process that begins with a reset
ENV = dict(random_start=False, length=10)
# The point cannot leave within so few steps: no episode ends early
SHORT = dict(length=5)
NETWORKS = dict(net_arch=[8], max_epochs=2)
CASES = {
    "box": (Drift, dict(n_tasks=4), {}),
    "discrete": (Drift, dict(outer_optimizer="ppo", learning_rate=lambda progress: 1e-3 * progress), dict(n_envs=2)),
    "multi_binary": (Unknown, dict(learn_inner_lr=True, n_inner_steps=2, buffer_size=70), {}),
    "multi_discrete": (
        Drift,
        dict(dynamics_kwargs=dict(net_arch=[8], max_epochs=2, probabilistic=True, reinit_every=2)),
        SHORT,
    ),
}


def make_env(case):
    env_class, _, env_kwargs = CASES[case]
    return vec_drift(env_class=env_class, action_space=ACTION_SPACES[case], **{**ENV, **env_kwargs})


def state(model):
    """Return everything that determines how the model continues, and the number of real steps so far."""
    buffer = model.replay_buffer
    arrays = {
        name: getattr(buffer, name).copy() for name in ("observations", "actions", "next_observations", "rewards", "dones")
    }
    moments = {
        f"{key}.{name}": value
        for key, s in model.dynamics.optimizer.state_dict()["state"].items()
        for name, value in s.items()
    }
    counters = {name: np.array(getattr(model, name)) for name in ("num_timesteps", "_n_updates", "_episode_num", "_n_fits")}
    returns = {"returns": np.array([episode["r"] for episode in model.ep_info_buffer])}
    outer = {"adapted": model._adapted, "outer": model._meta_parameters().vector(), "starts": model._initial_obs}
    random = {name: generator.get_state() for name, generator in model._generators.items()}
    return {**parameters(model), **arrays, **moments, **counters, **returns, **outer, **random}


def resume(folder):
    """Resume all cases; runs in another process."""
    th.set_num_threads(1)
    for case in CASES:
        model = MBMPO.load(folder / f"{case}.zip", env=make_env(case))
        model.load_replay_buffer(folder / f"{case}.pkl")
        model.learn(60, reset_num_timesteps=False)
        th.save(state(model), folder / f"{case}.pt")


@pytest.fixture(scope="module")
def uninterrupted_and_resumed(tmp_path_factory):
    """Return, for each case, the states of a run half-way and at its end, and the final state of one resumed half-way."""
    folder = tmp_path_factory.mktemp("resume")
    models = {case: tiny_model(make_env(case), **options) for case, (_, options, _) in CASES.items()}
    for case, model in models.items():
        model.learn(60, reset_num_timesteps=False)
        model.save(folder / case)
        model.save_replay_buffer(folder / case)
    half = {case: state(model) for case, model in models.items()}
    # One process for all cases, because most of its time goes into imports
    process = multiprocessing.get_context("spawn").Process(target=resume, args=(folder,))
    process.start()
    for model in models.values():
        model.learn(60, reset_num_timesteps=False)
    process.join(timeout=300)
    assert process.exitcode == 0
    return {
        case: (half[case], state(model), th.load(folder / f"{case}.pt", weights_only=False)) for case, model in models.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_resumes_to_the_last_bit_in_a_fresh_process(case, uninterrupted_and_resumed):
    half, end, resumed = uninterrupted_and_resumed[case]
    assert_same(resumed, end)
    assert end["num_timesteps"] == 120
    assert not th.equal(half["policy.action_net.weight"], end["policy.action_net.weight"])


@pytest.mark.parametrize("stop", [10, 34, 60], ids=["random-phase", "mid-episode", "iteration"])
@pytest.mark.parametrize("normalize", [False, True])
def test_goes_on_in_an_environment_that_lives_on(stop, normalize, tmp_path):
    """A model saved and loaded in between, with a random environment, equals a model that was never loaded."""
    models = []
    for loads in (False, True):
        env = vec_drift(2)
        env = VecNormalize(env) if normalize else env
        model = tiny_model(env, learning_starts=30).learn(stop)
        if loads:
            model.save(tmp_path / "model")
            model.save_replay_buffer(tmp_path / "buffer")
            model = MBMPO.load(tmp_path / "model", env=env, force_reset=False)
            model.load_replay_buffer(tmp_path / "buffer")
        models.append(model.learn(80 - stop, reset_num_timesteps=False))
    assert_same(*map(state, models))
    assert models[1].num_timesteps == 80


def test_no_second_random_phase_even_without_the_buffer(tmp_path):
    model = tiny_model(policy_kwargs=dict(net_arch=[8], log_std_init=-10.0), exploration="meta").learn(40)
    model.save(tmp_path / "model")
    loaded = MBMPO.load(tmp_path / "model", env=Drift())
    greedy = []

    def remember(step, _):
        # The observation that the action answers is still the last one when callbacks run
        greedy.append(step["self"].predict(step["self"]._last_obs, deterministic=True)[0])
        return True

    loaded.learn(20, callback=remember)
    np.testing.assert_allclose(loaded.replay_buffer.actions[:20], np.stack(greedy), atol=1e-2)
