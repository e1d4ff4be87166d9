"""Episodes of the imagined environment: they are those of the learned models, and of `imagine`."""

from itertools import pairwise

import numpy as np
import pytest
import torch as th
from known_models import (
    N_MODELS,
    OBS_DIM,
    assert_same_episodes,
    distance_reward,
    fit,
    fitted_ensemble,
    linear_ensemble,
    play,
    random_actions,
    starts,
)

from sb3_mbmpo import DynamicsEnsemble, ModelVecEnv
from sb3_mbmpo.common.distributions import DiagGaussian
from sb3_mbmpo.imagination.model_env import ModelEnv
from sb3_mbmpo.imagination.rollouts import imagine, task_groups


@pytest.mark.parametrize("model_index", range(N_MODELS))
@pytest.mark.parametrize("probabilistic", [False, True])
def test_steps_are_those_of_the_step_function(model_index, probabilistic):
    ensemble = fitted_ensemble(probabilistic=probabilistic)
    env = ModelVecEnv(ensemble, starts(), distance_reward, n_envs=7, model_index=model_index, clip_margin=0.2, seed=5)
    generator = th.Generator().manual_seed(int(np.random.default_rng(5).integers(2**63)))
    step = ensemble.step_fn(0.2, generator=generator, members=[model_index])
    expected = th.as_tensor(env.reset())
    for action in random_actions(env, 10):
        expected = step(expected[None], th.as_tensor(action)[None]).next_obs[0]
        np.testing.assert_array_equal(env.step(action)[0], expected)


@pytest.mark.parametrize("learned", [False, True])
def test_episodes_are_those_of_imagine(learned):
    ensemble = fitted_ensemble(n_models=1, learned_reward=learned, learned_termination=learned)
    if learned:
        with th.no_grad():
            ensemble.weights[-1][..., -1] *= 100  # a logit that is sometimes positive
    reward_fn = None if learned else distance_reward
    termination_fn = None if learned else (lambda next_obs: next_obs[:, 0] > 0.5)
    env = ModelVecEnv(ensemble, starts(), reward_fn, termination_fn, n_envs=30, horizon=12, clip_margin=0.1, seed=0)
    functions = dict(reward_fn=reward_fn, termination_fn=termination_fn)
    model_env = ModelEnv.of(ensemble, **functions, clip_margin=0.1)

    def act(policy_input):
        return DiagGaussian(th.sin(policy_input[..., :2]), th.full((1, 1, 2), -1.0))

    obs = env.reset()
    options = dict(to_policy_input=lambda obs: obs, horizon=12, generators=[th.Generator().manual_seed(0)])
    imagined = imagine(task_groups([model_env], 1), [act], th.as_tensor(obs)[None], **options)
    alive = np.ones(30, dtype=bool)
    n_terminated = 0
    for t in range(imagined.alive.shape[1]):
        np.testing.assert_array_equal(imagined.alive[0, t], alive)
        np.testing.assert_array_equal(imagined.policy_input[0, t][alive], obs[alive])
        action = ensemble.codec.to_numpy(ensemble.codec.to_env(imagined.actions[0, t]))
        obs, rewards, dones, infos = env.step(action)
        np.testing.assert_array_equal(imagined.rewards[0, t][alive], rewards[alive])
        terminated = dones & ~np.array([info["TimeLimit.truncated"] for info in infos])
        np.testing.assert_array_equal(imagined.terminated[0, t][alive], terminated[alive])
        n_terminated += (terminated & alive).sum()
        alive = alive & ~dones
    assert 0 < n_terminated < 30, "both kinds of ends must occur"


def test_each_environment_follows_its_own_member():
    ensemble = fitted_ensemble()
    env = ModelVecEnv(ensemble, starts(), distance_reward, n_envs=20, horizon=4, clip_margin=None, seed=0)
    obs = env.reset()
    for action in random_actions(env, 12):
        expected = ensemble.predict(obs, action)
        obs, _, dones, infos = env.step(action)
        for i, info in enumerate(infos):
            next_obs = info["terminal_observation"] if dones[i] else obs[i]
            # Not bit for bit: a matrix product with other rows may sum in another order
            np.testing.assert_allclose(next_obs, expected[info["model_index"], i], rtol=1e-5, atol=1e-5)


