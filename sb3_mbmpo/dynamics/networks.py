"""Networks with stacked weights as functions of their layers: one batched matmul per layer serves all members.

Legend of shapes: ``M`` members, ``B`` rows.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch as th
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "relu": th.relu,
    "swish": F.silu,
    "silu": F.silu,
    "tanh": th.tanh,
    "elu": F.elu,
    "gelu": F.gelu,
}
# In place where no gradient is needed: with another array per layer, the data would not fit into the cache
ACTIVATIONS_IN_PLACE: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    **ACTIVATIONS,
    "relu": th.relu_,
    "swish": partial(F.silu, inplace=True),
    "silu": partial(F.silu, inplace=True),
    "tanh": th.tanh_,
    "elu": partial(F.elu, inplace=True),
}
# Effective weight (M, in, out) and bias (M, 1, out)
Layer = tuple[th.Tensor, th.Tensor]
PRECISIONS = ("auto", "bfloat16", "float32")


def forward(layers: Sequence[Layer], inputs: th.Tensor, activation_fn: str) -> th.Tensor:
    """
    Evaluate networks with stacked weights.

    :param layers: weights and biases, all of one dtype, in which the matmuls are done
    :param inputs: (M, B, in)
    :param activation_fn: a key of ``ACTIVATIONS``
    :return: (M, B, out), in the dtype of the inputs
    """
    activation = (ACTIVATIONS if th.is_grad_enabled() else ACTIVATIONS_IN_PLACE)[activation_fn]
    *hidden_layers, (last_weight, last_bias) = layers
    is_mixed = inputs.dtype != last_weight.dtype  # in Python, a call that converts nothing costs as much as one that does
    hidden = inputs.to(last_weight.dtype) if is_mixed else inputs
    for layer in hidden_layers:
        hidden = activation(affine(hidden, *layer))
    output = affine(hidden, last_weight, last_bias)
    return output.to(inputs.dtype) if is_mixed else output


def affine(inputs: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """
    Return inputs x weight + bias.

    :param inputs: (M, B, in)
    :param weight: (M, in, out)
    :param bias: (M, 1, out)
    :return: (M, B, out)
    """
    if inputs.dtype == th.float32 and inputs.device.type == "cpu":
        # Faster than ``baddbmm``, which copies the bias into the result and lets the product add to it
        return th.bmm(inputs, weight).add_(bias)
    return th.baddbmm(bias, inputs, weight)


def cast(layers: Sequence[Layer], dtype: th.dtype) -> list[Layer]:
    """Return the layers in another dtype."""
    return [(weight.to(dtype), bias.to(dtype)) for weight, bias in layers]


def matmul_dtype(precision: str, device: th.device) -> th.dtype:
    """
    Return the dtype of matrix products.

    :param precision: "float32", "bfloat16", or "auto": bfloat16 where the hardware multiplies it several times faster
    :param device: where the networks are
    """
    if precision == "auto":
        if device.type == "cuda":
            is_fast = th.cuda.is_bf16_supported(including_emulation=False)
        else:
            is_fast = device.type == "cpu" and bool(th.cpu.get_capabilities().get("amx_bf16"))
        precision = "bfloat16" if is_fast else "float32"
    return th.bfloat16 if precision == "bfloat16" else th.float32


def softly_bounded(log_var: th.Tensor, lower: th.Tensor, upper: th.Tensor) -> th.Tensor:
    """Bound log-variances softly, so that gradients do not vanish outside the bounds (Chua et al. 2018, appendix A.1)."""
    log_var = upper - F.softplus(upper - log_var)
    return lower + F.softplus(log_var - lower)
