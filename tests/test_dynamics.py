"""What an ensemble learns of known systems, the statistics of its data, and its weights."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from linear_system import EVERYTHING, HELD_OUT, NOISE, TRAIN, fit, linear_system, make, seeded, steps

from sb3_mbmpo.dynamics import Transitions


def parameters_of(ensemble):
    return {name: value.detach().clone() for name, value in ensemble.named_parameters()}


def relative_error(predicted, truth, trivial):
    """Return each member's root mean square error, relative to that of a trivial prediction."""
    error = (predicted - truth).square().flatten(1).mean(1).sqrt()
    return error / (trivial - truth).square().mean().sqrt()


# ---------------------------------------------------------------- learning


@pytest.fixture(
    scope="module",
    params=[{}, {"weight_norm": True}, {"probabilistic": True}],
    ids=["plain", "weight_norm", "probabilistic"],
)
def learned(request):
    """Return an ensemble that has learned the linear system, including reward and termination."""
    ensemble = make(learned_reward=True, learned_termination=True, learning_rate=1e-2, **request.param)
    fit(ensemble, TRAIN, max_epochs=40)
    return ensemble


# A small ReLU network is not linear. Over four seeds, 40 epochs left errors of 1 to 3.5 %, where having learned nothing gives
# 100 %, and an accuracy of 97 to 100 %, where always guessing the same is 70 %.
def test_linear_dynamics_are_recovered(learned):
    error = relative_error(steps(learned, HELD_OUT).next_obs, HELD_OUT.next_obs, trivial=HELD_OUT.obs)
    assert (error < 0.1).all()


def test_a_linear_reward_is_recovered(learned):
    error = relative_error(steps(learned, HELD_OUT).reward, HELD_OUT.reward, trivial=HELD_OUT.reward.mean())
    assert (error < 0.1).all()


def test_a_termination_threshold_is_recovered(learned):
    assert 0.2 < HELD_OUT.terminated.float().mean() < 0.4, "always guessing the same must fail"
    accuracy = ((steps(learned, HELD_OUT).termination_logit > 0) == HELD_OUT.terminated).float().mean(1)
    assert (accuracy > 0.95).all()


def test_probabilistic_members_recover_the_noise():
    ensemble = make(probabilistic=True, learning_rate=1e-2, net_arch=(16,))
    fit(ensemble, linear_system(2000, seed=0, noisy=True), max_epochs=40)
    sampled = steps(ensemble, HELD_OUT, generator=seeded()).next_obs - steps(ensemble, HELD_OUT).next_obs
    # Over four seeds, 4 to 32 % more than the truth: the error of the fitted mean adds to the noise, most where there is least
    # noise, whose likelihood has the smallest weight. The noise levels to be distinguished differ by factors of 3 and 5.
    th.testing.assert_close(sampled.square().mean(1).sqrt(), NOISE.expand(2, 3), rtol=0.4, atol=0)


def test_without_a_generator_probabilistic_members_predict_their_mean():
    ensemble = make(probabilistic=True)
    fit(ensemble, linear_system(200, seed=0, noisy=True))
    one_place = linear_system(1, seed=1)
    place = Transitions(*(x.expand(4000, *x.shape[1:]) for x in one_place))
    mean, noisy = steps(ensemble, place).next_obs, steps(ensemble, place, generator=seeded()).next_obs
    assert (mean.std(1) < 1e-6).all()
    # Standard error of 4000 draws: 1.6 % of the spread
    assert ((noisy.mean(1) - mean.mean(1)).abs() < 0.08 * noisy.std(1)).all()


def test_discrete_actions():
    moves = th.tensor([-1.0, 0.0, 3.0, 100.0])
    action = th.randint(3, (300, 1), generator=seeded())  # the last choice is never taken
    obs = th.randn(300, 3, generator=seeded(1))
    data = Transitions(obs, action, obs + moves[action], th.zeros(300), th.zeros(300, dtype=th.bool))
    ensemble = make(action_space=spaces.Discrete(4), net_arch=(), learning_rate=3e-2)
    fit(ensemble, data, max_epochs=60)
    predicted = ensemble.predict(obs[:3].numpy(), np.array([0, 1, 2]))
    # The dynamics are linear in the one-hot action, and so is the network
    np.testing.assert_allclose(predicted - obs[:3].numpy(), np.broadcast_to([[-1], [0], [3]], (2, 3, 3)), atol=0.02)
    assert np.isfinite(ensemble.predict(obs[:1].numpy(), np.array([3]))).all()


