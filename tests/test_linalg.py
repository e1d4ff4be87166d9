"""Conjugate gradient compared with direct solutions."""

import pytest
import torch as th

from sb3_mbmpo.common.linalg import conjugate_gradient


def random_system(size, seed=0):
    """Draw a symmetric positive definite matrix and a right-hand side."""
    factor = th.randn(size, size, generator=th.Generator().manual_seed(seed), dtype=th.double)
    return factor @ factor.T / size + 0.1 * th.eye(size, dtype=th.double), factor[0] + 1


@pytest.mark.parametrize("size", [1, 2, 10, 40])
@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradient_solves_spd_systems(size, seed):
    A, b = random_system(size, seed)
    # Exact after `size` steps, except for rounding, hence twice as many
    x, image = conjugate_gradient(lambda v: A @ v, b, 2 * size, tolerance=1e-24)
    th.testing.assert_close(image, A @ x)
    th.testing.assert_close(x, th.linalg.solve(A, b), rtol=1e-9, atol=1e-9)


def test_conjugate_gradient_stops_at_the_tolerance():
    A, b = random_system(40)
    calls = []
    x, image = conjugate_gradient(lambda v: calls.append(v) or A @ v, b, 1000, tolerance=1e-4)
    assert (A @ x - b).norm() <= 1e-2 * b.norm() * (1 + 1e-6)
    assert len(calls) < 40
    th.testing.assert_close(image, A @ x)
    one_less, _ = conjugate_gradient(lambda v: A @ v, b, len(calls) - 1, tolerance=0.0)
    assert (A @ one_less - b).norm() > 1e-2 * b.norm(), "stopped late"


def test_conjugate_gradient_of_zero_is_zero_without_a_product():
    def product(v):
        raise AssertionError("nothing to multiply")

    assert all(th.equal(zero, th.zeros(5)) for zero in conjugate_gradient(product, th.zeros(5), 10))


def test_conjugate_gradient_draws_no_random_numbers():
    A, b = random_system(10)
    first, _ = conjugate_gradient(lambda v: A @ v, b, 5)
    th.manual_seed(123)
    assert th.equal(conjugate_gradient(lambda v: A @ v, b, 5)[0], first)
