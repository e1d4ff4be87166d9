"""The outer step as pure functions of parameters and imagined data: the meta-update of Clavera et al. 2018, algorithm 1.

``theta`` is the meta-policy's parameter vector. ``adapt`` maps it to one adapted vector per task, theta'_k, by one or several
differentiable policy-gradient steps. The outer step changes ``theta`` so that the return of the *adapted* policies improves.

Legend of shapes: ``T`` tasks, ``B`` rows per task, ``P`` parameters, ``O`` observation size, ``A`` action size.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch as th

from sb3_mbmpo.common.distributions import ActionDistribution
from sb3_mbmpo.common.linalg import conjugate_gradient
from sb3_mbmpo.common.threads import even_shares, in_parallel
from sb3_mbmpo.meta.adaptation import Actor, TaskBatch, adapt, is_usable


class StepReport(NamedTuple):
    """
    Metrics of one outer step.

    :param objective_gain: outer objective after the step minus that before it (0 if the step was rejected)
    :param kl_divergence: mean KL divergence from the old adapted policies to the new ones, in nats
    :param accepted: whether the parameters changed
    :param line_search_steps: number of candidates that the line search tried
    """

    objective_gain: float
    kl_divergence: float
    accepted: bool
    line_search_steps: int


class MetaParameters(NamedTuple):
    """
    The parameters that the outer step improves.

    :param theta: the meta-policy's parameters (P,)
    :param inner_lr: step size of the adaptation, or, if learned (Meta-SGD), one per parameter (P,)
    """

    theta: th.Tensor
    inner_lr: float | th.Tensor

    def vector(self) -> th.Tensor:
        """Return all meta-parameters as one vector: theta, followed by the step sizes if they are learned."""
        return th.cat([self.theta, self.inner_lr], dim=-1) if isinstance(self.inner_lr, th.Tensor) else self.theta

    def with_vector(self, vector: th.Tensor) -> "MetaParameters":
        """Return meta-parameters with the values of a vector like ``vector``'s, or of one for each task (T, .)."""
        if isinstance(self.inner_lr, th.Tensor):
            return MetaParameters(*vector.chunk(2, dim=-1))
        return self._replace(theta=vector)

    def step_size(self, adapts: th.Tensor | None) -> float | th.Tensor:
        """
        Return the step size of the adaptation in each task.

        :param adapts: 1 for tasks that adapt, 0 for tasks whose policy is the meta-policy itself (T, 1); None: all adapt
        :return: 0 where a task does not adapt, (T, 1), or (T, P) if step sizes are learned; without ``adapts``, ``inner_lr``
        """
        return self.inner_lr if adapts is None else adapts * self.inner_lr


def _unchanged(rows: th.Tensor) -> th.Tensor:
    return rows


class MetaProblem(NamedTuple):
    """
    Data and settings of one meta-step: everything except the meta-parameters.

    :param actor: the policy as a function of its parameters
    :param pre: a batch for each inner step
    :param post: batch imagined with the adapted policies
    :param chunk_size: number of rows of the post batch that are processed at once (at least one task), so that activations
        stay in the cache and memory is limited
    :param groups: tasks whose models are one group; no chunk has tasks of several groups. None: all tasks are one group
    :param first_order: ignore that the inner gradient depends on theta (FOMAML, Finn et al. 2017)
    :param ent_coef: weight of the entropy of the pre-adaptation policy in the outer objective
    :param n_threads: how many chunks are processed at a time
    :param adapts: which tasks adapt, see ``MetaParameters.step_size``
    :param gather: adds the rows of the tasks of other processes, in the order of the tasks: (T, .) -> (all tasks, .)
    """

    actor: Actor
    pre: tuple[TaskBatch, ...]
    post: TaskBatch
    chunk_size: int
    groups: Sequence[slice] | None = None
    first_order: bool = False
    ent_coef: float = 0.0
    n_threads: int = 1
    adapts: th.Tensor | None = None
    gather: Callable[[th.Tensor], th.Tensor] = _unchanged

    @property
    def n_tasks(self) -> int:
        """Number of tasks ``T``."""
        return len(self.post.policy_input)

    def tasks(self, chunk: slice) -> "MetaProblem":
        """Return the problem of some of the tasks, which are one group."""
        return self._replace(
            groups=None,
            pre=tuple(batch.tasks(chunk) for batch in self.pre),
            post=self.post.tasks(chunk),
            adapts=None if self.adapts is None else self.adapts[chunk],
        )

    def chunks(self) -> list["MetaProblem"]:
        """Split the problem into chunks of tasks, which are independent."""
        groups = [slice(0, self.n_tasks)] if self.groups is None else self.groups
        return [self.tasks(chunk) for chunk in task_chunks(groups, self.post.policy_input.shape[1], self.chunk_size)]

    def of_chunks(self, function: Callable[..., th.Tensor], *arguments: Sequence[Any]) -> th.Tensor:
        """
        Apply a function to every chunk, in several threads.

        :param function: a chunk and its arguments -> a row for each of its tasks (tasks, .)
        :param arguments: one element of each for every chunk
        :return: the rows of all tasks of all processes, in order; so a sum over them has the same terms in the same order,
            however they were made
        """
        jobs = [partial(function, *job) for job in zip(self.chunks(), *arguments, strict=True)]
        return self.gather(th.cat(in_parallel(jobs, self.n_threads)))

    def subsample(self, factor: int) -> "MetaProblem":
        """Return the problem with every ``factor``-th row only."""
        return self._replace(pre=tuple(b.subsample(factor) for b in self.pre), post=self.post.subsample(factor))

    def adapted(self, meta: MetaParameters, create_graph: bool = False) -> th.Tensor:
        """Return the adapted parameters theta'_k (T, P)."""
        return adapt(
            self.actor,
            meta.theta,
            self.pre,
            meta.step_size(self.adapts),
            create_graph=create_graph,
            first_order=self.first_order,
        )

    def is_usable(self, meta: MetaParameters) -> th.Tensor:
        """Tell whether the parameters and the meta-policy's action distributions in each task are finite (T,) bool."""
        theta = meta.theta.expand(self.n_tasks, -1)
        return th.isfinite(meta.vector()).all() & is_usable(self.actor, theta, self.post.policy_input)

    def adapted_distribution(self, meta: MetaParameters, create_graph: bool = False) -> ActionDistribution:
        """Return the adapted policies' action distributions at their own imagined steps."""
        return self.actor(self.adapted(meta, create_graph))(self.post.policy_input)

    def objective(self, meta: MetaParameters, distribution: ActionDistribution, old_log_prob: th.Tensor) -> th.Tensor:
        """
        Evaluate each task's outer objective: mean(ratio A'), as in TRPO (Schulman et al. 2015), plus the entropy bonus.

        :param meta: meta-parameters
        :param distribution: the adapted policies' action distributions at ``meta``
        :param old_log_prob: log-likelihood of the actions under the adapted policies that took them (T, B)
        :return: (T,)
        """
        ratio = th.exp(distribution.log_prob(self.post.actions) - old_log_prob)
        return (self.post.weight * self.post.advantages * ratio).sum(1) + self.entropy_bonus(meta)

    def entropy_bonus(self, meta: MetaParameters) -> th.Tensor | float:
        """Return ``ent_coef`` times each task's mean entropy of the policy before adaptation (T,)."""
        if self.ent_coef == 0:
            return 0.0
        entropy = self.actor(meta.theta.expand(self.n_tasks, -1))(self.pre[0].policy_input).entropy()
        return self.ent_coef * (self.pre[0].weight * entropy).sum(1)


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


