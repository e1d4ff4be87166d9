"""The outer step as pure functions of parameters and imagined data: the meta-update of Clavera et al. 2018, algorithm 1.

``theta`` is the meta-policy's parameter vector. ``adapt`` maps it to one adapted vector per task, theta'_k, by one or several
differentiable policy-gradient steps. The outer step changes ``theta`` so that the return of the *adapted* policies improves.

Legend of shapes: ``T`` tasks, ``B`` rows per task, ``P`` parameters, ``O`` observation size, ``A`` action size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch as th

from sb3_mbmpo.common.distributions import ActionDistribution
from sb3_mbmpo.common.linalg import conjugate_gradient
from sb3_mbmpo.common.threads import in_parallel
from sb3_mbmpo.meta.problem import MetaParameters, MetaProblem


class StepReport(NamedTuple):
    """
    Metrics of one outer step.

    :param objective_gain: outer objective after the step minus that before it (0 if the step was rejected)
    :param kl_divergence: mean KL divergence from the old adapted policies to the new ones, in nats
    :param accepted: whether the parameters changed
    :param line_search_steps: number of candidates that the line search tried
    :param direction: what a TRPO step follows, a sum over this and earlier steps; None after a PPO step
    """

    objective_gain: float
    kl_divergence: float
    accepted: bool
    line_search_steps: int
    direction: th.Tensor | None = None


class _Old(NamedTuple):
    """The adapted policies that imagined the post batch: their distributions and log-likelihoods, as constants."""

    distribution: ActionDistribution
    log_prob: th.Tensor

    def kl_to(self, distribution: ActionDistribution, weight: th.Tensor) -> th.Tensor:
        """Return each task's mean KL(old || new) in nats (T,)."""
        return (weight * self.distribution.kl_divergence(distribution)).sum(1)


class _Evaluation(NamedTuple):
    """
    The adapted policies at some meta-parameters, compared with the old ones.

    :param objective: mean outer objective over the tasks
    :param kl: mean KL divergence from the old adapted policies, in nats
    :param is_usable: whether the parameters and the meta-policy's action distributions are finite
    """

    objective: float
    kl: float
    is_usable: bool


def _leaf(meta: MetaParameters, n_tasks: int) -> th.Tensor:
    """Return the meta-parameters as one vector for each task, so that every task has a gradient of its own (T, .)."""
    return meta.vector().detach().expand(n_tasks, -1).clone().requires_grad_()


def meta_gradient(problem: MetaProblem, meta: MetaParameters) -> tuple[th.Tensor, float, list[_Old]]:
    """
    Compute the gradient of the outer objective through the adaptation, at the parameters that imagined the data.

    This is the meta-gradient of MAML (Finn et al. 2017).

    :param problem: data and settings
    :param meta: meta-parameters
    :return: gradient, shaped like ``meta.vector()``, the objective's value, and the old adapted policies of each chunk
    """
    jobs = [partial(_gradient_of_chunk, chunk, meta) for chunk in problem.chunks()]
    rows, old = zip(*in_parallel(jobs, problem.n_threads), strict=True)
    mean = problem.mean(th.cat(rows))
    return mean[:-1].to(meta.theta.dtype), float(mean[-1]), list(old)


def _gradient_of_chunk(chunk: MetaProblem, meta: MetaParameters) -> tuple[th.Tensor, _Old]:
    """Return each task's gradient, followed by its objective, and the old adapted policies."""
    leaf = _leaf(meta, chunk.n_tasks)
    point = meta.with_vector(leaf)
    distribution = chunk.adapted_distribution(point, create_graph=True)
    old = _Old(distribution.detach(), distribution.log_prob(chunk.post.actions).detach())
    objective = chunk.objective(point, distribution, old.log_prob)
    (gradient,) = th.autograd.grad(objective.sum(), leaf)
    return th.cat([gradient, objective.detach().unsqueeze(1)], dim=1), old


