"""Predictions and losses of an ensemble, compared with the formulas in double precision; what users get of them."""

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from linear_system import ACT, EVERYTHING, HELD_OUT, TRAIN, fit, linear_system, make, seeded, steps

# ---------------------------------------------------------------- the step

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


# ---------------------------------------------------------------- predictions for users


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
