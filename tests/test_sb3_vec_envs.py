"""SB3's vectorised environments and their wrappers."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    sync_envs_normalization,
)
from tiny import Drift, assert_same, parameters, push, tiny_model, vec_drift

from sb3_mbmpo import MBMPO
from sb3_mbmpo.real.returns import DiscountedReturns

fork = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # other methods are slow


@fork
@pytest.mark.parametrize("n_envs", [1, 3])
def test_subprocesses_learn_what_one_process_learns(n_envs):
    models = []
    for vec_env in (vec_drift(n_envs, monitor=False), SubprocVecEnv([Drift] * n_envs, start_method="fork")):
        # The function is passed: that of an environment in another process cannot be found
        model = tiny_model(VecMonitor(vec_env), reward_fn=Drift.reward, termination_fn=Drift.done).learn(60)
        models.append(model)
        vec_env.close()
    assert_same(*map(parameters, models))
    assert len(models[1].ep_info_buffer) > 0


@fork
def test_subprocesses_without_functions_learn_reward_and_termination():
    env = SubprocVecEnv([Drift] * 2, start_method="fork")
    model = tiny_model(env).learn(40)
    env.close()
    assert model.dynamics.learned_reward
    assert model.dynamics.learned_termination


def test_stacked_frames():
    model = tiny_model(
        VecFrameStack(vec_drift(2), 3), reward_fn="learned", termination_fn=lambda n: n[:, -2:].abs().amax(1) > 2
    )
    model.learn(60)
    buffer = model.replay_buffer
    assert buffer.obs_shape == (6,)
    rows = buffer.observations[: buffer.size()], buffer.next_observations[: buffer.size()]
    np.testing.assert_array_equal(rows[0][..., 2:], rows[1][..., :-2])
    assert model.predict(model.env.reset())[0].shape == (2, 2)


def test_nan_checker_and_monitor_change_nothing():
    plain, wrapped = (
        tiny_model(vec_drift()),
        tiny_model(VecCheckNan(VecMonitor(vec_drift(monitor=False)), raise_exception=True)),
    )
    assert_same(parameters(plain.learn(40)), parameters(wrapped.learn(40)))


# ---------------------------------------------------------------- VecNormalize


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("norm_reward", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_buffer_is_in_raw_units_whatever_vecnormalize_does(n_envs, norm_reward, training):
    env = VecNormalize(vec_drift(n_envs), norm_reward=norm_reward, training=training)
    model = tiny_model(env).learn(80)
    buffer = model.replay_buffer
    columns = (buffer.observations, buffer.actions, buffer.next_observations, buffer.rewards, buffer.dones)
    n_terminal = 0
    for obs, action, next_obs, reward, done in zip(*(c[: buffer.size()].reshape(80, -1) for c in columns), strict=True):
        # The last observation of an episode is recovered from the normalised one, with rounding
        np.testing.assert_allclose(next_obs, push(obs, action), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(reward, -np.square(push(obs, action)).sum(), rtol=1e-4, atol=1e-5)
        n_terminal += int(done[0])
    assert n_terminal >= 80 // 8
    starts = model._initial_obs
    assert np.abs(starts).max() <= 1, "raw first observations"
    assert len(starts) >= n_terminal


def test_policy_sees_the_same_units_really_and_in_the_imagination():
    """The network sees observations standardised by the statistics of the real data, however VecNormalize scales them."""
    env = VecNormalize(vec_drift(2))
    model = tiny_model(env).learn(60)
    raw = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    shown = env.normalize_obs(raw)
    np.testing.assert_allclose(model._to_policy_units(th.as_tensor(raw)), shown, rtol=1e-5, atol=1e-6)
    data = model._to_policy_units(model._transitions().obs)
    seen = model.policy.standardize(data)
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(seen.std(0, correction=0), 1, atol=1e-4)


def test_dynamics_do_not_depend_on_vecnormalize():
    """The first fit uses the same random steps in both cases, so its targets must be the same."""
    plain, normalized = (tiny_model(env, n_meta_steps=0) for env in (vec_drift(), VecNormalize(vec_drift())))
    for model in (plain, normalized):
        model.learn(20)
    for name in ("observation_mean", "observation_std", "action_mean", "action_std", "target_mean", "target_std"):
        np.testing.assert_allclose(getattr(plain.dynamics, name), getattr(normalized.dynamics, name), rtol=1e-4, atol=1e-5)


def test_saved_beside_the_model_and_loaded(tmp_path):
    env = VecNormalize(vec_drift(2))
    model = tiny_model(env).learn(60)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics"))
    loaded_env = VecNormalize.load(str(tmp_path / "statistics"), vec_drift(2))
    loaded = MBMPO.load(tmp_path / "model", env=loaded_env)
    assert loaded.get_vec_normalize_env() is loaded_env
    raw = np.ones((2, 2), np.float32)
    actions = [each.predict(e.normalize_obs(raw), deterministic=True)[0] for each, e in ((model, env), (loaded, loaded_env))]
    np.testing.assert_array_equal(*actions)
    count = loaded_env.obs_rms.count
    loaded.replay_buffer = model.replay_buffer
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded_env.obs_rms.count > count


def test_set_env_brings_its_own_statistics():
    model = tiny_model(VecNormalize(vec_drift())).learn(20)
    other = VecNormalize(vec_drift(length=5))
    model.set_env(other)
    assert model.get_vec_normalize_env() is other
    model.learn(20, reset_num_timesteps=False)
    model.set_env(vec_drift())
    assert model.get_vec_normalize_env() is None
    model.learn(20, reset_num_timesteps=False)


def test_adapting_leaves_the_statistics_alone():
    env = VecNormalize(vec_drift())
    model = tiny_model(env).learn(20)
    mean, count = env.obs_rms.mean.copy(), env.obs_rms.count
    adapted = model.adapt(n_episodes=2)
    assert env.obs_rms.count == count
    np.testing.assert_array_equal(env.obs_rms.mean, mean)
    assert env.training
    evaluation = VecNormalize(vec_drift(), training=False)
    sync_envs_normalization(env, evaluation)
    assert np.isfinite(evaluate_policy(adapted, evaluation, n_eval_episodes=1)[0])
    model.adapt(evaluation, n_episodes=1)
    with pytest.raises(ValueError, match="wrap `env` in VecNormalize too"):
        model.adapt(Drift())


@pytest.mark.parametrize(
    ("where", "value"),
    # An infinite terminal observation is lost: VecNormalize replaces it by the clipped one
    [((9, "obs"), np.nan), ((9, "obs"), np.inf), ((9, "reward"), -np.inf), ((8, "obs"), np.nan), (("reset", "obs"), np.inf)],
)
def test_numbers_that_are_not_finite_do_not_hide_behind_the_clipping(where, value):
    model = tiny_model(VecNormalize(vec_drift(random_start=False, bad={where: value})))
    with pytest.raises(ValueError, match="NaN or infinite"), np.errstate(invalid="ignore"):
        model.learn(20)
    buffer = model.replay_buffer
    assert np.isfinite(buffer.next_observations[: buffer.size()]).all()


def test_where_episodes_end_is_valued_in_raw_units(monkeypatch):
    seen, step = [], DiscountedReturns.step

    def noted(self, obs, reward, next_obs, *ends):
        seen.append(next_obs.copy())
        step(self, obs, reward, next_obs, *ends)

    monkeypatch.setattr(DiscountedReturns, "step", noted)
    model = tiny_model(VecNormalize(vec_drift(2))).learn(40)
    buffer = model.replay_buffer
    assert buffer.dones[: buffer.size()].any()
    np.testing.assert_allclose(np.stack(seen), buffer.next_observations[: buffer.size()], rtol=0, atol=1e-5)


def test_a_wrapper_round_vecnormalize_that_changes_the_observations_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\).*into \(6,\): wrap the environment in VecNormalize last"):
        tiny_model(VecFrameStack(VecNormalize(vec_drift()), 3))
    inside = VecNormalize(VecFrameStack(vec_drift(monitor=False), 3))
    tiny_model(VecMonitor(inside), reward_fn="learned", termination_fn=None).learn(20)
