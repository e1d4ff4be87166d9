"""Limits of floating-point numbers. NaN and infinite numbers are caught where they arise, before they spread everywhere.

Legend of shapes: ``B`` rows, ``O`` observation size, ``A`` action size.
"""

import numpy as np
import numpy.typing as npt
import torch as th


def check_rewards(source: str, reward: th.Tensor, *, obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> None:
    """
    Reject rewards that are not finite.

    :param source: name of the reward function in the message
    :param reward: (B,)
    :param obs: raw (B, O)
    :param action: as the reward function got it (B, ...)
    :param next_obs: raw (B, O)
    :raises ValueError: if a reward is NaN or infinite; the message shows the first such transition
    """
    finite = th.isfinite(reward)
    if finite.all():
        return
    row = int((~finite).int().argmax())
    check_observations(obs, next_obs)
    raise ValueError(
        f"{source} gave the reward {float(reward[row])} for obs {_shown(obs[row])}, action {_shown(action[row])}, next_obs "
        f"{_shown(next_obs[row])}. Learned models also imagine states that never occur: make it a finite number everywhere "
        "(clamp the argument of a root, a logarithm or a division), or pass `reward_fn='learned'`."
    )


def check_observations(obs: th.Tensor, next_obs: th.Tensor) -> None:
    """
    Reject imagined observations that are not finite.

    :param obs: raw, imagined (..., O)
    :param next_obs: the imagined next observations (..., O)
    :raises ValueError: if an observation is NaN or infinite
    """
    bad = (~(th.isfinite(obs) & th.isfinite(next_obs)).all(-1)).flatten()
    if bad.any():
        row = int(bad.int().argmax())
        before, after = (_shown(x.reshape(-1, x.shape[-1])[row]) for x in (obs, next_obs))
        raise ValueError(
            f"The learned models imagined an observation that is NaN or infinite: {after} after {before}. Keep imagined "
            "observations near the data (`dynamics_kwargs['clip_margin']`), or lower the `learning_rate`."
        )


def check_policy_output(obs: th.Tensor, output: th.Tensor) -> None:
    """
    Reject a policy's output that is NaN or infinite although the observation is finite.

    :param obs: raw (..., O)
    :param output: means of actions, or their logits (..., A)
    :raises ValueError: if one is NaN or infinite; the message shows its observation
    """
    bad = (th.isfinite(obs).all(-1) & ~th.isfinite(output).all(-1)).flatten()
    if bad.any():
        row = int(bad.int().argmax())
        raise ValueError(
            f"A policy has no finite action for the imagined observation {_shown(obs.reshape(-1, obs.shape[-1])[row])}: lower "
            "`inner_lr`, or, if the policy has a features extractor of your own, make it finite everywhere (clamp the "
            "argument of a root, a logarithm or a division)."
        )


def _shown(values: th.Tensor) -> str:
    return np.array2string(values.detach().cpu().numpy(), precision=6, threshold=20)


def in_float32(values: np.ndarray, stored_as: npt.DTypeLike = np.float32) -> np.ndarray:
    """
    Tell which numbers are finite in single precision, in which the models are fitted, and as they are stored.

    :param values: numbers of any shape
    :param stored_as: the dtype that they are stored in, which may be half precision
    :return: bool, of the same shape
    """
    values = np.asarray(values)
    with np.errstate(over="ignore", invalid="ignore"):
        finite: np.ndarray = np.isfinite(values.astype(np.float32)) & np.isfinite(values.astype(stored_as))
    return finite


# If the mean is more than this many standard deviations, single precision loses digits that matter
LARGE_MEAN = 1e3


def mean_tail(mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Compute the part of a mean that rounding to single precision loses.

    :param mean: mean of each column (K,) float64
    :param std: standard deviation of each column (K,)
    :return: the rounding error of the mean where it matters, else 0, (K,) float64
    """
    return th.where(mean.abs() > LARGE_MEAN * std, mean - mean.float(), 0.0)


def as_floating(values: np.ndarray) -> np.ndarray:
    """Convert integers to a floating-point type that can hold them; return other numbers as they are."""
    return values.astype(np.result_type(values.dtype, np.float32), copy=False)


# Double precision holds all whole numbers up to here
LARGEST_COUNT = 2**53


def check_counts(name: str, values: np.ndarray) -> None:
    """
    Reject whole numbers that ``as_floating`` would round.

    :param name: name of the values in the message
    :param values: numbers of any shape and dtype; only integers are checked
    :raises ValueError: if one is too large
    """
    if np.issubdtype(values.dtype, np.integer) and ((values > LARGEST_COUNT) | (values < -LARGEST_COUNT)).any():
        raise ValueError(
            f"{name} has whole numbers beyond 2**53, which double precision cannot tell from their neighbours: subtract an "
            f"offset, for example in `gymnasium.wrappers.TransformObservation`. They go from {values.min()} to {values.max()}."
        )


def resolution(values: th.Tensor) -> th.Tensor:
    """
    Return the spread below which a column counts as constant, because all that varies is rounding.

    :param values: (B, K), in the dtype in which they were observed
    :return: (K,) float64, 0 for a column of zeros
    """
    dtype = values.dtype if values.is_floating_point() else th.float64
    # Single precision: one row in 10,000 may be the next representable number. Double precision also shows the simulator's
    # rounding, which affects many of the last digits
    digits = 2.0**10 if dtype == th.float64 else 0.01
    return digits * th.finfo(dtype).eps * values.abs().amax(0).double()
