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

# Targets whose spread is this small a share of their size are constant: dividing by it would amplify rounding errors
MIN_RELATIVE_SPREAD = 1e-4


class CriticReport(NamedTuple):
    """
    How well the critic predicts.

    :param value_loss: mean squared error of the last update, in squared units of the reward
    :param explained_variance: share of the returns' variance that the values before the updates explain
    """

    value_loss: float
    explained_variance: float


@dataclass(frozen=True)
class Critic:
    """
    The value function of the meta-policy, shared by all tasks, and how it learns.

    :param policy: its value network is evaluated, and trained by its optimiser
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
        Estimate the discounted return under the meta-policy; before the first fit, whose unit nobody knows yet, as 0.

        :param policy_input: standardised observations (..., O)
        :return: values in units of the reward (...)
        """
        return self.policy.values(policy_input) * self.policy.value_net.is_trained

    def fit(self, rollouts: ImaginedRollouts, estimate: AdvantageEstimate) -> CriticReport:
        """
        Regress the value network on lambda-returns, which also become its unit of scale.

        :param rollouts: imagined under the meta-policy
        :param estimate: their values and returns
        :return: how well it predicts; NaN if it would have learned numbers that are not finite: it keeps those it has then
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
        # Without terminations, all rows as they lie
        chosen = slice(None) if rollouts.alive.all() else rollouts.alive.flatten()
        inputs, targets, values = inputs.flatten(0, 2)[chosen], targets.flatten()[chosen], values.flatten()[chosen]
        value_net, optimizer = self.policy.value_net, self.policy.optimizer
        unexplained = (targets - values).std(correction=0)
        spread, mean = th.std_mean(targets, correction=0)
        std = spread + MIN_RELATIVE_SPREAD * mean.abs()
        value_net.rescale(mean, std + (MIN_RELATIVE_SPREAD * std).clamp(th.finfo(std.dtype).tiny, 1e-8))

        loss = targets.new_zeros(())
        shape = (self.n_updates, min(self.batch_size, len(targets)))
        for rows in th.randint(len(targets), shape, generator=self.generator, device=targets.device):
            with th.enable_grad():
                loss = F.mse_loss(self.policy.values(inputs[rows]) / value_net.std, targets[rows] / value_net.std)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # Squares of large numbers fit into Python's, not into single precision
        explained = 1 - (float(unexplained) / float(spread)) ** 2 if spread > 0 else math.nan
        return CriticReport(float(loss.detach()) * float(value_net.std) ** 2, explained)
