"""Advantages compared with hand-computed numbers and with an explicit ridge regression."""

import numpy as np
import pytest
import torch as th

from sb3_mbmpo.imagination.rollouts import ImaginedRollouts
from sb3_mbmpo.meta.advantages import (
    BASELINES,
    RIDGE,
    discounted_returns,
    estimate_advantages,
    fourier_baseline,
    generalized_advantages,
    linear_baseline,
    standardize,
    time_baseline,
)

GAMMA = 0.5
# One task, two rollouts: the first terminates with its third step, the second reaches the horizon.
# The steps after the termination hold garbage that must not count.
REWARDS = [[1, 2, 4, 99], [1, 2, 4, 8]]
# The last is the value after the last step
VALUES = [[10, 20, 30, 77, 88], [10, 20, 30, 40, 60]]
ALIVE = [[1, 1, 1, 0], [1, 1, 1, 1]]
TERMINATED = [[0, 0, 1, 0], [0, 0, 0, 0]]
# 4; 2 + 4 / 2; 1 + 4 / 2            8; 4 + 8 / 2; 2 + 8 / 2; 1 + 6 / 2
RETURNS = [[3, 4, 4, 0], [4, 6, 8, 8]]
# Temporal differences: 1 + 20 / 2 - 10, 2 + 30 / 2 - 20, 4 - 30 | ..., 4 + 40 / 2 - 30, 8 + 60 / 2 - 40
ADVANTAGES = {
    0.0: [[1, -3, -26, 0], [1, -3, -6, -2]],
    # from the end, with gamma lambda = 0.475: -3 - 0.475 * 26, ... | -6 - 0.475 * 2, ...
    0.95: [[-6.29125, -15.35, -26, 0], [-1.99309375, -6.30125, -6.95, -2]],
    # returns minus values; the horizon's 60 counts half at the last step, a quarter at the one before, ...
    1.0: [[-7, -16, -26, 0], [-2.25, -6.5, -7, -2]],
}


def by_rollout(rows, dtype=th.double):
    """Arrange rows, one for each rollout, as (T = 1, H, N)."""
    return th.tensor(rows, dtype=dtype).T.unsqueeze(0)


def random_rollouts(n_tasks=3, horizon=20, n_rollouts=6, observation_dim=2, dtype=th.double, seed=0):
    draw = th.Generator().manual_seed(seed)
    shape = (n_tasks, horizon, n_rollouts)
    lengths = th.randint(1, 2 * horizon, (n_tasks, 1, n_rollouts), generator=draw)
    time = th.arange(horizon).view(1, -1, 1)
    # Observations exceed the clip range of the features
    policy_input = 5 * th.randn(*shape, observation_dim, generator=draw, dtype=dtype)
    rewards = th.randn(shape, generator=draw, dtype=dtype) + policy_input[..., 0]
    final_input = 5 * th.randn(n_tasks, 1, n_rollouts, observation_dim, generator=draw, dtype=dtype)
    alive, terminated, penalties = time < lengths, time == lengths - 1, th.zeros_like(rewards)
    return ImaginedRollouts(policy_input, th.zeros(*shape, 1), rewards, alive, terminated, final_input, penalties)


def value(policy_input):
    """A critic that depends on all of the observation."""
    return policy_input.sin().sum(-1) * 3 + 1


def test_discounted_returns_by_hand():
    rewards = by_rollout(REWARDS)
    th.testing.assert_close(discounted_returns(rewards, by_rollout(ALIVE, th.bool), GAMMA), by_rollout(RETURNS))
    assert th.equal(rewards, by_rollout(REWARDS)), "the rewards are still needed"


@pytest.mark.parametrize("gae_lambda", ADVANTAGES)
def test_generalized_advantages_by_hand(gae_lambda):
    masks = dict(alive=by_rollout(ALIVE, th.bool), terminated=by_rollout(TERMINATED, th.bool))
    advantages = generalized_advantages(by_rollout(REWARDS), by_rollout(VALUES), **masks, gamma=GAMMA, gae_lambda=gae_lambda)
    th.testing.assert_close(advantages, by_rollout(ADVANTAGES[gae_lambda]))