def fisher_vector_product(
    problem: MetaProblem, meta: MetaParameters, damping: float = 0.0
) -> Callable[[th.Tensor], th.Tensor]:
    """
    Return a function that multiplies with the Fisher matrix of the adapted policies, *through the inner step*.

    The Fisher matrix (Schulman et al. 2015) is the Hessian at ``meta`` of the mean KL divergence from the old adapted policies
    to the new ones. At the old parameters the gradient of the KL with respect to the distribution vanishes, so the Hessian is
    exactly Q^T M Q, where Q is the Jacobian of the adapted policies' distribution parameters and M the Hessian of the KL with
    respect to these. The products reuse graphs that are built once, and need no third derivatives.

    :param problem: data and settings
    :param meta: meta-parameters
    :param damping: added to the diagonal
    :return: function from a vector like ``meta.vector()`` to the product
    """
    build = [partial(_fisher_factors, chunk, meta) for chunk in problem.chunks()]
    factors = in_parallel(build, problem.n_threads)

    def product(vector: th.Tensor) -> th.Tensor:
        parts = in_parallel([partial(factor, vector) for factor in factors], problem.n_threads)
        return damping * vector + problem.mean(th.cat(parts)).to(vector.dtype)

    return product


def _fisher_factors(problem: MetaProblem, meta: MetaParameters) -> Callable[[th.Tensor], th.Tensor]:
    """Return the product function of some of the tasks, which keeps its graphs alive."""
    leaf = _leaf(meta, problem.n_tasks)
    outputs = problem.adapted_distribution(meta.with_vector(leaf), create_graph=True)
    parameters = outputs.parameters

    # v -> Q v is the derivative of u -> Q^T u, which is linear: a backward pass through the backward pass
    cotangents = tuple(th.zeros_like(parameter, requires_grad=True) for parameter in parameters)
    (pulled_back,) = th.autograd.grad(parameters, leaf, cotangents, create_graph=True)

    with th.enable_grad():
        new = tuple(parameter.detach().requires_grad_() for parameter in parameters)
        kl = _Old(outputs.detach(), th.empty(0)).kl_to(outputs.with_parameters(new), problem.post.weight).sum()
        slope = th.autograd.grad(kl, new, create_graph=True)

    def product(vector: th.Tensor) -> th.Tensor:
        """Return a row for each task (T, .)."""
        tangents = th.autograd.grad(pulled_back, cotangents, vector.expand_as(leaf), retain_graph=True)
        curved = th.autograd.grad(slope, new, tangents, retain_graph=True)
        (result,) = th.autograd.grad(parameters, leaf, curved, retain_graph=True)
        return result

    return product


def _evaluate(problem: MetaProblem, meta: MetaParameters, old: list[_Old]) -> _Evaluation:
    """Compare the adapted policies at ``meta`` with the old ones."""
    objective, kl, is_usable = problem.mean_of_chunks(partial(_evaluate_chunk, meta=meta), old).cpu().tolist()
    return _Evaluation(objective, kl, is_usable == 1)


@th.no_grad()
def _evaluate_chunk(chunk: MetaProblem, before: _Old, meta: MetaParameters) -> th.Tensor:
    distribution = chunk.adapted_distribution(meta)
    objective = chunk.objective(meta, distribution, before.log_prob)
    kl = before.kl_to(distribution, chunk.post.weight)
    return th.stack([objective, kl, chunk.is_usable(meta).to(kl.dtype)], dim=1)


@th.no_grad()
def _old_policies(problem: MetaProblem, meta: MetaParameters) -> _Old:
    distribution = problem.adapted_distribution(meta)
    return _Old(distribution, distribution.log_prob(problem.post.actions))


