"""Outer steps, TRPO's and PPO's, compared with recomputed objectives and KL divergences."""

import numpy as np
import pytest
import torch as th
from meta_problem import (
    VARIANTS,
    all_families,
    all_variants,
    fisher_vector_product,
    make_policy,
    make_problem,
    meta_gradient,
    outer_objective,
    post_distribution,
    proximal_step,
    seeded,
    trust_region_step,
)

from sb3_mbmpo.meta import outer_step as meta
from sb3_mbmpo.meta.adaptation import TaskBatch, adapt
from sb3_mbmpo.meta.outer_step import StepReport
from sb3_mbmpo.meta.problem import MetaProblem

# An approximate gradient need not point uphill
EXACT = {name: variant for name, variant in VARIANTS.items() if "first_order" not in variant}
exact_variants = pytest.mark.parametrize("variant", EXACT.values(), ids=EXACT)


def mean_kl(problem, phi, old_phi):
    divergence = post_distribution(problem, old_phi).kl_divergence(post_distribution(problem, phi))
    return float((problem.post.weight * divergence).sum(1).mean())


def assert_report_is_true(report, problem, phi, new_phi):
    gain = outer_objective(problem, new_phi, phi) - outer_objective(problem, phi, phi)
    assert report.objective_gain == pytest.approx(gain, rel=1e-8)
    assert report.kl_divergence == pytest.approx(mean_kl(problem, new_phi, phi), rel=1e-8)
    assert report.accepted


@all_families
@exact_variants
@pytest.mark.parametrize("kwargs", [{}, {"target_kl": 0.3}, {"sub_sampling_factor": 2}], ids=str)
def test_a_trust_region_step_improves_within_the_bound(family, variant, kwargs):
    problem, phi = make_problem(family, n_inner_steps=2, **variant)
    new_phi, report = trust_region_step(problem, phi, **kwargs)
    assert_report_is_true(report, problem, phi, new_phi)
    assert report.objective_gain > 0
    # A step far below the bound would mean a wrong scale
    assert 0.1 * kwargs.get("target_kl", 0.01) < report.kl_divergence <= kwargs.get("target_kl", 0.01)


