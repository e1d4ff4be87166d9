"""The logged error of rewards: of a function on all real steps, of learned rewards on steps that a member did not train on."""

import numpy as np
import pytest
import torch as th
from linear_system import TRAIN, make, seeded
from tiny import Drift, Unknown, tiny_model

from sb3_mbmpo.common.streams import spawned
from sb3_mbmpo.dynamics.training import split_rows

KEY = "dynamics/reward_error"


def by_hand(dynamics, data, generator, validation_fraction=0.2):
    """Return each member's mean absolute error on its validation rows, row by row through the imagined step."""
    M = dynamics.n_models
    _, rows = split_rows(len(data.obs), validation_fraction, spawned(generator, M))
    step = dynamics.step_fn()
    errors = []
    for member in range(M):
        one = type(data)(*(column[rows[member]] for column in data))
        action = dynamics.codec.to_dynamics(one.action)
        rewards = step(one.obs.expand(M, -1, -1), action.expand(M, -1, -1)).reward[member]
        errors.append([abs(float(a) - float(b)) for a, b in zip(rewards, one.reward, strict=True)])
    return np.mean(errors, axis=1)


@pytest.mark.parametrize("kwargs", [{}, {"probabilistic": True}, {"weight_norm": True}], ids=str)
def test_a_fit_reports_the_error_of_learned_rewards_on_each_members_validation_rows(kwargs):
    ensemble = make(learned_reward=True, learned_termination=True, **kwargs)
    report = ensemble.fit(TRAIN, max_epochs=2, generator=seeded())
    expected = by_hand(ensemble, TRAIN, seeded())
    np.testing.assert_allclose(report.val_error, expected, rtol=1e-4)
    # In units of the reward, and the members differ
    assert len(set(expected.round(6))) > 1
    assert (expected < 2 * float(TRAIN.reward.std())).all()


def test_the_error_is_in_units_of_the_reward():
    larger = TRAIN._replace(reward=1_000 * TRAIN.reward)
    small, large = (make(learned_reward=True).fit(data, max_epochs=2, generator=seeded()) for data in (TRAIN, larger))
    np.testing.assert_allclose(large.val_error, 1_000 * small.val_error, rtol=1e-3)


def test_without_learned_rewards_a_fit_has_no_error_to_report():
    assert np.isnan(make().fit(TRAIN, max_epochs=1, generator=seeded()).val_error).all()


def test_a_learned_reward_that_cannot_be_wrong_has_no_error():
    constant = TRAIN._replace(reward=th.full_like(TRAIN.reward, 3.5))
    assert (make(learned_reward=True).fit(constant, max_epochs=1, generator=seeded()).val_error == 0).all()


def test_an_iteration_logs_the_error_of_learned_rewards():
    model = tiny_model(Unknown())
    model.learn(20)
    before = th.Generator().manual_seed(0)
    before.set_state(model._generators["dynamics"].get_state())
    data_seen = {}
    fit = model.dynamics.fit

    def watched(data, **kwargs):
        data_seen["data"] = data
        return fit(data, **kwargs)

    model.dynamics.fit = watched
    model.learn(20, reset_num_timesteps=False)
    expected = by_hand(model.dynamics, data_seen["data"], before).mean()
    assert len(data_seen["data"].obs) == 40
    assert model.logger.name_to_value[KEY] == pytest.approx(expected, rel=1e-4)


def test_a_function_has_the_logged_error_even_if_a_reward_was_learned_before(tmp_path):
    learned = tiny_model(Unknown()).learn(20)
    learned.save(tmp_path / "model")
    off = lambda obs, action, next_obs: Drift.reward(obs, action, next_obs) + 0.1  # noqa: E731 - wrong by 0.1 everywhere
    model = type(learned).load(tmp_path / "model", env=Unknown(), reward_fn=off)
    model.learn(20)
    assert model.dynamics.learned_reward
    assert model.logger.name_to_value[KEY] == pytest.approx(0.1, rel=1e-4)
