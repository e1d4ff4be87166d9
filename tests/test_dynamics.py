import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from gymnasium import spaces

from sb3_mbmpo.dynamics import DynamicsEnsemble, Transitions

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACT = spaces.Box(-1, 1, (2,), np.float32)
# Every part that an ensemble may have
EVERYTHING = {"weight_norm": True, "probabilistic": True, "learned_reward": True, "learned_termination": True}


def seeded(seed=0):
    return th.Generator().manual_seed(seed)


def make(observation_space=OBS, action_space=ACT, **kwargs):
    return DynamicsEnsemble(observation_space, action_space, **{"n_models": 2, "net_arch": (32,), "seed": 0} | kwargs)


def fit(ensemble, data, **kwargs):
    options = {"max_epochs": 3, "batch_size": 50, "generator": seeded()}
    return ensemble.fit(data, **options | kwargs)


def parameters_of(ensemble):
    return {name: value.detach().clone() for name, value in ensemble.named_parameters()}


# next_obs = obs + DRIFT obs + PUSH action + noise; the reward is linear, too, and an episode ends beyond a threshold
DRIFT = th.tensor([[-0.1, 0.2, 0.0], [0.0, -0.1, 0.1], [-0.2, 0.0, -0.1]])
PUSH = th.tensor([[0.5, 0.0], [0.0, -0.3], [0.2, 0.2]])
NOISE = th.tensor([0.1, 0.02, 0.3])
REWARD_OF_OBS, REWARD_OF_ACTION = th.tensor([1.0, -2.0, 0.0]), th.tensor([0.5, 3.0])


def linear_system(n_rows, seed, offset=0.0, scale=1.0, noisy=False):
    """
    Return transitions of a linear system.

    :param offset: mean of the observations, in units of their spread
    :param scale: spread of the observations
    """
    generator = seeded(seed)
    x = th.randn(n_rows, 3, generator=generator)
    action = th.rand(n_rows, 2, generator=generator) * 2 - 1
    noise = NOISE * th.randn(n_rows, 3, generator=generator) if noisy else 0
    next_x = x + x @ DRIFT.T + action @ PUSH.T + noise
    reward = x @ REWARD_OF_OBS + action @ REWARD_OF_ACTION + 5
    return Transitions(scale * (x + offset), action, scale * (next_x + offset), reward, next_x[:, 0] > 0.5)


def steps(ensemble, data, **kwargs):
    """Return every member's predictions for the same transitions."""
    action = ensemble.codec.to_dynamics(data.action)
    return ensemble.step_fn(**kwargs)(*(x.expand(ensemble.n_models, -1, -1) for x in (data.obs, action)))


def relative_error(predicted, truth, trivial):
    """Return each member's root mean square error, relative to that of a trivial prediction."""
    error = (predicted - truth).square().flatten(1).mean(1).sqrt()
    return error / (trivial - truth).square().mean().sqrt()


# -- Learning -------------------------------------------------------------------------------------------------------------

TRAIN, HELD_OUT = linear_system(1500, seed=0), linear_system(300, seed=1)


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


# -- The step -------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {"relu": F.relu, "swish": F.silu, "silu": F.silu, "tanh": th.tanh, "elu": F.elu, "gelu": F.gelu}


def unfolded(ensemble, obs, action):
    """Evaluate the network as in the formulas, in float64: output (M, B, D), means and standard deviations in raw units."""
    inputs = [
        (obs - ensemble.observation_mean) / ensemble.observation_std,
        (action - ensemble.action_mean) / ensemble.action_std,
    ]
    x = th.cat(inputs, dim=1).expand(ensemble.n_models, -1, -1)
    for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
        weight = weight.double()
        if ensemble.weight_norm:
            weight = F.normalize(weight, dim=1) * ensemble.gains[i]
        x = (ACTIVATIONS[ensemble.activation_fn](x) if i else x) @ weight + bias
    sizes = [ensemble.target_dim] * (1 + ensemble.probabilistic) + [1] * ensemble.learned_termination
    mean, *rest = x.detach().split(sizes, dim=-1)
    return mean * ensemble.target_std + ensemble.target_mean, *rest


@pytest.mark.parametrize("kwargs", [{}, EVERYTHING], ids=["plain", "everything"])
def test_low_precision_is_nearly_as_good(kwargs):
    losses = {}
    for precision in ("float32", "bfloat16"):
        ensemble = make(precision=precision, learning_rate=1e-2, **kwargs)
        losses[precision] = fit(ensemble, TRAIN, max_epochs=20).val_loss
        assert {parameter.dtype for parameter in ensemble.parameters()} == {th.float32}  # the master weights
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.3)
    # Imagined steps are in low precision, predictions for the user are not
    low, high = steps(ensemble, TRAIN), ensemble.predict(TRAIN.obs.numpy(), TRAIN.action.numpy())
    assert low.next_obs.dtype == th.float32
    error = (low.next_obs.numpy() - high) / ensemble.target_std[:3].numpy()
    assert 1e-4 < np.abs(error).max() < 0.1


