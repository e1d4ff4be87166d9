"""The critic of the meta-policy: the value network of SB3's policy, trained on lambda-returns of imagined rollouts."""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch as th
import torch.nn.functional as F

from sb3_mbmpo.imagination.rollouts import ImaginedRollouts
from sb3_mbmpo.meta.advantages import AdvantageEstimate
from sb3_mbmpo.policies import MetaPolicy

# Targets whose relative spread is below this count as constant: dividing by the spread would amplify rounding errors
MIN_RELATIVE_SPREAD = 1e-4


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
    """

    policy: MetaPolicy
    generator: th.Generator
    n_updates: int
    batch_size: int

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
        shape = (self.n_updates, min(self.batch_size, len(targets)))
        rows = th.randint(len(targets), shape, generator=self.generator, device=targets.device)
        parameters = list(self.policy.critic_parameters().values())
        for batch, target in zip(inputs[rows], targets[rows] / value_net.std, strict=True):
            with th.enable_grad():
                loss = F.mse_loss(self.policy.values(batch) / value_net.std, target)
                gradients = th.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        # Squares of large numbers overflow single precision, but not Python's floats
        explained = 1 - (float(unexplained) / float(spread)) ** 2 if spread > 0 else math.nan
        return CriticReport(float(loss.detach()) * float(value_net.std) ** 2, explained)