def test_a_second_fit_goes_on_where_the_first_ended():
    ensemble = make()
    first, second = (fit(ensemble, TRAIN, max_epochs=2) for _ in range(2))
    assert (second.val_loss < first.val_loss).all()


@pytest.mark.parametrize("kwargs", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_share_the_members_and_change_nothing(n_threads, kwargs, monkeypatch):
    monkeypatch.setattr("sb3_mbmpo.dynamics.parallel.FLOPS_PER_THREAD", 1)
    monkeypatch.setattr("sb3_mbmpo.dynamics.parallel.MIN_FLOPS_TO_HAND_OVER", 0)
    alone, shared = (make(n_models=5, **kwargs) for _ in range(2))
    for _ in range(2):  # the second fit continues from the optimiser's state
        reports = [fit(ensemble, TRAIN, n_threads=n) for ensemble, n in [(alone, 1), (shared, n_threads)]]
        for ours, theirs in zip(*reports, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(alone.parameters(), shared.parameters(), strict=True):
        assert th.equal(ours, theirs)


def test_members_disagree_most_far_from_the_data(learned):
    near, action = HELD_OUT.obs.numpy(), HELD_OUT.action.numpy()
    assert learned.disagreement(20 * near, action).mean() > 5 * learned.disagreement(near, action).mean()


# ---------------------------------------------------------------- statistics of the data


def test_statistics_are_those_of_the_data():
    ensemble = make(learned_reward=True)
    fit(ensemble, TRAIN)
    change_and_reward = th.cat([TRAIN.next_obs - TRAIN.obs, TRAIN.reward.unsqueeze(1)], dim=1)
    for name, value in (("observation", TRAIN.obs), ("action", TRAIN.action), ("target", change_and_reward)):
        th.testing.assert_close(getattr(ensemble, f"{name}_mean"), value.mean(0))
        th.testing.assert_close(getattr(ensemble, f"{name}_std"), value.std(0, correction=0))


def test_statistics_are_computed_in_float64():
    # Around 2^14, float32 numbers are 2^-9 apart: half of these rows are there
    obs = 2.0**14 + 2.0**-9 * th.randint(3, (3001, 3), generator=seeded())
    change = th.full_like(obs, 2.0**-9)
    change[:1] = 0
    data = Transitions(obs, th.zeros(3001, 2), obs + change, th.zeros(3001), th.zeros(3001, dtype=th.bool))
    ensemble = make()
    fit(ensemble, data, max_epochs=0)
    for name, value in (("observation", data.obs), ("target", change)):
        np.testing.assert_array_equal(
            getattr(ensemble, f"{name}_mean"), value.numpy().mean(0, dtype=np.float64).astype(np.float32)
        )
        np.testing.assert_allclose(getattr(ensemble, f"{name}_std"), value.numpy().std(0, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, EVERYTHING], ids=["plain", "everything"])
def test_what_never_changes_is_predicted_exactly(kwargs):
    goal = th.where(th.arange(200) < 100, 0.3, -0.2)  # differs between episodes, but never changes
    obs, next_obs = TRAIN.obs[:200].clone(), TRAIN.next_obs[:200].clone()
    for state in (obs, next_obs):
        state[:, 0], state[:, 1] = 7.1, goal
    action = TRAIN.action[:200].clone()
    action[:, 0] = 0.5
    data = Transitions(obs, action, next_obs, th.ones(200), th.zeros(200, dtype=th.bool))
    ensemble = make(**kwargs)
    fit(ensemble, data)
    prediction = steps(ensemble, data, generator=seeded())
    assert th.equal(prediction.next_obs[..., :2], obs[:, :2].expand(2, -1, -1))
    assert prediction.next_obs.isfinite().all()
    if ensemble.learned_reward:
        assert (prediction.reward == 1).all()
    # The members agree on the first two dimensions
    spread = ensemble.predict(obs.numpy(), action.numpy()).std(0)[:, 2] / ensemble.target_std[2].item()
    np.testing.assert_allclose(ensemble.disagreement(obs.numpy(), action.numpy()), spread / 3, rtol=1e-5)


@pytest.mark.parametrize("field", ["obs", "action", "next_obs", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_is_not_finite_is_refused_and_leaves_no_trace(field, value):
    ensemble = make(learned_reward=True)
    fit(ensemble, TRAIN)
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    data = linear_system(20, seed=2, offset=3)
    getattr(data, field)[7] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit(ensemble, data)
    assert all(th.equal(value, before[name]) for name, value in ensemble.state_dict().items())


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="no transitions"):
        fit(make(), Transitions(*(x[:0] for x in TRAIN)))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("kwargs", [{}, EVERYTHING], ids=["plain", "everything"])
def test_a_state_dict_carries_weights_and_statistics(kwargs):
    original, copy = make(**kwargs), make(**kwargs, seed=1)
    fit(original, linear_system(100, seed=0, offset=3, scale=2))
    assert not th.equal(steps(original, HELD_OUT).next_obs, steps(copy, HELD_OUT).next_obs)
    copy.load_state_dict(original.state_dict())
    predictions = [steps(ensemble, HELD_OUT, clip_margin=0.1, generator=seeded()) for ensemble in (original, copy)]
    for ours, theirs in zip(*predictions, strict=True):
        assert ours is theirs is None or th.equal(ours, theirs)


def test_the_seed_decides_the_weights():
    same, again, other = (parameters_of(make(seed=seed)) for seed in (0, 0, 1))
    unseeded = [parameters_of(make(seed=None)) for _ in range(2)]
    assert all(th.equal(same[name], again[name]) for name in same)
    assert not any(th.equal(same[name], other[name]) for name in same)
    assert not any(th.equal(unseeded[0][name], unseeded[1][name]) for name in same)


def test_members_start_and_train_apart():
    ensemble = make(n_models=3)
    for _ in range(2):
        for parameter in ensemble.parameters():
            assert not any(th.equal(parameter[i], parameter[i - 1]) for i in range(3))
        fit(ensemble, TRAIN)


def test_equal_fits_give_equal_ensembles():
    first, second, other = (make(**EVERYTHING) for _ in range(3))
    for ensemble, seed in ((first, 0), (second, 0), (other, 1)):
        fit(ensemble, TRAIN, generator=seeded(seed))
    ours, same, different = map(parameters_of, (first, second, other))
    assert all(th.equal(ours[name], same[name]) for name in ours)
    assert not any(th.equal(ours[name], different[name]) for name in ours)


def test_a_fit_moves_every_parameter_of_every_member():
    ensemble = make(n_models=3, **EVERYTHING)
    before = parameters_of(ensemble)
    fit(ensemble, TRAIN, max_epochs=1)
    for name, parameter in ensemble.named_parameters():
        assert (parameter != before[name]).flatten(1).any(1).all(), name


def test_reset_parameters_starts_anew():
    ensemble = make(**EVERYTHING, learning_rate=0.1, weight_decay=0.2)
    before = parameters_of(ensemble)
    fit(ensemble, TRAIN, max_epochs=1)
    ensemble.reset_parameters(seeded(1))
    for name, parameter in ensemble.named_parameters():
        # The bounds of the variance have fixed initial values; everything else is drawn
        assert th.equal(parameter, before[name]) == name.endswith("log_var")
    (group,) = ensemble.optimizer.param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in ensemble.parameters()}
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.2)
    assert not ensemble.optimizer.state
    ensemble.reset_parameters(seeded(0))
    assert all(th.equal(parameter, before[name]) for name, parameter in ensemble.named_parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_models": 0}, "`n_models` must be at least 1, not 0"),
        ({"net_arch": (32, 0)}, "`net_arch` .*positive"),
        ({"net_arch": [-1]}, "`net_arch` .*positive"),
        ({"activation_fn": "sigmoid"}, "`activation_fn` .*'relu'.*not 'sigmoid'"),
        ({"observation_space": spaces.Discrete(3)}, "FlattenObservation"),
        ({"action_space": spaces.Discrete(3, start=1)}, "ActionWrapper"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
