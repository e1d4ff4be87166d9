"""The action distributions compared with torch.distributions, and the choice of family with Stable-Baselines3's."""

import math

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import make_proba_distribution
from torch import distributions as reference

from sb3_mbmpo.common.distributions import Bernoullis, Categoricals, DiagGaussian, make_distribution

N_TASKS, N_ROWS = 2, 5


def seeded(seed):
    return th.Generator().manual_seed(seed)


def gaussian(rows=N_ROWS, seed=0):
    draw = seeded(seed)
    log_std = 0.5 * th.randn(N_TASKS, 1, 3, generator=draw, dtype=th.double)
    return DiagGaussian(th.randn(N_TASKS, rows, 3, generator=draw, dtype=th.double), log_std)


def categorical(rows=N_ROWS, seed=0):
    return Categoricals(th.randn(N_TASKS, rows, 3, generator=seeded(seed), dtype=th.double), (3,))


def categoricals(rows=N_ROWS, seed=0):
    return Categoricals(th.randn(N_TASKS, rows, 6, generator=seeded(seed), dtype=th.double), (2, 4))


def bernoullis(rows=N_ROWS, seed=0):
    return Bernoullis(th.randn(N_TASKS, rows, 3, generator=seeded(seed), dtype=th.double))


all_families = pytest.mark.parametrize("family", [gaussian, categorical, categoricals, bernoullis])
discrete_families = pytest.mark.parametrize("family", [categorical, categoricals, bernoullis])


def columns(ours):
    """Return the same distribution from torch.distributions, with one object for each column of an action."""
    if isinstance(ours, DiagGaussian):
        std = ours.log_std.exp().expand_as(ours.mean)
        return [reference.Normal(mean, std) for mean, std in zip(ours.mean.unbind(-1), std.unbind(-1), strict=True)]
    if isinstance(ours, Categoricals):
        return [reference.Categorical(logits=logits) for logits in ours.logits.split(ours.n_choices, dim=-1)]
    return [reference.Bernoulli(logits=logits) for logits in ours.logits.unbind(-1)]


def by_column(method, distribution, actions):
    """Sum a method of each column's reference distribution, called with the column's actions."""
    pairs = zip(columns(distribution), actions.unbind(-1), strict=True)
    return sum(getattr(column, method)(action.double()) for column, action in pairs)


@all_families
def test_log_prob(family):
    ours = family()
    actions = ours.sample(seeded(1))
    th.testing.assert_close(ours.log_prob(actions), by_column("log_prob", ours, actions))
    assert ours.log_prob(actions).shape == (N_TASKS, N_ROWS)


@all_families
def test_entropy(family):
    ours = family()
    th.testing.assert_close(ours.entropy(), sum(column.entropy() for column in columns(ours)))
    assert ours.entropy().shape == (N_TASKS, N_ROWS)


@all_families
def test_kl_divergence(family):
    ours, theirs = family(seed=0), family(seed=1)
    pairs = zip(columns(ours), columns(theirs), strict=True)
    expected = sum(reference.kl_divergence(p, q) for p, q in pairs)
    th.testing.assert_close(ours.kl_divergence(theirs), expected)
    assert (expected > 0.01).all(), "distributions this close would hide a swapped argument"
    th.testing.assert_close(ours.kl_divergence(family(seed=0)), th.zeros(N_TASKS, N_ROWS, dtype=th.double))


@all_families
def test_mode(family):
    ours = family()
    expected = th.stack([column.mode for column in columns(ours)], dim=-1)
    th.testing.assert_close(ours.mode(), expected.to(ours.sample(seeded(1)).dtype))


# 20,000 seeded draws per task; a correct sampler exceeds five standard errors once in two million times
N_DRAWS, N_ERRORS = 20_000, 5


def repeated(distribution):
    """Repeat the first row of each task many times."""
    first, *rest = distribution.parameters
    return distribution.with_parameters((first[:, :1].expand(-1, N_DRAWS, -1), *rest))


def test_gaussian_samples_have_the_mean_and_the_deviation():
    ours = gaussian(rows=1)
    noise = (repeated(ours).sample(seeded(1)) - ours.mean) / ours.log_std.exp()
    limit = N_ERRORS / math.sqrt(N_DRAWS)
    assert noise.mean(1).abs().max() < limit
    assert (noise.std(1) - 1).abs().max() < limit / math.sqrt(2)
    assert noise.transpose(1, 2).reshape(-1, N_DRAWS).corrcoef().fill_diagonal_(0).abs().max() < limit
    assert ours.log_std.abs().max() > 0.3, "standard deviations near 1 would hide a forgotten one"


@discrete_families
def test_discrete_samples_have_the_probabilities(family):
    ours = family(rows=1)
    actions = repeated(ours).sample(seeded(1))
    assert actions.dtype == th.long
    for column, action in zip(columns(ours), actions.unbind(-1), strict=True):
        for value in range(column.logits.shape[-1] if isinstance(column, reference.Categorical) else 2):
            probability = column.log_prob(th.full((N_TASKS, 1), value, dtype=th.double)).exp().squeeze(1)
            limit = N_ERRORS * (probability * (1 - probability) / N_DRAWS).sqrt()
            assert ((action == value).double().mean(1) - probability < limit).all()


@all_families
def test_samples_come_from_the_generator_alone(family):
    ours = family(rows=50)
    global_state = th.get_rng_state()
    sample = ours.sample(seeded(1))
    assert th.equal(sample, ours.sample(seeded(1)))
    assert not th.equal(sample, ours.sample(seeded(2)))
    assert th.equal(th.get_rng_state(), global_state)


@all_families
def test_detach_cuts_the_graph_and_nothing_else(family):
    leaves = tuple(parameter.requires_grad_() for parameter in family().parameters)
    attached = family().with_parameters(leaves)
    actions = family().sample(seeded(1))
    assert attached.log_prob(actions).requires_grad
    assert not attached.detach().log_prob(actions).requires_grad
    assert th.equal(attached.detach().log_prob(actions), attached.log_prob(actions))
    assert type(attached.detach()) is type(attached)


@discrete_families
def test_certain_choices_stay_finite(family):
    certain = family().with_parameters(tuple((1000 * x.sign()).requires_grad_() for x in family().parameters))
    values = certain.log_prob(certain.mode()) + certain.entropy() + certain.kl_divergence(family())
    (gradient,) = th.autograd.grad(values.sum(), certain.parameters)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (spaces.Box(-1, 1, (2,)), 2),
        (spaces.Discrete(3), 3),
        (spaces.MultiDiscrete([2, 4]), 6),
        (spaces.MultiBinary(3), 3),
    ],
    ids=str,
)
def test_the_family_is_the_one_stable_baselines3_chooses(space, size):
    output = th.randn(1, N_ROWS, size, generator=seeded(0))
    log_std = th.full((1, 1, size), -0.5) if isinstance(space, spaces.Box) else None
    ours = make_distribution(space, output, log_std)
    theirs = make_proba_distribution(space).proba_distribution(output[0], *([] if log_std is None else [log_std[0, 0]]))
    action = ours.sample(seeded(1))
    shaped = action[0].reshape(N_ROWS, *space.shape).float()
    th.testing.assert_close(ours.log_prob(action)[0], theirs.log_prob(shaped))
    th.testing.assert_close(ours.mode()[0].reshape(shaped.shape).float(), theirs.mode().float())