def features(observation, step):
    """Return the baseline's features of one observation, as the description of the algorithm lists them."""
    s, t = np.clip(observation, -10, 10), step / 100
    return np.concatenate([s, s**2, [t, t**2, t**3, 1.0]])


def test_the_baseline_is_a_ridge_regression_of_each_task():
    rollouts = random_rollouts()
    assert (rollouts.policy_input.abs() > 10).any(), "nothing to clip"
    returns = discounted_returns(rollouts.rewards, rollouts.alive, 0.99)
    baseline = linear_baseline(rollouts.policy_input, returns, rollouts.alive).numpy()
    for observations, targets, alive, values in zip(rollouts.policy_input, returns, rollouts.alive, baseline, strict=True):
        where = np.argwhere(alive.numpy())  # rows of (step, rollout)
        X = np.stack([features(observations[step, rollout].numpy(), step) for step, rollout in where])
        y = targets[alive].numpy()
        weights = np.linalg.solve(X.T @ X / len(X) + RIDGE * np.eye(X.shape[1]), X.T @ y / len(X))
        np.testing.assert_allclose(values[alive.numpy()], X @ weights, rtol=1e-9)


def test_the_baseline_fits_a_function_of_its_features():
    rollouts = random_rollouts(horizon=100)
    weights = np.array([3.0, -1.0, -0.2, 0.1, 5.0, -4.0, 3.0, 7.0])
    steps = np.broadcast_to(np.arange(100)[None, :, None], rollouts.rewards.shape)
    X = np.stack([features(*row) for row in zip(rollouts.policy_input.reshape(-1, 2).numpy(), steps.ravel(), strict=True)])
    returns = th.from_numpy(X @ weights).view_as(rollouts.rewards)
    error = linear_baseline(rollouts.policy_input, returns, rollouts.alive) - returns
    # The minimiser of (mean squared error + RIDGE |w|^2) is no worse than the true weights, whose error is 0
    for task_error, alive in zip(error, rollouts.alive, strict=True):
        assert task_error[alive].square().mean() <= RIDGE * weights @ weights


def test_single_precision_suffices_for_dependent_features():
    # cos^2 + sin^2 = 1: the features of a pendulum are linearly dependent, and only the ridge makes the problem solvable
    angle = 3 * th.randn(2, 50, 40, generator=th.Generator().manual_seed(0), dtype=th.double)
    policy_input = th.stack([angle.cos(), angle.sin()], dim=-1) * 1.4
    alive = th.ones_like(angle, dtype=th.bool)
    returns = -100 * angle.square()
    single = linear_baseline(policy_input.float(), returns.float(), alive)
    # Of interest beside the spread of the returns
    error = single - linear_baseline(policy_input, returns, alive)
    assert error.abs().max() < 1e-3 * returns.std()


def test_the_fourier_baseline_knows_values_that_are_no_sum_of_squares():
    # Four quadrants: no feature of the linear baseline, nor a sum of them, has their sign
    rollouts = random_rollouts(horizon=100)
    states, alive = rollouts.policy_input, rollouts.alive
    returns = 50 + 10 * states[..., 0].clamp(-2, 2) * states[..., 1].clamp(-2, 2)
    for task in range(len(states)):
        spread = returns[task][alive[task]].std()
        linear, fourier = (
            (fit(states, returns, alive) - returns)[task][alive[task]].square().mean().sqrt() / spread
            for fit in (linear_baseline, fourier_baseline)
        )
        assert linear > 0.8
        assert fourier < 0.4


