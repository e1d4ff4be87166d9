"""`adapt`: few-shot learning from real episodes or from a learned model, which leaves the model as it was."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from tiny import ACTION_SPACES, Drift, assert_same, parameters, tiny_model, vec_drift

from sb3_mbmpo import MlpPolicy


@pytest.mark.parametrize("how", [dict(env=Drift(), n_episodes=3), dict(model_index=1)], ids=["env", "model"])
@pytest.mark.parametrize("action_space", [ACTION_SPACES["box"], ACTION_SPACES["multi_discrete"]])
@pytest.mark.parametrize("options", [{}, dict(learn_inner_lr=True, n_inner_steps=2)], ids=["one-step", "two-steps"])
def test_adapt_returns_a_policy_and_leaves_the_model_alone(how, action_space, options, tmp_path):
    if "env" in how:
        how = {**how, "env": Drift(action_space)}
    model, untouched = (tiny_model(Drift(action_space), **options).learn(40) for _ in range(2))
    before = parameters(model)
    policy = model.adapt(**how)
    assert not th.equal(policy.actor_vector(), model.policy.actor_vector())
    np.testing.assert_array_equal(policy.actor_vector(), model.adapt(**how).actor_vector()) if "model_index" in how else None
    assert_same(before, parameters(model))
    for both in (model, untouched):
        both.learn(20, reset_num_timesteps=False)
    assert_same(parameters(model), parameters(untouched))

    mean_reward, _ = evaluate_policy(policy, vec_drift(action_space=action_space), n_eval_episodes=2)
    assert np.isfinite(mean_reward)
    policy.save(tmp_path / "policy")
    loaded = MlpPolicy.load(tmp_path / "policy")
    obs = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    np.testing.assert_array_equal(*(p.predict(obs, deterministic=True)[0] for p in (policy, loaded)))


def test_adapt_to_each_model_differs_and_a_step_size_of_zero_does_nothing():
    model = tiny_model().learn(20)
    assert not th.equal(model.adapt(model_index=0).actor_vector(), model.adapt(model_index=1).actor_vector())
    still = tiny_model(inner_lr=0.0).learn(20)
    for how in (dict(model_index=0), dict(n_episodes=2)):
        assert th.equal(still.adapt(**how).actor_vector(), still.policy.actor_vector())


@pytest.mark.parametrize("how", [dict(n_episodes=4), dict(model_index=1)], ids=["env", "model"])
@pytest.mark.parametrize("learned", [False, True])
def test_adapt_takes_the_step_size_and_the_steps_it_is_given(how, learned):
    # Every reset of this environment is the same, so that adaptations differ only in their arguments
    env = vec_drift(random_start=False)
    model = tiny_model(env, learn_inner_lr=learned).learn(20)
    trained = model._meta_parameters()

    def step(**kwargs):
        model._adopt(trained)
        return model.adapt(**how, **kwargs).actor_vector() - model.policy.actor_vector()

    th.testing.assert_close(step(inner_lr=0.02), 2 * step(inner_lr=0.01), rtol=1e-4, atol=1e-6)
    assert step(inner_lr=0.0).abs().max() == 0
    if not learned:
        assert th.equal(step(inner_lr=model.inner_lr, n_inner_steps=1), step())
        assert th.equal(step(n_inner_steps=2), tiny_step_twice(model, how))
    assert not th.equal(step(inner_lr=0.1, n_inner_steps=2), step(inner_lr=0.1))
    assert th.equal(step(baseline="critic"), step())
    assert not th.equal(step(baseline="linear"), step())
    assert not th.equal(step(baseline="zero"), step())


def tiny_step_twice(model, how):
    """Return the change of the parameters in an adaptation with two inner steps."""
    model.n_inner_steps = 2
    try:
        return model.adapt(**how).actor_vector() - model.policy.actor_vector()
    finally:
        model.n_inner_steps = 1


@pytest.mark.parametrize(("n_envs", "n_episodes", "n_inner_steps"), [(1, 3, 1), (2, 5, 2), (3, 2, 1)])
def test_adapt_does_the_episodes_it_was_asked_for(n_envs, n_episodes, n_inner_steps):
    model = tiny_model(n_inner_steps=n_inner_steps).learn(20)
    finished = []

    class Counting(Drift):
        def step(self, action):
            result = super().step(action)
            finished.append(result[2] or result[3])
            return result

    model.adapt(vec_drift(n_envs, Counting), n_episodes=n_episodes)
    # Environments that have finished their episodes continue while the others finish theirs
    assert n_episodes <= sum(finished) <= n_episodes + n_envs * n_inner_steps


def test_adapt_on_the_training_environment_begins_a_new_episode_afterwards():
    model = tiny_model().learn(25)
    env = model.env.envs[0].unwrapped
    model.adapt(n_episodes=1)
    resets = env.n_resets
    model.learn(1, reset_num_timesteps=False)
    assert env.n_resets == resets + 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(env=Drift(), model_index=0), "not to both"),
        (dict(model_index=2), "`model_index`.*at most 1"),
        (dict(model_index=-1), "`model_index`"),
        (dict(n_episodes=0), "`n_episodes`.*at least 1"),
        (dict(n_episodes=2, n_inner_steps=3), "`n_episodes`.*at least 3"),
        (dict(n_inner_steps=0), "`n_inner_steps`.*at least 1"),
        (dict(inner_lr=-0.1), "`inner_lr`.*at least 0"),
        (dict(baseline="square"), "`baseline` must be one of"),
        (dict(env=Drift(size=3)), "Observation spaces do not match"),
        (dict(env=Drift(spaces.Discrete(2))), "Action spaces do not match"),
    ],
)
def test_adapt_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        tiny_model().adapt(**arguments)
