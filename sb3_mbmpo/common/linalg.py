"""Linear algebra on vectors of parameters."""

from collections.abc import Callable

import torch as th


def conjugate_gradient(
    product: Callable[[th.Tensor], th.Tensor], b: th.Tensor, max_steps: int, *, tolerance: float = 1e-10
) -> tuple[th.Tensor, th.Tensor]:
    """
    Solve ``A x = b`` for a symmetric positive definite A by conjugate gradients.

    Unlike sb3-contrib's solver it starts at 0: it draws no random numbers, so the result is always the same.

    :param product: the function x -> A x
    :param b: right-hand side (P,)
    :param max_steps: maximum number of iterations
    :param tolerance: stop when the squared norm of the residual is below this share of that of ``b``
    :return: x (P,), and A x (P,), which needs no further product
    """
    x, image_of_x = th.zeros_like(b), th.zeros_like(b)
    residual = b.clone()
    direction = b.clone()
    squared = residual @ residual
    target = tolerance * squared
    for _ in range(max_steps):
        if squared <= target:
            break
        image = product(direction)
        step = squared / (direction @ image)
        x = x + step * direction
        image_of_x = image_of_x + step * image
        residual = residual - step * image
        new_squared = residual @ residual
        direction = residual + (new_squared / squared) * direction
        squared = new_squared
    return x, image_of_x