def test_the_fourier_baseline_is_that_of_each_task_and_of_living_steps():
    rollouts = random_rollouts()
    returns = discounted_returns(rollouts.rewards, rollouts.alive, 0.99)
    values = fourier_baseline(rollouts.policy_input, returns, rollouts.alive)
    alone = fourier_baseline(rollouts.policy_input[1:2], returns[1:2], rollouts.alive[1:2])
    th.testing.assert_close(values[1:2], alone)
    dead = ~rollouts.alive
    assert dead.any()
    changed = fourier_baseline(rollouts.policy_input, returns.masked_fill(dead, 1e6), rollouts.alive)
    th.testing.assert_close(changed, values)
    # Far away from 0 it is as good as there
    shifted = fourier_baseline(rollouts.policy_input, returns + 1000, rollouts.alive)
    th.testing.assert_close(shifted - 1000, values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("baseline", BASELINES)
def test_what_follows_a_termination_changes_nothing(baseline, normalize):
    rollouts = random_rollouts()
    dead = ~rollouts.alive
    assert dead.any()
    garbage = rollouts._replace(
        rewards=rollouts.rewards.masked_fill(dead, 1e4), policy_input=rollouts.policy_input.masked_fill(dead[..., None], -1e4)
    )
    options = dict(gamma=0.99, gae_lambda=0.95, baseline=baseline, normalize=normalize, critic=value)
    clean, dirty = (estimate_advantages(x, **options) for x in (rollouts, garbage))
    for ours, theirs in zip(dirty, clean, strict=True):
        th.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert (theirs[dead] == 0).all()


def test_advantages_are_standardized_for_each_task():
    rollouts = random_rollouts()
    raw = rollouts.rewards * th.tensor([1.0, 100.0, 1e-3]).view(-1, 1, 1) + 5
    for ours, task, alive in zip(standardize(raw, rollouts.alive), raw, rollouts.alive, strict=True):
        living = task[alive].numpy()
        # The 1e-8 that guards against division by zero is 1e-5 of the smallest deviation here
        np.testing.assert_allclose(ours[alive], (living - living.mean()) / living.std(), rtol=2e-5)
        assert (ours[~alive] == 0).all()


@pytest.mark.parametrize("exponent", [-120, -100, -66, -30, 30, 64, 100, 120])
def test_standardized_advantages_do_not_depend_on_the_unit(exponent):
    rollouts = random_rollouts()
    raw = (rollouts.rewards + 5) * rollouts.alive
    expected = standardize(raw, rollouts.alive)
    # For small advantages, the guard is 1e-4 of the largest
    th.testing.assert_close(standardize(raw * 2.0**exponent, rollouts.alive), expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-30, 3.0])
def test_equal_advantages_become_zero(value):
    alive = random_rollouts().alive
    assert standardize(th.full(alive.shape, value), alive).abs().max() < 0.01
    assert value != 3.0 or (standardize(th.full(alive.shape, value), alive) == 0).all()


def test_a_single_living_step_tells_nothing():
    alive = th.zeros(2, 3, 4, dtype=th.bool)
    alive[0, 0, 0] = True
    for value in (1e-30, 3.0, 1e38):
        assert (standardize(th.full(alive.shape, value), alive) == 0).all()


@pytest.mark.parametrize("gae_lambda", [0.5, 1.0])
def test_the_estimate_puts_the_parts_together(gae_lambda):
    rollouts = random_rollouts()
    returns = discounted_returns(rollouts.rewards, rollouts.alive, 0.9)
    values = linear_baseline(rollouts.policy_input, returns, rollouts.alive)
    with_end = th.cat([values, th.zeros_like(values[:, :1])], dim=1)  # the horizon is part of the task
    masks, options = dict(alive=rollouts.alive, terminated=rollouts.terminated), dict(gamma=0.9, gae_lambda=gae_lambda)
    raw = generalized_advantages(rollouts.rewards, with_end, **masks, **options)
    estimate = estimate_advantages(rollouts, **options, baseline="linear", normalize=False)
    assert th.equal(estimate.advantages, raw)
    th.testing.assert_close(estimate.values, values * rollouts.alive)
    th.testing.assert_close(estimate.returns, raw + values * rollouts.alive)
    standardized = estimate_advantages(rollouts, **options, baseline="linear", normalize=True).advantages
    assert th.equal(standardized, standardize(raw, rollouts.alive))