def test_auto_precision_is_low_only_where_the_hardware_is_fast(monkeypatch):
    for amx, expected in [(True, th.bfloat16), (False, th.float32)]:
        monkeypatch.setattr(th.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx})
        assert make().matmul_dtype == expected
        assert make(precision="float32").matmul_dtype == th.float32
        assert make(precision="bfloat16").matmul_dtype == th.bfloat16


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


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (1e4, 0.1)], ids=["standard", "mean 1e3, std 0.1"])
@pytest.mark.parametrize(
    "kwargs",
    [{"net_arch": ()}, {"net_arch": (16, 8), **EVERYTHING}, *({"activation_fn": name} for name in ACTIVATIONS)],
    ids=lambda kwargs: kwargs.get("activation_fn", str(kwargs.get("net_arch"))),
)
def test_the_folded_step_equals_the_formulas(kwargs, offset, scale):
    ensemble = make(**{"learned_reward": True, "learned_termination": True} | kwargs)
    data = linear_system(100, seed=0, offset=offset, scale=scale)
    fit(ensemble, data, max_epochs=1)
    prediction = steps(ensemble, data)
    target, *_, logit = unfolded(ensemble, data.obs.double(), data.action.double())
    # 1e-5 where the scale is 1; observations around 1e3 are themselves 6e-5 apart in float32 (eps 1.2e-7, relative)
    th.testing.assert_close(prediction.next_obs.double(), data.obs + target[..., :3], rtol=1.2e-7, atol=1e-5 * scale)
    th.testing.assert_close(prediction.reward.double(), target[..., 3], rtol=0, atol=1e-5)
    th.testing.assert_close(prediction.termination_logit.double(), logit[..., 0], rtol=0, atol=1e-5)


def bounded(ensemble, log_var):
    lower, upper = ensemble.min_log_var.detach(), ensemble.max_log_var.detach()
    return lower + F.softplus(upper - F.softplus(upper - log_var) - lower)


@pytest.mark.parametrize("kwargs", [{}, EVERYTHING], ids=["plain", "everything"])
def test_the_loss_is_that_of_the_formulas(kwargs):
    ensemble, data = make(n_models=4, learning_rate=0.1, **kwargs), linear_system(100, seed=0)
    if kwargs:  # bounds of the variance that differ from member to member
        ensemble.max_log_var.data.copy_(th.randn(4, 1, 4, generator=seeded()))
    report = fit(ensemble, data, max_epochs=30, validation_fraction=0, rolling_average_persistency=0.5)
    assert len(set(report.epochs)) > 1, "the test must also cover epochs in which only some members are active"
    mean, *others = unfolded(ensemble, data.obs.double(), data.action.double())
    target = th.cat([data.next_obs - data.obs, data.reward.unsqueeze(1)], dim=1)[:, : ensemble.target_dim]
    error = ((mean - target) / ensemble.target_std).square()
    if kwargs:
        log_var = bounded(ensemble, others[0])
        error = error * th.exp(-log_var) + log_var
    expected = error[..., :3].mean((1, 2))
    if kwargs:
        probability = others[1].squeeze(-1).sigmoid()
        likelihood = th.where(data.terminated, probability, 1 - probability)
        spread = (ensemble.max_log_var - ensemble.min_log_var).sum((1, 2))
        expected += error[..., 3].mean(1) - likelihood.log().mean(1) + 0.01 * spread.detach()
    np.testing.assert_allclose(report.val_loss, expected, rtol=1e-5)


def test_sampled_noise_has_the_predicted_spread():
    ensemble = make(**EVERYTHING)
    data = linear_system(100, seed=0, scale=10.0)
    fit(ensemble, data, max_epochs=1)
    mean, log_var, _ = unfolded(ensemble, data.obs.double(), data.action.double())
    log_var = bounded(ensemble, log_var)
    expected = mean + ensemble.target_std * (0.5 * log_var).exp() * th.randn(mean.shape, generator=seeded())
    prediction = steps(ensemble, data, generator=seeded())
    change = prediction.next_obs - data.obs
    sampled = th.cat([change, prediction.reward.unsqueeze(-1)], dim=-1)
    # Changes are differences of float32 numbers around 30, which are 2e-6 apart
    th.testing.assert_close(sampled.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.1, 3.0])
