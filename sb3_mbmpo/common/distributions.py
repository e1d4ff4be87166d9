"""Action distributions as values: immutable bundles of tensors, for many policies at once.

SB3's distribution objects are mutable (two calls of ``get_distribution`` return the same object, so the KL divergence between
them is 0), cannot be stacked over tasks, and sample from the global random generator. The classes here hold tensors only.

Legend of shapes: ``T`` tasks, ``B`` rows per task, ``A`` action size, ``K`` number of discrete choices.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch as th
import torch.nn.functional as F
from gymnasium import spaces


class ActionDistribution(ABC):
    """One distribution over actions for each of ``T x B`` rows."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[th.Tensor, ...]:
        """The tensors that define the distribution."""

    @abstractmethod
    def with_parameters(self, parameters: tuple[th.Tensor, ...]) -> "ActionDistribution":
        """Return a distribution of the same family with other parameters."""

    @abstractmethod
    def sample(self, generator: th.Generator | None = None) -> th.Tensor:
        """Draw one action per row, (T, B, A) float or (T, B, K) long."""

    @abstractmethod
    def sample_from(self, noise: th.Tensor) -> th.Tensor:
        """
        Turn random numbers into one action per row.

        :param noise: made by ``action_noise`` (T, B, width)
        :return: shaped like a sample; discrete choices are -1 where a probability is NaN
        """

    @abstractmethod
    def mode(self) -> th.Tensor:
        """Return the most likely action of each row, shaped like a sample."""

    @abstractmethod
    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """
        Evaluate the log-likelihood of actions.

        :param actions: shaped like a sample
        :return: log-likelihood (T, B)
        """

    @abstractmethod
    def entropy(self) -> th.Tensor:
        """Return the entropy in nats (T, B)."""

    @abstractmethod
    def kl_divergence(self, other: "ActionDistribution") -> th.Tensor:
        """
        Compute the KL divergence to another distribution.

        :param other: a distribution of the same family
        :return: KL(self || other) in nats (T, B)
        """

    def detach(self) -> "ActionDistribution":
        """Return the same distribution, detached from the autograd graph."""
        return self.with_parameters(tuple(parameter.detach() for parameter in self.parameters))