def test_a_random_member_for_the_length_of_an_episode():
    env = ModelVecEnv(linear_ensemble(), np.zeros((1, OBS_DIM)), distance_reward, n_envs=10, horizon=5, seed=0)
    env.reset()
    members = []
    for t, action in enumerate(random_actions(env, 50)):
        expected_members = [info["model_index"] for info in env.reset_infos]
        obs, _, dones, infos = env.step(action)
        assert [info["model_index"] for info in infos] == expected_members
        step_in_episode = t % 5 + 1
        assert dones.all() == (step_in_episode == 5)
        for i, info in enumerate(infos):
            state = info["terminal_observation"] if dones[i] else obs[i]
            np.testing.assert_array_equal(state, step_in_episode * (info["model_index"] + 1))
        if dones.all():
            members.append(expected_members)
    # 100 episodes: a member is left out, or an environment keeps its own, with a probability below 1e-3
    counts = np.bincount(np.ravel(members), minlength=N_MODELS)
    assert counts.min() > 10
    assert all(len(set(of_one_env)) > 1 for of_one_env in zip(*members, strict=True))


def test_a_chosen_member_is_the_only_one():
    env = ModelVecEnv(linear_ensemble(), np.zeros((1, OBS_DIM)), distance_reward, n_envs=10, horizon=2, model_index=1)
    env.reset()
    for action in random_actions(env, 6):
        *_, infos = env.step(action)
        assert {info["model_index"] for info in infos + env.reset_infos} == {1}


def test_a_random_member_for_each_step():
    env = ModelVecEnv(
        linear_ensemble(), np.zeros((1, OBS_DIM)), distance_reward, n_envs=10, horizon=5, seed=0, resample_model="step"
    )
    state, members = env.reset(), []
    assert {info["model_index"] for info in env.reset_infos} <= set(range(N_MODELS))
    first = [info["model_index"] for info in env.reset_infos]
    for t, action in enumerate(random_actions(env, 50)):
        obs, _, _, infos = env.step(action)
        of_step = np.array([info["model_index"] for info in infos])
        if t % 5 == 0:
            assert of_step.tolist() == first
        reached = np.stack([info.get("terminal_observation", row) for info, row in zip(infos, obs, strict=True)])
        np.testing.assert_array_equal(reached, state + of_step[:, None] + 1)
        members.append(of_step)
        first = [info["model_index"] for info in env.reset_infos]
        state = obs
    # 500 draws: each member's share is 1/3 +- 0.02, and so is the share of steps that keep the member
    counts = np.bincount(np.ravel(members), minlength=N_MODELS)
    assert (np.abs(counts / 500 - 1 / N_MODELS) < 0.1).all()
    kept = np.mean([one == other for one, other in pairwise(members)])
    assert abs(kept - 1 / N_MODELS) < 0.1


@pytest.mark.parametrize("probabilistic", [False, True])
def test_a_later_fit_changes_nothing(probabilistic):
    ensemble = fitted_ensemble(probabilistic=probabilistic)
    env, untouched = (ModelVecEnv(ensemble, starts(), distance_reward, n_envs=4, horizon=5, seed=0) for _ in range(2))
    actions = random_actions(env, 10)
    expected = play(untouched, actions)
    fit(ensemble, seed=9)
    with th.no_grad():
        for tensor in (*ensemble.parameters(), *ensemble.buffers()):
            tensor.add_(1)
    assert_same_episodes(play(env, actions), expected)


def test_imagined_observations_stay_near_the_data():
    ensemble = fitted_ensemble()
    low = (ensemble.observation_low - 0.1 * ensemble.observation_std).numpy()
    high = (ensemble.observation_high + 0.1 * ensemble.observation_std).numpy()
    with th.no_grad():
        ensemble.biases[-1].fill_(5)
    env = ModelVecEnv(ensemble, starts(), distance_reward, n_envs=4)
    _, steps = play(env, random_actions(env, 10))
    assert all(((low <= obs) & (obs <= high)).all() for obs, *_ in steps)
    np.testing.assert_array_equal(steps[-1][0], np.tile(high, (4, 1)))


def test_from_a_saved_file(tmp_path):
    ensemble = fitted_ensemble(learned_reward=True, probabilistic=True)
    ensemble.save(tmp_path / "ensemble")
    envs = [
        ModelVecEnv(e, starts(), n_envs=4, horizon=5, seed=0) for e in (ensemble, DynamicsEnsemble.load(tmp_path / "ensemble"))
    ]
    assert_same_episodes(*(play(env, random_actions(envs[0], 12)) for env in envs))
