"""What a member is trained to minimise, by hand."""

import math

import pytest
import torch as th

from sb3_mbmpo.dynamics.losses import member_losses
from sb3_mbmpo.dynamics.networks import softly_bounded

MEAN = th.tensor([[[0.0, 1.0], [2.0, 0.0]]], dtype=th.float64)  # one member, two rows, two targets
TARGETS = th.tensor([[[1.0, 1.0], [0.0, 3.0]]], dtype=th.float64)
ENDED = th.tensor([[0.0, 1.0]], dtype=th.float64)
WIDE = (th.full((1, 1, 2), -50.0, dtype=th.float64), th.full((1, 1, 2), 50.0, dtype=th.float64))


@pytest.mark.parametrize(
    ("observation_dim", "expected"),
    [(2, (1 + 0 + 4 + 9) / 4), (1, (1 + 4) / 2 + (0 + 9) / 2)],
    ids=["averaged over rows and dimensions", "the reward counts as much as all of the observation"],
)
def test_squared_errors(observation_dim, expected):
    assert float(member_losses((MEAN, None, None), TARGETS, ENDED, observation_dim)) == pytest.approx(expected)


def test_a_learned_termination_adds_its_cross_entropy():
    logit = th.tensor([[math.log(3.0), math.log(3.0)]], dtype=th.float64)  # probability 3/4
    entropy = -(math.log(1 / 4) + math.log(3 / 4)) / 2
    assert float(member_losses((MEAN, None, logit), TARGETS, ENDED, 2)) == pytest.approx(14 / 4 + entropy)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_likelihood_is_weighted_by_the_variance(beta):
    log_var = th.tensor([[[0.0, math.log(4.0)], [math.log(0.25), 0.0]]], dtype=th.float64)
    expected = (1 / 1 + 0) * 1 + (0 / 4 + math.log(4)) * 4**beta + (4 / 0.25 + math.log(0.25)) * 0.25**beta + (9 / 1 + 0) * 1
    bounds_cost = 0.01 * 2 * 100
    loss = member_losses((MEAN, log_var, None), TARGETS, ENDED, 2, log_var_bounds=WIDE, beta=beta)
    assert float(loss) == pytest.approx(expected / 4 + bounds_cost)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradients_of_the_weighted_likelihood(beta):
    """The weight is no path of the gradient: with 1, means get the gradient of half a squared error twice over."""
    mean, log_var = MEAN.clone().requires_grad_(), th.full((1, 2, 2), math.log(4.0), dtype=th.float64, requires_grad=True)
    loss = member_losses((mean, log_var, None), TARGETS, ENDED, 2, log_var_bounds=WIDE, beta=beta)
    of_mean, of_log_var = th.autograd.grad(loss.sum(), (mean, log_var))
    error = MEAN - TARGETS
    th.testing.assert_close(of_mean, 4**beta * 2 * error / 4 / 4)
    th.testing.assert_close(of_log_var, 4**beta * (1 - error.square() / 4) / 4)


def test_log_variances_are_bounded_softly():
    log_var = th.full((1, 2, 2), 3.0, dtype=th.float64)
    lower, upper = th.full((1, 1, 2), -1.0, dtype=th.float64), th.full((1, 1, 2), 0.5, dtype=th.float64)
    bounded = softly_bounded(log_var, lower, upper)
    loss = member_losses((MEAN, log_var, None), TARGETS, ENDED, 2, log_var_bounds=(lower, upper))
    expected = ((MEAN - TARGETS).square() * th.exp(-bounded) + bounded).mean() + 0.01 * 2 * 1.5
    assert float(loss) == pytest.approx(float(expected))