@pytest.mark.parametrize(("target_kl", "factor"), [(0.01, 1), (0.5, 1), (0.01, 3)])
def test_a_trust_region_step_is_a_natural_gradient_step(target_kl, factor):
    problem, phi = make_problem()
    kwargs = dict(cg_max_steps=100, cg_damping=0.1, sub_sampling_factor=factor)
    new_phi, report = trust_region_step(problem, phi, target_kl=target_kl, **kwargs)
    full_step = (new_phi - phi) / 0.8 ** (report.line_search_steps - 1)
    image = fisher_vector_product(problem.subsample(factor), phi, damping=0.1)(full_step)
    assert 0.5 * full_step @ image == pytest.approx(target_kl)
    gradient, _, _ = meta_gradient(problem, phi)
    # Conjugate gradient leaves a residual of 1e-5 of the gradient
    th.testing.assert_close(image / image.norm(), gradient / gradient.norm(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_momentum_follows_a_sum_of_natural_gradients_of_equal_length(momentum):
    problem, phi = make_problem()
    kwargs = dict(cg_max_steps=100, cg_damping=0.1, line_search_max_iter=60)
    product = fisher_vector_product(problem, phi, damping=0.1)
    _, first = trust_region_step(problem, phi, **kwargs)
    own = first.direction
    assert own @ product(own) == pytest.approx(1)
    previous = th.linspace(-1, 1, len(own), dtype=own.dtype)
    previous /= (previous @ product(previous)).sqrt()
    new_phi, report = trust_region_step(problem, phi, previous, momentum=momentum, **kwargs)
    assert report.accepted
    followed = own + momentum * previous
    th.testing.assert_close(report.direction, followed)
    full_step = (new_phi - phi) / 0.8 ** (report.line_search_steps - 1)
    th.testing.assert_close(full_step, (2 * 0.01 / (followed @ product(followed))).sqrt() * followed)


def test_a_gradient_that_is_not_finite_does_not_enter_the_momentum():
    problem, phi = make_problem()
    previous = th.ones_like(phi)
    problem.post.advantages[1, 2] = np.nan
    new_phi, report = trust_region_step(problem, phi, previous, momentum=0.9)
    assert new_phi is phi
    assert report.direction is previous


def test_the_line_search_goes_back_only_as_far_as_it_must():
    problem, phi = make_problem()
    kwargs = dict(target_kl=0.5, line_search_shrinking_factor=0.9)
    new_phi, report = trust_region_step(problem, phi, **kwargs)
    assert report.line_search_steps > 1
    before = phi + (new_phi - phi) / 0.9
    assert mean_kl(problem, before, phi) > 0.5 or outer_objective(problem, before, phi) < outer_objective(problem, phi, phi)
    too_short = trust_region_step(problem, phi, **kwargs, line_search_max_iter=report.line_search_steps - 1)
    assert too_short[0] is phi
    assert too_short[1][:4] == (0.0, 0.0, False, report.line_search_steps - 1)


@pytest.mark.parametrize("evaluation", [(np.inf, np.inf), (-np.inf, 0.0), (np.nan, 0.0), (np.inf, np.nan)], ids=str)
def test_no_good_candidate_leaves_the_parameters(evaluation, monkeypatch):
    problem, phi = make_problem()
    monkeypatch.setattr(meta, "_evaluate", lambda *_: meta._Evaluation(*evaluation, is_usable=True))
    new_phi, report = trust_region_step(problem, phi, line_search_max_iter=4)
    assert new_phi is phi
    assert report[:4] == (0.0, 0.0, False, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("stage", ["pre", "post"])
@pytest.mark.parametrize("step", [trust_region_step, proximal_step])
def test_advantages_that_are_not_finite_leave_the_parameters(step, stage, value):
    problem, phi = make_problem()
    batch = problem.post if stage == "post" else problem.pre[0]
    batch.advantages[1, 2] = value
    original = phi.clone()
    new_phi, report = step(problem, phi)
    assert new_phi is phi
    assert th.equal(phi, original)
    assert report == StepReport(0.0, 0.0, False, 0)


@pytest.mark.parametrize("step", [trust_region_step, proximal_step])
def test_an_objective_that_overflows_leaves_the_parameters(step):
    problem, phi = make_problem()
    problem.post.advantages.fill_(1.7e308)  # finite in each task, but not their sum
    new_phi, report = step(problem, phi)
    assert th.equal(new_phi, phi)
    assert not report.accepted
    assert report.objective_gain == 0


def test_zero_advantages_leave_the_parameters():
    problem, phi = make_problem()
    problem.post.advantages.zero_()
    new_phi, report = trust_region_step(problem, phi)
    assert new_phi is phi
    assert report[:4] == (0.0, 0.0, False, 0)
    th.testing.assert_close(proximal_step(problem, phi)[0], phi)


@all_families
@exact_variants
def test_a_proximal_step_improves_the_objective(family, variant):
    problem, phi = make_problem(family, n_inner_steps=2, **variant)
    original = phi.clone()
    new_phi, report = proximal_step(problem, phi)
    assert_report_is_true(report, problem, phi, new_phi)
    assert report.objective_gain > 0
    assert th.equal(phi, original)


@all_variants
def test_the_first_proximal_epoch_is_adam_on_the_meta_gradient(variant):
    problem, phi = make_problem(n_inner_steps=2, **variant)
    gradient, _, _ = meta_gradient(problem, phi)
    new_phi, _ = proximal_step(problem, phi, learning_rate=0.01, n_epochs=1)
    th.testing.assert_close(new_phi, phi + 0.01 * gradient / (gradient.abs() + 1e-8))


def test_clipping_bounds_the_proximal_step():
    problem, phi = make_problem()
    kwargs = dict(learning_rate=0.01, n_epochs=50)
    moved = [mean_kl(problem, proximal_step(problem, phi, clip_range=clip, **kwargs)[0], phi) for clip in (0.02, 0.2, 1e3)]
    assert moved[0] < 0.5 * moved[1] < 0.25 * moved[2]


def in_single_precision(problem):
    batches = [
        TaskBatch(*(x.float() if x.is_floating_point() else x for x in batch)) for batch in (*problem.pre, problem.post)
    ]
    return problem._replace(pre=tuple(batches[:-1]), post=batches[-1])


@all_families
@pytest.mark.parametrize("step", [trust_region_step, proximal_step])
def test_single_precision_suffices(step, family):
    problem, phi = make_problem(family, n_inner_steps=2, ent_coef=0.3)
    single = in_single_precision(problem)
    gradient, _, _ = meta_gradient(single, phi.float())
    th.testing.assert_close(gradient, meta_gradient(problem, phi)[0].float(), rtol=1e-4, atol=1e-5)
    new_phi, report = step(single, phi.float())
    assert new_phi.dtype == th.float32
    # Conjugate gradient ends at another point, but not at a worse one
    assert report.objective_gain == pytest.approx(step(problem, phi)[1].objective_gain, rel=0.05)
    assert report.kl_divergence == pytest.approx(mean_kl(problem, new_phi.double(), phi), rel=1e-3)


@pytest.mark.parametrize("step", [trust_region_step, proximal_step])
def test_meta_steps_improve_the_adapted_policies(step):
    """Each task wants another action; after a few meta-steps one inner step from theta suffices."""
    policy = make_policy("gaussian")
    goals = th.tensor([[0.5, 1.0], [0.5, -1.0], [1.0, 0.0]], dtype=th.double)
    draw = seeded(0)

    def act(parameters):
        policy_input = th.randn(len(goals), 200, 2, generator=draw, dtype=th.double)
        actions = policy.actor(parameters)(policy_input).sample(draw)
        rewards = -(actions - goals.unsqueeze(1)).square().sum(-1)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
        return TaskBatch(policy_input, actions, advantages, th.full_like(rewards, 1 / 200)), float(rewards.mean())

    theta, returns = policy.actor_vector(), []
    for _ in range(20):
        pre, _ = act(theta.expand(len(goals), -1))
        post, post_return = act(adapt(policy.actor, theta, [pre], 0.1))
        problem = MetaProblem(policy.actor, (pre,), post, chunk_size=16_384)
        returns.append(post_return)
        theta, report = step(problem, theta, **({"target_kl": 0.05} if step is trust_region_step else {"learning_rate": 0.02}))
        assert report.accepted
        assert step is proximal_step or report.kl_divergence <= 0.05
    # 600 rewards with a standard deviation of at most 3: means have a standard error of 0.12
    assert returns[-1] > returns[0] + 1