@dataclass(frozen=True)
class DiagGaussian(ActionDistribution):
    """
    Independent normal distributions.

    :param mean: (T, B, A)
    :param log_std: (T, 1, A), the same for all rows of a task
    """

    mean: th.Tensor
    log_std: th.Tensor

    @property
    def parameters(self) -> tuple[th.Tensor, ...]:
        return self.mean, self.log_std

    def with_parameters(self, parameters: tuple[th.Tensor, ...]) -> "DiagGaussian":
        return DiagGaussian(*parameters)

    def sample(self, generator: th.Generator | None = None) -> th.Tensor:
        return self.sample_from(th.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype))

    def sample_from(self, noise: th.Tensor) -> th.Tensor:
        return th.addcmul(self.mean, self.log_std.exp(), noise)

    def mode(self) -> th.Tensor:
        return self.mean

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        squared_error = ((actions - self.mean) * th.exp(-self.log_std)).square()
        return -0.5 * squared_error.sum(-1) - (self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> th.Tensor:
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        return entropy.expand(self.mean.shape[:-1])

    def kl_divergence(self, other: ActionDistribution) -> th.Tensor:
        assert isinstance(other, DiagGaussian)
        inverse_variance = th.exp(-2 * other.log_std)
        mean_term = ((self.mean - other.mean).square() * inverse_variance).sum(-1)
        std_term = (th.exp(2 * self.log_std) * inverse_variance - 1).sum(-1)
        return 0.5 * (mean_term + std_term) + (other.log_std - self.log_std).sum(-1)


@dataclass(frozen=True)
class Categoricals(ActionDistribution):
    """
    ``K`` independent categorical choices: Discrete (K = 1) and MultiDiscrete.

    :param logits: (T, B, sum of n_choices), unnormalised log-probabilities
    :param n_choices: how many options each of the ``K`` choices has
    """

    logits: th.Tensor
    n_choices: tuple[int, ...]

    @property
    def parameters(self) -> tuple[th.Tensor, ...]:
        return (self.logits,)

    def with_parameters(self, parameters: tuple[th.Tensor, ...]) -> "Categoricals":
        return Categoricals(parameters[0], self.n_choices)

    def _log_probs(self) -> list[th.Tensor]:
        """Return the normalised log-probabilities of each choice, (T, B, n_choices[k])."""
        return [F.log_softmax(logits, dim=-1) for logits in self.logits.split(self.n_choices, dim=-1)]

    def sample(self, generator: th.Generator | None = None) -> th.Tensor:
        choices = []
        for log_probs in self._log_probs():
            probabilities = log_probs.exp().flatten(0, -2)
            choice = th.multinomial(probabilities, 1, generator=generator)
            choices.append(choice.reshape(log_probs.shape[:-1]))
        return th.stack(choices, dim=-1)

    def sample_from(self, noise: th.Tensor) -> th.Tensor:
        choices = []
        for logits, waits in zip(self.logits.split(self.n_choices, -1), noise.split(self.n_choices, -1), strict=True):
            # Of independent exponential waiting times with these rates, the shortest decides; a rate of 0 never does
            rate, choice = (F.softmax(logits, dim=-1) / waits).max(-1)
            choices.append(choice.masked_fill(rate.isnan(), -1))
        return th.stack(choices, dim=-1)

    def mode(self) -> th.Tensor:
        return th.stack([log_probs.argmax(-1) for log_probs in self._log_probs()], dim=-1)

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        terms = [
            log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
            for log_probs, action in zip(self._log_probs(), actions.unbind(-1), strict=True)
        ]
        return th.stack(terms).sum(0)

    def entropy(self) -> th.Tensor:
        return th.stack([-(log_probs.exp() * log_probs).sum(-1) for log_probs in self._log_probs()]).sum(0)

    def kl_divergence(self, other: ActionDistribution) -> th.Tensor:
        assert isinstance(other, Categoricals)
        pairs = zip(self._log_probs(), other._log_probs(), strict=True)
        return th.stack([(ours.exp() * (ours - theirs)).sum(-1) for ours, theirs in pairs]).sum(0)


@dataclass(frozen=True)
class Bernoullis(ActionDistribution):
    """
    ``K`` independent binary choices: MultiBinary.

    :param logits: (T, B, K), log-odds of a 1
    """

    logits: th.Tensor

    @property
    def parameters(self) -> tuple[th.Tensor, ...]:
        return (self.logits,)

    def with_parameters(self, parameters: tuple[th.Tensor, ...]) -> "Bernoullis":
        return Bernoullis(*parameters)

    def sample(self, generator: th.Generator | None = None) -> th.Tensor:
        return th.bernoulli(th.sigmoid(self.logits), generator=generator).long()

    def sample_from(self, noise: th.Tensor) -> th.Tensor:
        return (noise < th.sigmoid(self.logits)).long().masked_fill(self.logits.isnan(), -1)

    def mode(self) -> th.Tensor:
        return (self.logits > 0).long()

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        return F.logsigmoid(th.where(actions > 0, self.logits, -self.logits)).sum(-1)

    def entropy(self) -> th.Tensor:
        probability = th.sigmoid(self.logits)
        return -(probability * F.logsigmoid(self.logits) + (1 - probability) * F.logsigmoid(-self.logits)).sum(-1)

    def kl_divergence(self, other: ActionDistribution) -> th.Tensor:
        assert isinstance(other, Bernoullis)
        probability = th.sigmoid(self.logits)
        ones = probability * (F.logsigmoid(self.logits) - F.logsigmoid(other.logits))
        zeros = (1 - probability) * (F.logsigmoid(-self.logits) - F.logsigmoid(-other.logits))
        return (ones + zeros).sum(-1)


def action_noise(
    action_space: spaces.Space[Any], shape: tuple[int, ...], generator: th.Generator, dtype: th.dtype
) -> th.Tensor:
    """
    Draw the random numbers from which ``sample_from`` makes actions.

    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary
    :param shape: number of actions
    :param generator: draws the numbers, on its device
    :param dtype: that of the policies
    :return: (``*shape``, width) standard normal, exponential or uniform numbers; the width is that of the actor's output
    """
    noise = th.empty((*shape, spaces.flatdim(action_space)), device=generator.device, dtype=dtype)
    if isinstance(action_space, spaces.Box):
        return noise.normal_(generator=generator)
    if isinstance(action_space, spaces.MultiBinary):
        return noise.uniform_(generator=generator)
    return noise.exponential_(generator=generator).clamp_(min=th.finfo(dtype).tiny)


def make_distribution(action_space: spaces.Space[Any], output: th.Tensor, log_std: th.Tensor | None) -> ActionDistribution:
    """
    Make the distribution that SB3's ``make_proba_distribution`` would choose.

    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary
    :param output: the actor's output (T, B, size): means, or logits
    :param log_std: (T, 1, A) for Box, else None
    :return: one distribution for each of the ``T x B`` rows
    """
    if isinstance(action_space, spaces.Box):
        assert log_std is not None
        return DiagGaussian(output, log_std)
    if isinstance(action_space, spaces.Discrete):
        return Categoricals(output, (int(action_space.n),))
    if isinstance(action_space, spaces.MultiDiscrete):
        return Categoricals(output, tuple(int(n) for n in action_space.nvec))
    assert isinstance(action_space, spaces.MultiBinary)
    return Bernoullis(output)
