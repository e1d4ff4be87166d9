"""The problem of one meta-step: the imagined data, and its outer objective as a function of the meta-parameters.

Legend of shapes: ``T`` tasks, ``B`` rows per task, ``P`` parameters, ``O`` observation size, ``A`` action size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch as th

from sb3_mbmpo.common.distributions import ActionDistribution
from sb3_mbmpo.common.threads import even_shares, in_parallel
from sb3_mbmpo.common.world import ALONE
from sb3_mbmpo.meta.adaptation import Actor, TaskBatch, adapt, is_usable


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


def mean_of_tasks(rows: th.Tensor) -> th.Tensor:
    """Return the mean of the rows of all tasks, if they are in one process: (T, .) -> (.) float64."""
    return ALONE.mean(rows, len(rows))


class MetaProblem(NamedTuple):
    """
    Data and settings of one meta-step: everything except the meta-parameters.

    :param actor: the policy as a function of its parameters
    :param pre: a batch for each inner step; none: the tasks do not adapt
    :param post: batch imagined with the adapted policies
    :param chunk_size: number of rows of the post batch that are processed at once (at least one task), so that activations
        stay in the cache and memory is limited
    :param groups: neighbouring tasks that a chunk may have together; None: all tasks
    :param idle: groups of further tasks, which do not adapt, see ``adapting_first``
    :param first_order: ignore that the inner gradient depends on theta (FOMAML, Finn et al. 2017)
    :param ent_coef: weight of the entropy of the pre-adaptation policy in the outer objective
    :param n_threads: how many chunks are processed at a time
    :param adapts: which tasks adapt, see ``MetaParameters.step_size``
    :param mean: averages rows over the tasks of all processes, see ``World.mean``: (T, .) -> (.) float64
    """

    actor: Actor
    pre: tuple[TaskBatch, ...]
    post: TaskBatch
    chunk_size: int
    groups: Sequence[slice] | None = None
    idle: Sequence[slice] = ()
    first_order: bool = False
    ent_coef: float = 0.0
    n_threads: int = 1
    adapts: th.Tensor | None = None
    mean: Callable[[th.Tensor], th.Tensor] = mean_of_tasks

    @property
    def n_tasks(self) -> int:
        """Number of tasks ``T``."""
        return len(self.post.policy_input)

    def tasks(self, chunk: slice) -> "MetaProblem":
        """Return the problem of some of the tasks, which are one group."""
        return self._replace(
            groups=None,
            idle=(),
            pre=tuple(batch.tasks(chunk) for batch in self.pre),
            post=self.post.tasks(chunk),
            adapts=None if self.adapts is None else self.adapts[chunk],
        )

    def chunks(self) -> list["MetaProblem"]:
        """Split the problem into chunks of tasks, which are independent."""
        groups = [slice(0, self.n_tasks)] if self.groups is None else self.groups
        rows = self.post.policy_input.shape[1]
        idle = [self.tasks(chunk)._replace(pre=()) for chunk in task_chunks(self.idle, rows, self.chunk_size)]
        return [self.tasks(chunk) for chunk in task_chunks(groups, rows, self.chunk_size)] + idle

    def adapting_first(self) -> "MetaProblem":
        """
        Return the problem with its tasks in another order, so that chunks do not compute adaptations that nothing needs.

        Within each group, the tasks that do not adapt come last, and form a group of their own.
        """
        if self.adapts is None or self.ent_coef != 0:  # the entropy is that of the pre batch, of all tasks
            return self
        adapts = self.adapts.squeeze(1).cpu().tolist()
        order: list[int] = []
        groups: dict[bool, list[slice]] = {True: [], False: []}
        for group in [slice(0, self.n_tasks)] if self.groups is None else self.groups:
            for kind, found in groups.items():
                tasks = [i for i in range(group.start, group.stop) if bool(adapts[i]) == kind]
                if tasks:
                    found.append(slice(len(order), len(order) + len(tasks)))
                    order += tasks
        index = th.as_tensor(order, device=self.adapts.device)
        return self._replace(
            pre=tuple(TaskBatch(*(x[index] for x in batch)) for batch in self.pre),
            post=TaskBatch(*(x[index] for x in self.post)),
            groups=groups[True],
            idle=groups[False],
            adapts=None,
        )

    def mean_of_chunks(self, function: Callable[..., th.Tensor], *arguments: Sequence[Any]) -> th.Tensor:
        """
        Apply a function to every chunk, in several threads.

        :param function: a chunk and its arguments -> a row for each of its tasks (tasks, .)
        :param arguments: one element of each for every chunk
        :return: the mean of the rows of all tasks of all processes (.) float64
        """
        jobs = [partial(function, *job) for job in zip(self.chunks(), *arguments, strict=True)]
        return self.mean(th.cat(in_parallel(jobs, self.n_threads)))

    def subsample(self, factor: int) -> "MetaProblem":
        """Return the problem with every ``factor``-th row only."""
        return self._replace(pre=tuple(b.subsample(factor) for b in self.pre), post=self.post.subsample(factor))

    def adapted(self, meta: MetaParameters, create_graph: bool = False) -> th.Tensor:
        """Return the adapted parameters theta'_k (T, P)."""
        if not self.pre:
            return meta.theta.expand(self.n_tasks, -1)
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