def task_chunks(groups: Sequence[slice], rows_per_task: int, chunk_size: int) -> list[slice]:
    """
    Divide tasks into chunks, each of which is processed at once. They do not depend on the number of workers.

    :param groups: neighbouring tasks that a chunk may have together
    :param rows_per_task: imagined steps per task
    :param chunk_size: maximum number of rows of a chunk, unless a single task has more
    :return: the tasks of each chunk; within a group, the sizes of chunks differ by at most one
    """
    at_most = max(1, chunk_size // rows_per_task)
    chunks = []
    for group in groups:
        n_tasks = group.stop - group.start
        shares = even_shares(n_tasks, -(-n_tasks // at_most))
        chunks += [slice(group.start + share.start, group.start + share.stop) for share in shares]
    return chunks


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
    of_tasks = problem.gather(th.cat(rows))
    return of_tasks[:, :-1].mean(0), float(of_tasks[:, -1].double().mean()), list(old)


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
        return damping * vector + problem.gather(th.cat(parts)).mean(0)

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
    rows = problem.of_chunks(partial(_evaluate_chunk, meta=meta), old)
    objective, kl, is_usable = rows.double().mean(0).cpu().tolist()
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
    *,
    target_kl: float,
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

    :param problem: data and settings
    :param meta: meta-parameters, with which the data was imagined
    :param target_kl: this and the other parameters are documented at ``MBMPO``
    :return: the new meta-parameters (the old ones if no candidate is accepted, or anything is not finite) and a report
    """
    gradient, objective, old = meta_gradient(problem, meta)
    product = fisher_vector_product(problem.subsample(sub_sampling_factor), meta, cg_damping)
    direction, image = conjugate_gradient(product, gradient, cg_max_steps)
    curvature = direction @ image
    rejected = StepReport(0.0, 0.0, False, 0)
    if not (th.isfinite(direction).all() and curvature > 0):
        return meta, rejected
    step = (2 * target_kl / curvature).sqrt() * direction
    for iteration in range(line_search_max_iter):
        candidate = meta.with_vector(meta.vector() + line_search_shrinking_factor**iteration * step)
        new = _evaluate(problem, candidate, old)
        if objective < new.objective < math.inf and new.kl <= target_kl and new.is_usable:
            return candidate, StepReport(new.objective - objective, new.kl, True, iteration + 1)
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
    old = in_parallel([partial(_old_policies, chunk, meta) for chunk in problem.chunks()], problem.n_threads)
    before = _evaluate(problem, meta, old)
    leaf = meta.vector().detach().clone().requires_grad_()

    optimizer = th.optim.Adam([leaf], lr=learning_rate, maximize=True)
    for _ in range(n_epochs):
        point = meta.with_vector(leaf.detach())
        leaf.grad = problem.of_chunks(partial(_clipped_gradient_of_chunk, meta=point, clip_range=clip_range), old).mean(0)
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
