"""The actor as a function of explicit parameters, for many parameter sets at once. The functions can be pickled.

Legend of shapes: ``T`` parameter sets (tasks), ``B`` rows, ``O`` observation size, ``A`` action size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch as th
from gymnasium import spaces
from torch import nn
from torch.func import functional_call, vmap

from sb3_mbmpo.common.distributions import ActionDistribution, make_distribution

# Weight (T, in, out) and bias (T, 1, out), or an activation function
Layer = tuple[th.Tensor, th.Tensor] | Callable[[th.Tensor], th.Tensor]


@dataclass(frozen=True)
class StackedActor:
    """
    The policies of all tasks.

    :param action_space: determines the family of distributions
    :param network: standardised observations (T, B, O) -> means or logits (T, B, .)
    :param log_std: (T, 1, A) for a Box space, else None
    """

    action_space: spaces.Space[Any]
    network: Callable[[th.Tensor], th.Tensor]
    log_std: th.Tensor | None

    def __call__(self, policy_input: th.Tensor) -> ActionDistribution:
        """
        Evaluate the policies.

        :param policy_input: standardised observations (T, B, O)
        :return: one distribution for each of the ``T x B`` rows
        """
        return make_distribution(self.action_space, self.network(policy_input), self.log_std)


@dataclass(frozen=True)
class StackedLayers:
    """
    Linear layers and activation functions in sequence; one batched matmul per layer serves all tasks.

    :param layers: as ``of`` makes them
    """

    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> "StackedLayers":
        """
        Combine layers, and replace tanh by a faster function.

        tanh(x) = 2 sigmoid(2 x) - 1, and on CPUs PyTorch's sigmoid takes a third of the time. The scales and the shift are
        folded into the weights.

        :param layers: in order of evaluation
        """

        def is_replaced(i: int) -> bool:
            between = 0 < i < len(layers) - 1 and isinstance(layers[i - 1], tuple) and isinstance(layers[i + 1], tuple)
            return between and isinstance(layers[i], nn.Tanh)

        faster: list[Layer] = []
        for i, layer in enumerate(layers):
            if isinstance(layer, tuple):
                weight, bias = layer
                if is_replaced(i - 1):
                    weight, bias = 2 * weight, bias - weight.sum(1, keepdim=True)
                if is_replaced(i + 1):
                    weight, bias = 2 * weight, 2 * bias
                faster.append((weight, bias))
            else:
                faster.append(th.sigmoid if is_replaced(i) else layer)
        return cls(tuple(faster))

    def __call__(self, inputs: th.Tensor) -> th.Tensor:
        """Evaluate the layers, (T, B, in) -> (T, B, out)."""
        hidden = inputs
        for layer in self.layers:
            hidden = th.baddbmm(layer[1], hidden, layer[0]) if isinstance(layer, tuple) else layer(hidden)
        return hidden


@dataclass(frozen=True)
class StackedModule:
    """
    Any architecture that SB3 can build, evaluated by vmap, which is slower than ``StackedLayers``.

    :param module: standardised observations (B, O) -> (B, out)
    :param parameters: its parameters by name, one set per task (T, ...)
    """

    module: nn.Module
    parameters: dict[str, th.Tensor]

    def __call__(self, inputs: th.Tensor) -> th.Tensor:
        """Evaluate the module with each task's parameters, (T, B, O) -> (T, B, out)."""
        outputs: th.Tensor = vmap(partial(_with_parameters, self.module))(self.parameters, inputs)
        return outputs


def _with_parameters(module: nn.Module, parameters: dict[str, th.Tensor], inputs: th.Tensor) -> th.Tensor:
    # SB3 shares one features extractor under several names: with tied weights, the tensors would stay in the module
    result: th.Tensor = functional_call(module, parameters, (inputs,), tie_weights=False)
    return result


def is_plain(network: nn.Sequential) -> bool:
    """Tell whether only the network's linear layers have parameters."""
    return all(isinstance(module, nn.Linear) or not list(module.parameters()) for module in network)
