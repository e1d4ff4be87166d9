"""The adaptation, its gradient and its curvature, compared with finite differences and explicit Hessians."""

import pytest
import torch as th
from meta_problem import (
    N_TASKS,
    all_families,
    all_variants,
    at,
    fisher_vector_product,
    inner_gradients,
    make_problem,
    meta_gradient,
    outer_objective,
    start_and_step_size,
)

from sb3_mbmpo.imagination.rollouts import ImaginedRollouts
from sb3_mbmpo.meta.adaptation import TaskBatch, adapt

inner_steps = pytest.mark.parametrize("n_inner_steps", [1, 2, 3])


def finite_differences(function, x, eps=1e-5):
    """Return central differences; in double precision, both of their errors are near 1e-10 of the function."""
    steps = eps * th.eye(len(x), dtype=x.dtype)
    return th.tensor([function(x + step) - function(x - step) for step in steps], dtype=x.dtype) / (2 * eps)


def matrix_of(product, size):
    return th.stack([product(unit) for unit in th.eye(size, dtype=th.double)])


# ---------------------------------------------------------------- The adaptation and its gradient


@all_families
@inner_steps
@all_variants
def test_the_meta_gradient_equals_finite_differences(family, n_inner_steps, variant):
    problem, phi = make_problem(family, n_inner_steps, **variant)
    frozen = inner_gradients(problem, phi) if problem.first_order else None
    gradient, value, _ = meta_gradient(problem, phi)
    expected = finite_differences(lambda x: outer_objective(problem, x, phi, frozen), phi)
    th.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
    assert value == pytest.approx(outer_objective(problem, phi, phi))


def test_a_task_that_does_not_adapt_keeps_the_meta_policy():
    problem, phi = make_problem(n_inner_steps=2, unadapted=True)
    adapted = problem.adapted(at(problem, phi))
    assert [bool(th.equal(parameters, phi)) for parameters in adapted] == [False] * (N_TASKS - 1) + [True]


@all_families
@inner_steps
def test_the_second_order_matters(family, n_inner_steps):
    problem, phi = make_problem(family, n_inner_steps)
    full, first_order = (meta_gradient(problem._replace(first_order=order), phi)[0] for order in (False, True))
    # Ten thousand times the tolerance above
    assert (full - first_order).norm() > 0.05 * full.norm()


@all_families
@all_variants
def test_the_adaptation_is_one_policy_gradient_step_a_batch(family, variant):
    problem, phi = make_problem(family, n_inner_steps=2, **variant)
    theta, lr = start_and_step_size(problem, phi)
    adapted = theta + lr * inner_gradients(problem, phi).sum(0)
    th.testing.assert_close(problem.adapted(at(problem, phi)), adapted)
    th.testing.assert_close(problem.adapted(at(problem, phi.clone().requires_grad_()), create_graph=True), adapted)
    # From the parameters after the first step, with which the second batch is imagined
    first = adapt(problem.actor, theta, problem.pre[:1], lr)
    th.testing.assert_close(adapt(problem.actor, first, problem.pre[1:], lr), adapted)


def test_a_batch_holds_the_rollouts_row_by_row():
    T, H, N = 2, 3, 4
    index = th.arange(T * H * N, dtype=th.double).view(T, H, N)
    lengths = th.tensor([[3, 3, 1, 3], [1, 2, 3, 3]]).unsqueeze(1)
    alive = th.arange(H).view(1, H, 1) < lengths
    final_input = index[:, :1, :, None]
    rollouts = ImaginedRollouts(index[..., None], index[..., None] + 0.5, index, alive, ~alive, final_input, 0 * index)
    batch = TaskBatch.from_rollouts(rollouts, -index)
    assert th.equal(batch.policy_input[..., 0], -batch.advantages)
    assert th.equal(batch.actions, batch.policy_input + 0.5)
    th.testing.assert_close(batch.weight.sum(1), th.ones(T, dtype=th.double))
    # 10 and 9 living steps
    weights = alive.flatten(1) * th.tensor([[1 / 10], [1 / 9]], dtype=th.double)
    th.testing.assert_close(batch.weight.gather(1, batch.policy_input[..., 0].long() % (H * N)), weights)


# ---------------------------------------------------------------- Curvature and conjugate gradient


@all_families
@pytest.mark.parametrize("n_inner_steps", [1, 2])
@all_variants
def test_the_fisher_product_is_the_hessian_of_the_kl_through_the_inner_step(family, n_inner_steps, variant):
    problem, phi = make_problem(family, n_inner_steps, **variant)
    old = problem.adapted_distribution(at(problem, phi)).detach()

    def kl(x):
        divergence = old.kl_divergence(problem.adapted_distribution(at(problem, x), create_graph=True))
        return (problem.post.weight * divergence).sum(1).mean()

    hessian = th.autograd.functional.hessian(kl, phi)
    fisher = matrix_of(fisher_vector_product(problem, phi), len(phi))
    th.testing.assert_close(fisher, hessian, rtol=1e-8, atol=1e-10)
    th.testing.assert_close(fisher, fisher.T, rtol=1e-8, atol=1e-10)
    eigenvalues = th.linalg.eigvalsh(fisher)
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]
    damped = matrix_of(fisher_vector_product(problem, phi, damping=0.25), len(phi))
    th.testing.assert_close(damped, fisher + 0.25 * th.eye(len(phi), dtype=th.double))
