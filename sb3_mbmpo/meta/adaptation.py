"""The inner step: differentiable adaptation of a policy to its task by policy gradients (Clavera et al. 2018, algorithm 1).

Legend of shapes: ``T`` tasks, ``B`` rows per task, ``P`` parameters, ``O`` observation size, ``A`` action size.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th

from sb3_mbmpo.common.distributions import ActionDistribution
from sb3_mbmpo.imagination.rollouts import ImaginedRollouts

# Parameters (T, P) -> function from policy inputs (T, B, O) to distributions
Actor = Callable[[th.Tensor], Callable[[th.Tensor], ActionDistribution]]


# A few observations suffice to see whether a policy's action distributions are finite
TRIED_ROWS = 32


class TaskBatch(NamedTuple):
    """
    Imagined steps of all tasks, as the policy gradient needs them.

    :param policy_input: standardised observations (T, B, O)
    :param actions: unclipped samples (T, B, A)
    :param advantages: (T, B)
    :param weight: weight of each row in its task's mean (T, B): sums to 1, and is 0 after a termination
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
        """Return the batch of some of the tasks."""
        return TaskBatch(*(x[chunk] for x in self))


def inner_objective(actor: Actor, parameters: th.Tensor, batch: TaskBatch) -> th.Tensor:
    """
    Evaluate the objective of the adaptation, J_k = mean(log pi(a|s) A), whose gradient is the vanilla policy gradient.

    :param actor: the policy as a function of its parameters
    :param parameters: (T, P)
    :param batch: imagined steps of all tasks
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
    Adapt the policy to each task: theta'_k = theta + alpha grad J_k(theta), one step for each batch.

    This is the adaptation line of algorithm 1 in Clavera et al. 2018, the inner step of MAML (Finn et al. 2017).

    :param actor: the policy as a function of its parameters
    :param theta: meta-parameters (P,), or already one set per task (T, P)
    :param batches: data of each inner step, imagined with the parameters at which the step starts
    :param inner_lr: step size alpha: a number, one per parameter (P,), per task (T, 1), or per task and parameter (T, P)
    :param create_graph: make the result differentiable with respect to ``theta`` (and ``inner_lr``)
    :param first_order: with ``create_graph``, treat the inner gradient as a constant (FOMAML)
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
    Tell which policies have finite parameters and action distributions, far enough from overflow for other observations.

    :param actor: the policy as a function of its parameters
    :param parameters: (T, P)
    :param policy_input: standardised observations (T, B, O); only the first ones are tried
    :return: (T,) bool
    """
    tried = actor(parameters)(policy_input[:, :TRIED_ROWS])
    # The KL to itself is NaN instead of 0 as soon as a mean, a variance or a probability is not finite
    usable = th.isfinite(parameters).all(1) & th.isfinite(tried.kl_divergence(tried)).all(1)
    for output in tried.parameters:
        # With rectified units, a policy may be finite at some observations only
        usable &= output.abs().flatten(1).amax(1) < th.finfo(output.dtype).max ** 0.5
    return usable
