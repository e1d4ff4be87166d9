"""The inner step: a policy adapts to its task by policy gradients, differentiably (Clavera et al. 2018, algorithm 1).

Legend of shapes: ``T`` tasks, ``B`` rows a task, ``P`` parameters, ``O`` observation size, ``A`` action size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th

from sb3_mbmpo.common.distributions import ActionDistribution
from sb3_mbmpo.imagination.rollouts import ImaginedRollouts

# Parameters (T, P) -> function from policy inputs (T, B, O) to distributions
Actor = Callable[[th.Tensor], Callable[[th.Tensor], ActionDistribution]]


# To see whether a policy is one at all, a few observations will do
TRIED_ROWS = 32


class TaskBatch(NamedTuple):
    """
    Imagined steps of all tasks, as the policy gradient needs them.

    :param policy_input: standardised observations (T, B, O)
    :param actions: unclipped samples (T, B, A)
    :param advantages: (T, B)
    :param weight: each row's share in its task's mean (T, B): sums to 1, and is 0 after a termination
    """

    policy_input: th.Tensor
    actions: th.Tensor
    advantages: th.Tensor
    weight: th.Tensor

    @classmethod
    def from_rollouts(cls, rollouts: ImaginedRollouts, advantages: th.Tensor) -> "TaskBatch":
        """
        Flatten rollouts into rows.

        :param rollouts: imagined rollouts
        :param advantages: (T, H, N)
        """
        alive = rollouts.alive.flatten(1).to(advantages.dtype)
        weight = alive / alive.sum(1, keepdim=True)
        return cls(rollouts.policy_input.flatten(1, 2), rollouts.actions.flatten(1, 2), advantages.flatten(1), weight)

    def subsample(self, factor: int) -> "TaskBatch":
        """Return every ``factor``-th row, with weights that sum to 1 again."""
        if factor == 1:
            return self
        policy_input, actions, advantages, weight = (x[:, ::factor].contiguous() for x in self)
        return TaskBatch(policy_input, actions, advantages, weight / weight.sum(1, keepdim=True).clamp(min=1e-12))

    def tasks(self, chunk: slice) -> "TaskBatch":
        """Return the same for some of the tasks only."""
        return TaskBatch(*(x[chunk] for x in self))


def inner_objective(actor: Actor, parameters: th.Tensor, batch: TaskBatch) -> th.Tensor:
    """
    Objective of the adaptation, mean(log pi(a|s) A): the vanilla policy gradient.

    :param parameters: (T, P)
    :return: (T,)
    """
    log_prob = actor(parameters)(batch.policy_input).log_prob(batch.actions)
    return (batch.weight * batch.advantages * log_prob).sum(1)


def adapt(
    actor: Actor,
    theta: th.Tensor,
    batches: Sequence[TaskBatch],
    inner_lr: float | th.Tensor,
    *,
    create_graph: bool = False,
    first_order: bool = False,
) -> th.Tensor:
    """
    theta'_i = theta + alpha grad_theta mean(log pi_theta(a|s) A), for each task; once for each batch.

    :param actor: the policy as a function of its parameters
    :param theta: meta-parameters (P,), or already one set a task (T, P)
    :param batches: what each inner step learns from, imagined under the parameters it starts at
    :param inner_lr: step size alpha, a number or one a parameter (P,)
    :param create_graph: make the result differentiable in ``theta`` (and in ``inner_lr``)
    :param first_order: ... but treat the inner gradient as a constant (FOMAML)
    :return: adapted parameters (T, P)
    """
    n_tasks = len(batches[0].policy_input)
    parameters = theta.expand(n_tasks, -1)
    for batch in batches:
        with th.enable_grad():
            point = parameters if create_graph and not first_order else parameters.detach()
            if not point.requires_grad:
                point = point.clone().requires_grad_()
            # Tasks do not interact: the gradient of the sum is each task's own gradient
            objective = inner_objective(actor, point, batch).sum()
            (gradient,) = th.autograd.grad(objective, point, create_graph=create_graph and not first_order)
        parameters = parameters + inner_lr * gradient
    return parameters


@th.no_grad()
def is_usable(actor: Actor, parameters: th.Tensor, policy_input: th.Tensor) -> th.Tensor:
    """
    Tell which policies can act.

    :param parameters: (T, P)
    :param policy_input: observations that the policies meet (T, B, O); some of them are tried
    :return: whose parameters, and distributions over actions, are finite (T,) bool
    """
    tried = actor(parameters)(policy_input[:, :TRIED_ROWS])
    # NaN instead of 0 as soon as a mean, a variance or a probability leaves the range of the numbers
    return th.isfinite(parameters).all(1) & th.isfinite(tried.kl_divergence(tried)).all(1)