def trust_region_step(
    problem: MetaProblem,
    meta: MetaParameters,
    previous: th.Tensor | None = None,
    *,
    target_kl: float,
    momentum: float,
    cg_max_steps: int,
    cg_damping: float,
    line_search_shrinking_factor: float,
    line_search_max_iter: int,
    sub_sampling_factor: int,
) -> tuple[MetaParameters, StepReport]:
    """
    Improve the outer objective by one step of TRPO (Schulman et al. 2015).

    It is a natural gradient step, shortened by a backtracking line search until a candidate improves the objective within the
    bound of the KL divergence.

    With momentum, it follows a sum of natural gradients of equal length, in which each step back counts less. The natural
    gradient of one batch of HalfCheetah's default size is noise for 90 % of its squared length (in the metric of the Fisher
    matrix), and a step always has the length that the bound allows: without momentum, most of a step is a random walk. The
    sum is not over ordinary gradients: these have parts that the Fisher matrix of another batch hardly knows, and so makes
    huge.

    :param problem: data and settings
    :param meta: meta-parameters, with which the data was imagined
    :param previous: ``direction`` in the report of the step before; None for the first step
    :param target_kl: this and the other parameters are documented at ``MBMPO``
    :return: the new meta-parameters (the old ones if no candidate is accepted, or anything is not finite) and a report
    """
    problem = problem.adapting_first()
    gradient, objective, old = meta_gradient(problem, meta)
    product = fisher_vector_product(problem.subsample(sub_sampling_factor), meta, cg_damping)
    natural, image = conjugate_gradient(product, gradient, cg_max_steps)
    # Of length 1 in the metric of the Fisher matrix; NaN or infinite without a gradient
    direction = natural / (natural @ image).sqrt()
    curvature = th.ones_like(direction[0])
    if previous is not None and momentum > 0:
        direction = direction + momentum * previous
        curvature = direction @ product(direction)
    if not (th.isfinite(direction).all() and curvature > 0):
        return meta, StepReport(0.0, 0.0, False, 0, previous)
    rejected = StepReport(0.0, 0.0, False, 0, direction)
    step = (2 * target_kl / curvature).sqrt() * direction
    for iteration in range(line_search_max_iter):
        candidate = meta.with_vector(meta.vector() + line_search_shrinking_factor**iteration * step)
        new = _evaluate(problem, candidate, old)
        if objective < new.objective < math.inf and new.kl <= target_kl and new.is_usable:
            return candidate, StepReport(new.objective - objective, new.kl, True, iteration + 1, direction)
    return meta, rejected._replace(line_search_steps=line_search_max_iter)


def proximal_step(
    problem: MetaProblem,
    meta: MetaParameters,
    *,
    learning_rate: float = 1e-3,
    n_epochs: int = 8,
    clip_range: float = 0.2,
) -> tuple[MetaParameters, StepReport]:
    """
    Improve the outer objective by PPO (Schulman et al. 2017): Adam steps on the clipped surrogate, without minibatches.

    :param problem: data and settings
    :param meta: meta-parameters, with which the data was imagined
    :param learning_rate: Adam step size
    :param n_epochs: number of Adam steps
    :param clip_range: the ratio is clipped to [1 - clip_range, 1 + clip_range]
    :return: the new meta-parameters (the old ones if these or their policies' distributions are not finite) and a report
    """
    problem = problem.adapting_first()
    old = in_parallel([partial(_old_policies, chunk, meta) for chunk in problem.chunks()], problem.n_threads)
    before = _evaluate(problem, meta, old)
    leaf = meta.vector().detach().clone().requires_grad_()

    optimizer = th.optim.Adam([leaf], lr=learning_rate, maximize=True)
    for _ in range(n_epochs):
        point = meta.with_vector(leaf.detach())
        gradient = problem.mean_of_chunks(partial(_clipped_gradient_of_chunk, meta=point, clip_range=clip_range), old)
        leaf.grad = gradient.to(leaf.dtype)
        optimizer.step()
    candidate = meta.with_vector(leaf.detach())
    new = _evaluate(problem, candidate, old)
    if not (new.is_usable and math.isfinite(new.objective) and math.isfinite(new.kl)):
        return meta, StepReport(0.0, 0.0, False, 0)
    return candidate, StepReport(new.objective - before.objective, new.kl, True, 0)


def _clipped_gradient_of_chunk(chunk: MetaProblem, before: _Old, *, meta: MetaParameters, clip_range: float) -> th.Tensor:
    """Return each task's gradient of PPO's surrogate, like ``meta.vector()`` (T, .)."""
    leaf = _leaf(meta, chunk.n_tasks)
    point = meta.with_vector(leaf)
    log_prob = chunk.adapted_distribution(point, create_graph=True).log_prob(chunk.post.actions)
    ratio = th.exp(log_prob - before.log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    surrogate = th.minimum(ratio * chunk.post.advantages, clipped * chunk.post.advantages)
    total = (chunk.post.weight * surrogate).sum(1) + chunk.entropy_bonus(point)
    return th.autograd.grad(total.sum(), leaf)[0]