def test_without_a_baseline_advantages_are_discounted_returns():
    rollouts = random_rollouts()
    advantages = estimate_advantages(rollouts, gamma=0.9, gae_lambda=1.0, baseline="zero", normalize=False).advantages
    th.testing.assert_close(advantages, discounted_returns(rollouts.rewards, rollouts.alive, 0.9))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_the_critic_bootstraps_at_the_horizon_and_nowhere_after_a_termination(gae_lambda):
    rollouts, gamma = random_rollouts(), 0.9
    estimate = estimate_advantages(
        rollouts, gamma=gamma, gae_lambda=gae_lambda, baseline="critic", normalize=False, critic=value
    )
    # In plain Python, rollout by rollout, from the end: the lambda-return, whose difference from the value is the advantage
    for task, rollout in np.ndindex(rollouts.rewards.shape[0], rollouts.rewards.shape[2]):
        n_steps = int(rollouts.alive[task, :, rollout].sum())
        inputs = th.cat([rollouts.policy_input, rollouts.final_input], dim=1)[task, :, rollout]
        lambda_return = 0.0 if rollouts.terminated[task, n_steps - 1, rollout] else float(value(inputs[n_steps]))
        next_value = lambda_return
        for step in reversed(range(n_steps)):
            mixed = (1 - gae_lambda) * next_value + gae_lambda * lambda_return
            lambda_return = float(rollouts.rewards[task, step, rollout]) + gamma * mixed
            next_value = float(value(inputs[step]))
            assert float(estimate.returns[task, step, rollout]) == pytest.approx(lambda_return)
            assert float(estimate.advantages[task, step, rollout]) == pytest.approx(lambda_return - next_value)


def test_with_the_true_values_of_a_chain_advantages_are_the_analytic_ones():
    # A walker on the integers gains its position each step and moves by its action; beyond the horizon it goes on for ever
    # under a policy that moves by 0 on average: V(s) = s / (1 - gamma), and Q(s, a) = s + gamma (s + a) / (1 - gamma)
    gamma, draw = 0.8, th.Generator().manual_seed(0)
    actions = th.randint(-1, 2, (2, 7, 5), generator=draw).double()
    states = th.cat([th.zeros(2, 1, 5, dtype=th.double), actions.cumsum(1)], dim=1)
    alive = th.ones_like(actions, dtype=th.bool)
    rollouts = ImaginedRollouts(
        policy_input=states[:, :-1, :, None],
        actions=actions[..., None],
        rewards=states[:, :-1],
        alive=alive,
        terminated=~alive,
        final_input=states[:, -1:, :, None],
        penalties=th.zeros_like(actions),
    )
    critic = lambda policy_input: policy_input[..., 0] / (1 - gamma)  # noqa: E731
    estimate = estimate_advantages(rollouts, gamma=gamma, gae_lambda=0.0, baseline="critic", normalize=False, critic=critic)
    th.testing.assert_close(estimate.advantages, gamma * actions / (1 - gamma))


def test_the_time_baseline_is_a_cubic_of_the_time():
    rollouts = random_rollouts(horizon=40)
    time = th.arange(40, dtype=th.double).view(1, -1, 1) / 100
    returns = (3 + 2 * time - 5 * time**2 + time**3).expand_as(rollouts.rewards)
    values = time_baseline(rollouts.policy_input, returns, rollouts.alive)
    # The minimiser of (mean squared error + RIDGE |w|^2) is no worse than the true weights, whose error is 0
    for task in range(len(values)):
        assert (values - returns)[task][rollouts.alive[task]].square().mean() <= RIDGE * (3**2 + 2**2 + 5**2 + 1)
    changed = time_baseline(rollouts.policy_input + 7, returns, rollouts.alive)
    assert th.equal(changed, values), "the baseline must not depend on the state"
