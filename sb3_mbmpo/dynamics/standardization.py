"""Standardisation of the training data, and its inverse, which is folded into the weights.

Legend of shapes: ``M`` members, ``B`` rows, ``O`` observation size, ``A`` width of the encoded action, ``D`` targets: the
changes of the observation, and the reward if it is learned.
"""

from collections.abc import Sequence

import torch as th

from sb3_mbmpo.common.finite import mean_tail, resolution
from sb3_mbmpo.dynamics.networks import Layer, cast
from sb3_mbmpo.dynamics.types import Transitions


def standardize(
    data: Transitions, action: th.Tensor, *, learned_reward: bool
) -> tuple[dict[str, th.Tensor], dict[str, th.Tensor]]:
    """
    Scale every column of the data to mean 0 and standard deviation 1.

    :param data: transitions in raw units
    :param action: their encoded actions (B, A)
    :param learned_reward: whether the reward is a target
    :return: "observation" (B, O), "action" (B, A) and "target" (B, D), standardised, float32; and the statistics, under the
        names of ``DynamicsEnsemble``'s buffers
    :raises ValueError: if the data is empty or not finite
    """
    if len(data.obs) == 0:
        raise ValueError("There are no transitions to fit the dynamics ensemble to.")
    # float64: in float32, the spread of a column with a large mean would be lost
    obs, next_obs, reward = (x.to(th.float64) for x in (data.obs, data.next_obs, data.reward))
    target = th.cat([next_obs - obs, reward.unsqueeze(1)], dim=1) if learned_reward else next_obs - obs
    columns = {"observation": obs, "action": action.double(), "target": target}
    for name, value in columns.items():
        if not th.isfinite(value.float()).all():  # in single precision, numbers beyond 3.4e38 are infinite
            raise ValueError(f"The transitions contain a {name} that is NaN or infinite: the dynamics cannot be fitted.")
    rounding = resolution(th.cat([data.obs, data.next_obs]))
    floors = {"observation": rounding, "action": resolution(action.float()), "target": rounding}
    if learned_reward:
        floors["target"] = th.cat([rounding, resolution(data.reward.unsqueeze(1))])
    standardised, statistics = {}, {}
    tails = th.zeros(3, obs.shape[1], device=obs.device)
    for name, value in columns.items():
        # Rounded like the buffers, so that the imagination inverts exactly the scaling of the fit
        exact_mean, std = value.mean(0), value.std(0, correction=0).float()
        mean = exact_mean.float()
        # A constant input is left unscaled: dividing by its tiny spread would only amplify rounding. A constant target is
        # predicted exactly: an error at unit scale would let, say, a fixed goal drift.
        constant = std <= floors[name].to(std.device)
        if name == "observation" and data.obs.dtype == th.float64:
            tails[0] = mean_tail(exact_mean, std).masked_fill(constant, 0)
            value = value - tails[0]
        statistics[f"{name}_mean"] = mean
        statistics[f"{name}_std"] = std.masked_fill(constant, 0 if name == "target" else 1)
        standardised[name] = ((value - mean) / std.masked_fill(constant, 1)).float()
    both = th.cat([obs, next_obs])
    low, high = both.amin(0), both.amax(0)
    tails[1:] = th.stack([low - low.float(), high - high.float()])
    statistics |= {"observation_low": low.float(), "observation_high": high.float(), "observation_tails": tails}
    return standardised, statistics


def folded(
    layers: Sequence[Layer],
    *,
    input_std: th.Tensor,
    action_mean: th.Tensor,
    target_mean: th.Tensor,
    target_std: th.Tensor,
) -> list[Layer]:
    """
    Fold the standardisation into the weights.

    :param layers: from standardised inputs to standardised targets
    :param input_std: standard deviations of observations and actions (O + A,)
    :param action_mean: (A,)
    :param target_mean: (D,)
    :param target_std: (D,)
    :return: layers from raw, centred observations and raw actions to raw targets; further outputs are unchanged
    """
    layers = [(weight.double(), bias.double()) for weight, bias in layers]
    weight, bias = layers[0]
    weight = weight / input_std.double().unsqueeze(1)
    n_observations = len(input_std) - len(action_mean)
    layers[0] = weight, bias - (action_mean.double() @ weight[:, n_observations:]).unsqueeze(1)
    weight, bias = layers[-1]
    scale, shift = th.ones_like(bias[0, 0]), th.zeros_like(bias[0, 0])
    scale[: len(target_std)], shift[: len(target_mean)] = target_std, target_mean
    layers[-1] = weight * scale, bias * scale + shift
    return cast(layers, th.float32)