def test_predictions_are_clipped_to_the_widened_range_of_the_data(margin):
    data = linear_system(200, seed=0)
    data.next_obs.add_(2)  # the lowest are first observations, the highest are next ones
    ensemble = make()
    fit(ensemble, data)
    slack = margin * data.obs.std(0, correction=0)
    low, high = data.obs.amin(0) - slack, data.next_obs.amax(0) + slack
    line = data._replace(obs=th.linspace(-20, 20, 200).unsqueeze(1).expand(-1, 3))
    free, clipped = (steps(ensemble, line, clip_margin=m).next_obs for m in (None, margin))
    # Exactly the same numbers inside; the bounds result from another order of float32 operations
    th.testing.assert_close(clipped, free.clamp(low, high), rtol=1e-6, atol=1e-6)
    inside = (free > low + 1e-3) & (free < high - 1e-3)
    assert th.equal(clipped[inside], free[inside])
    assert inside.any()
    assert (free < low).any()
    assert (free > high).any()


def test_before_any_fit_the_range_is_unknown_and_nothing_is_clipped():
    ensemble = make()
    assert th.equal(steps(ensemble, HELD_OUT, clip_margin=0.1).next_obs, steps(ensemble, HELD_OUT).next_obs)


def test_a_later_fit_does_not_change_a_step():
    ensemble = make(**EVERYTHING)
    fit(ensemble, TRAIN)
    generator = seeded()
    step = ensemble.step_fn(clip_margin=0.1, generator=generator)
    inputs = [x[:20].expand(2, -1, -1) for x in (TRAIN.obs, TRAIN.action)]
    before = step(*inputs)
    fit(ensemble, linear_system(200, seed=2, offset=5, scale=3))
    generator.manual_seed(0)
    assert all(th.equal(old, new) for old, new in zip(before, step(*inputs), strict=True))


def test_a_step_of_some_members():
    ensemble = make(n_models=3, learned_reward=True, learned_termination=True)
    fit(ensemble, TRAIN, max_epochs=1)
    everyone = steps(ensemble, HELD_OUT, clip_margin=0.1)
    inputs = [x.expand(2, -1, -1) for x in (HELD_OUT.obs, HELD_OUT.action)]
    some = ensemble.step_fn(clip_margin=0.1, members=(2, 0))(*inputs)
    for ours, theirs in zip(everyone, some, strict=True):
        assert th.equal(ours[[2, 0]], theirs)


def test_a_step_needs_no_gradient():
    assert not any(x.requires_grad for x in steps(make(**EVERYTHING), HELD_OUT, generator=seeded()))


# -- Statistics of the data -----------------------------------------------------------------------------------------------


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


# -- Predictions for users ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action_space",
    [ACT, spaces.Box(-1, 1, (2, 2)), spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)],
    ids=str,
)
def test_predict_takes_what_the_environment_takes(action_space):
    ensemble = make(action_space=action_space, n_models=3)
    obs, action = np.ones((5, 3)), np.array([action_space.sample() for _ in range(5)])
    predicted = ensemble.predict(obs, action)
    assert predicted.shape == (3, 5, 3)
    assert predicted.dtype == np.float32
    assert ensemble.disagreement(obs, action).shape == (5,)
    encoded = ensemble.codec.to_dynamics(ensemble.codec.from_numpy(action, ensemble.device))
    step = ensemble.step_fn()(th.ones(3, 5, 3), encoded.expand(3, -1, -1))
    np.testing.assert_array_equal(predicted, step.next_obs)


@pytest.mark.parametrize(
    ("obs_shape", "action_shape"), [((5, 2), (5, 2)), ((3,), (2,)), ((5, 3), (4, 2)), ((5, 3), (5, 3)), ((2, 5, 3), (2, 5, 2))]
)
def test_predict_refuses_other_shapes(obs_shape, action_shape):
    with pytest.raises(ValueError, match=r"`obs` must have shape \(B, 3\)"):
        make().predict(np.ones(obs_shape), np.ones(action_shape))


def test_disagreement_by_hand():
    ensemble = make(net_arch=())
    with th.no_grad():
        ensemble.weights[0].zero_()
        ensemble.biases[0].copy_(th.tensor([[[1.0, 4.0, 0.0]], [[3.0, 4.0, 0.0]]]))
        ensemble.target_std.copy_(th.tensor([0.5, 1.0, 1.0]))
    # Predicted changes, in units of their spread, are 1 and 3 in the first dimension and equal in the others
    np.testing.assert_allclose(ensemble.disagreement(np.zeros((4, 3)), np.zeros((4, 2))), np.full(4, 1 / 3), rtol=1e-6)


def test_equal_members_agree():
    ensemble = make(n_models=4)
    with th.no_grad():
        for parameter in ensemble.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    # Not 0 to the last bit: the standard deviation of equal numbers is subject to rounding
    assert ensemble.disagreement(HELD_OUT.obs.numpy(), HELD_OUT.action.numpy()).max() < 1e-6


def test_members_disagree_most_far_from_the_data(learned):
    near, action = HELD_OUT.obs.numpy(), HELD_OUT.action.numpy()
    assert learned.disagreement(20 * near, action).mean() > 5 * learned.disagreement(near, action).mean()


# -- Weights --------------------------------------------------------------------------------------------------------------


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
