"""The critic of the meta-policy: the value network of SB3's policy, trained on lambda-returns of imagined rollouts."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_mbmpo.common.threads import even_shares, in_parallel
from sb3_mbmpo.common.world import ALONE, World
from sb3_mbmpo.imagination.rollouts import ImaginedRollouts
from sb3_mbmpo.meta.advantages import AdvantageEstimate
from sb3_mbmpo.policies import MetaPolicy

# Targets whose relative spread is below this count as constant: dividing by the spread would amplify rounding errors
MIN_RELATIVE_SPREAD = 1e-4
# Rows of a minibatch that are differentiated at a time: their activations stay in the cache, and threads and processes share
# the pieces of a minibatch
CHUNK_ROWS = 1024


class CriticReport(NamedTuple):
    """
    Metrics of a fit of the critic.

    :param value_loss: mean squared error of the last update, in squared units of the reward
    :param explained_variance: share of the returns' variance that the values before the updates explain
    """

    value_loss: float
    explained_variance: float


@dataclass(frozen=True)
class Critic:
    """
    The value function of the meta-policy, shared by all tasks, and its training.

    :param policy: the meta-policy, which owns the value network and its optimiser
    :param generator: draws the minibatches
    :param n_updates: minibatch steps after each imagined batch
    :param batch_size: rows of a minibatch
    :param n_threads: how many threads differentiate
    :param world: the processes that share the minibatches; all of them have the same policy, and fit it to the same rows
    """

    policy: MetaPolicy
    generator: th.Generator
    n_updates: int
    batch_size: int
    n_threads: int = 1
    world: World = ALONE

    @th.no_grad()
    def __call__(self, policy_input: th.Tensor) -> th.Tensor:
        """
        Estimate the discounted return of the meta-policy; 0 before the first fit, because the scale is not known yet.

        :param policy_input: standardised observations (..., O)
        :return: values in units of the reward (...)
        """
        return self.policy.values(policy_input) * self.policy.value_net.is_trained

    def fit(self, rollouts: ImaginedRollouts, estimate: AdvantageEstimate) -> CriticReport:
        """
        Regress the value network on lambda-returns, by whose mean and spread it scales its outputs.

        :param rollouts: imagined with the meta-policy
        :param estimate: their values and returns
        :return: metrics of the fit; NaN if the fit was undone because a parameter was no longer finite
        """
        policy, optimizer = self.policy, self.policy.optimizer
        learned = [*policy.critic_parameters().values(), *policy.value_net.buffers()]
        before, optimizer_before = [tensor.detach().clone() for tensor in learned], copy.deepcopy(optimizer.state_dict())
        report = self._regress(rollouts, estimate)
        momenta = [value for state in optimizer.state.values() for value in state.values() if th.is_tensor(value)]
        device = before[0].device  # Adam counts its steps on the CPU
        if th.stack([th.isfinite(tensor).all().to(device) for tensor in [*learned, *momenta]]).all():
            return report
        with th.no_grad():
            for tensor, value in zip(learned, before, strict=True):
                tensor.copy_(value)
        optimizer.load_state_dict(optimizer_before)
        return CriticReport(math.nan, math.nan)

    def _regress(self, rollouts: ImaginedRollouts, estimate: AdvantageEstimate) -> CriticReport:
        inputs, targets, values = rollouts.policy_input, estimate.returns, estimate.values
        # Without terminations, all rows, without a copy
        chosen = slice(None) if rollouts.alive.all() else rollouts.alive.flatten()
        inputs, targets, values = inputs.flatten(0, 2)[chosen], targets.flatten()[chosen], values.flatten()[chosen]
        value_net, optimizer = self.policy.value_net, self.policy.optimizer
        unexplained = (targets - values).std(correction=0)
        spread, mean = th.std_mean(targets, correction=0)
        std = spread + MIN_RELATIVE_SPREAD * mean.abs()
        value_net.rescale(mean, std + (MIN_RELATIVE_SPREAD * std).clamp(th.finfo(std.dtype).tiny, 1e-8))

        loss = targets.new_zeros(())
        parameters = list(self.policy.critic_parameters().values())
        shape = (self.n_updates, min(self.batch_size, len(targets)))
        for rows in th.randint(len(targets), shape, generator=self.generator, device=targets.device):
            loss, *gradients = self._gradient(parameters, inputs[rows], targets[rows])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        # Squares of large numbers overflow single precision, but not Python's floats
        explained = 1 - (float(unexplained) / float(spread)) ** 2 if spread > 0 else math.nan
        return CriticReport(float(loss) * float(value_net.std) ** 2, explained)

    def _gradient(self, parameters: Sequence[nn.Parameter], inputs: th.Tensor, targets: th.Tensor) -> list[th.Tensor]:
        """
        Compute the mean squared error of a minibatch, in units of the targets' spread, and its gradient.

        :param parameters: the critic's parameters
        :param inputs: standardised observations (B, O)
        :param targets: lambda-returns (B,)
        :return: the loss, followed by the gradient of each parameter; the same in all processes, however many there are
        """
        std = self.policy.value_net.std

        def of_chunk(rows: slice) -> th.Tensor:
            error = self.policy.values(inputs[rows]) / std - targets[rows] / std
            loss = error.square().sum() / len(targets)
            gradients = th.autograd.grad(loss, parameters)
            return th.cat([loss.detach().view(1), *(gradient.flatten() for gradient in gradients)])

        # GPUs are parallel themselves
        n_chunks = -(-len(targets) // CHUNK_ROWS) if targets.device.type == "cpu" else 1
        chunks = even_shares(len(targets), n_chunks)
        shares, world = even_shares(n_chunks, self.world.size), self.world
        if n_chunks < world.size:  # too few for all: each process computes the others' too
            shares, world = [slice(0, n_chunks)], ALONE
        parts = in_parallel([partial(of_chunk, rows) for rows in chunks[shares[world.rank]]], self.n_threads)
        total = world.gather(th.stack(parts), [share.stop - share.start for share in shares]).sum(0)
        pieces = total.split([1, *(parameter.numel() for parameter in parameters)])
        return [pieces[0], *(piece.view_as(parameter) for piece, parameter in zip(pieces[1:], parameters, strict=True))]
