"""The members' disagreement as a function of tensors, and the penalty that training subtracts from imagined rewards."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from tiny import Drift, Unknown, assert_same, parameters, tiny_model

from sb3_mbmpo import DynamicsEnsemble
from sb3_mbmpo.dynamics import DisagreementPenalty
from sb3_mbmpo.dynamics.disagreement import MAX_EXCESS, ROWS_AT_A_TIME, relative_spread
from sb3_mbmpo.meta.advantages import estimate_advantages

OBS_SPACE, ACT_SPACE = spaces.Box(-10, 10, (3,)), spaces.Box(-1, 1, (2,))


def test_relative_spread_by_hand():
    # Members at 1 and 3: standard deviation 1; the units are 0.5, 2 and 0 (never changes)
    next_obs = th.tensor([[[1.0, 1.0, 7.0]], [[3.0, 3.0, 7.0]]])
    th.testing.assert_close(relative_spread(next_obs, th.tensor([0.5, 2.0, 0.0])), th.tensor([(2 + 0.5 + 0) / 3]))


@pytest.mark.parametrize("n_rows", [1, ROWS_AT_A_TIME + 1])
def test_the_function_of_tensors_is_the_disagreement(n_rows):
    ensemble = DynamicsEnsemble(OBS_SPACE, ACT_SPACE, n_models=3, net_arch=(8,), seed=0, precision="float32")
    ensemble.target_std.copy_(th.tensor([0.5, 1.0, 2.0]))
    obs, action = th.randn(n_rows, 3), th.rand(n_rows, 2)
    np.testing.assert_allclose(
        ensemble.disagreement_fn()(obs, action), ensemble.disagreement(obs.numpy(), action.numpy()), rtol=1e-4
    )


def test_the_penalty_begins_at_the_typical_disagreement_and_is_bounded():
    penalty = DisagreementPenalty(lambda obs, action: obs[:, 0], typical=0.2, weight=3.0)
    disagreement = th.tensor([0.0, 0.2, 0.3, 0.4, 100.0, np.inf, np.nan])  # the last two of members that overflow
    expected = th.tensor([0.0, 0.0, 1.5, 3.0, *[3.0 * MAX_EXCESS] * 3])
    th.testing.assert_close(penalty(disagreement.unsqueeze(1), disagreement.unsqueeze(1)), expected)


def trained(env=None, **kwargs):
    return tiny_model(Drift(length=50) if env is None else env, disagreement_penalty=0.7, **kwargs).learn(60)


def test_the_units_are_those_of_the_real_steps():
    model = trained()
    data = model._transitions()
    disagreement = model.dynamics.disagreement(data.obs.numpy(), data.action.numpy())
    penalty = model._penalty()
    # The median of an even number of rows is the lower middle one
    assert penalty.typical == pytest.approx(np.sort(disagreement)[(len(disagreement) - 1) // 2], rel=1e-3)
    assert penalty.weight == pytest.approx(0.7 * np.std(data.reward.numpy().astype(float)))


def imagined(model):
    """Imagine with the meta-policy, with the same random numbers at every call."""
    generators = {name: generator.clone_state() for name, generator in model._generators.items()}
    trainer = model._meta_trainer(generators, n_threads=1)
    return trainer.imagined(model.policy.actor_vector().expand(model.n_tasks, -1))


@pytest.mark.parametrize("env_class", [Drift, Unknown])
def test_imagined_steps_carry_their_penalties(env_class):
    model = trained(env_class(length=50), n_imagined_rollouts=5)
    rollouts = imagined(model)
    penalty, codec, policy = model._penalty(), model._codec, model.policy
    obs = policy.observation_mean + policy.observation_std * rollouts.policy_input
    expected = penalty(obs.flatten(0, 2), codec.to_dynamics(codec.to_env(rollouts.actions.flatten(0, 2))))
    assert (expected > 0).any()
    th.testing.assert_close(rollouts.penalties, expected.view_as(rollouts.alive) * rollouts.alive, rtol=1e-2, atol=1e-4)
    # Rewards, which the log compares with real ones, are without them
    model.disagreement_penalty = 0.0
    unpenalised = imagined(model)
    assert not unpenalised.penalties.any()
    assert_same(rollouts._replace(penalties=unpenalised.penalties)._asdict(), unpenalised._asdict())


@pytest.mark.parametrize("baseline", ["critic", "linear", "zero"])
def test_penalties_count_like_rewards(baseline):
    draw = th.Generator().manual_seed(0)
    model = trained()
    rollouts = imagined(model)
    penalties = th.rand(rollouts.rewards.shape, generator=draw) * rollouts.alive
    none = th.zeros_like(penalties)
    penalised = rollouts._replace(penalties=penalties)
    poorer = rollouts._replace(rewards=rollouts.rewards - penalties, penalties=none)
    kwargs = dict(gamma=0.9, gae_lambda=0.8, baseline=baseline, normalize=False, critic=lambda x: x[..., 0])
    assert_same(estimate_advantages(penalised, **kwargs)._asdict(), estimate_advantages(poorer, **kwargs)._asdict())
    assert not th.equal(
        estimate_advantages(penalised, **kwargs).advantages,
        estimate_advantages(rollouts._replace(penalties=none), **kwargs).advantages,
    )


class ConstantReward(Drift):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1.0, *rest

    @staticmethod
    def reward(obs, action, next_obs):
        return th.ones(len(obs))


def test_there_is_no_penalty_without_a_unit():
    assert trained(ConstantReward())._penalty() is None
    assert trained(n_models=1)._penalty() is None  # it agrees with itself
    assert tiny_model(Drift(), disagreement_penalty=0.0).learn(40)._penalty() is None


def test_a_resumed_run_has_the_same_penalties(tmp_path):
    model = trained()
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    assert (loaded._penalty().typical, loaded._penalty().weight) == (model._penalty().typical, model._penalty().weight)


def test_the_penalty_changes_what_is_learned():
    one, other = trained(), tiny_model(Drift(length=50), disagreement_penalty=0.0).learn(60)
    assert any(not th.equal(a, b) for a, b in zip(parameters(one).values(), parameters(other).values(), strict=True))
