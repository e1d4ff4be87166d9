"""What floating-point numbers can hold. NaN and infinite ones are stopped where they arise: later, they are everywhere.

Legend of shapes: ``B`` rows, ``O`` observation size, ``A`` action size.
"""

import numpy as np
import torch as th


def check_rewards(source: str, reward: th.Tensor, *, obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> None:
    """
    Refuse rewards that are no finite numbers.

    :param source: what to call the function that gave the rewards
    :param reward: (B,)
    :param obs: raw (B, O)
    :param action: as the reward function got it (B, ...)
    :param next_obs: raw (B, O)
    :raises ValueError: if a reward is NaN or infinite, with the first transition for which it is
    """
    finite = th.isfinite(reward)
    if finite.all():
        return
    row = int((~finite).int().argmax())
    check_observations(obs, next_obs)
    raise ValueError(
        f"{source} gave the reward {float(reward[row])} for obs {_shown(obs[row])}, action {_shown(action[row])}, next_obs "
        f"{_shown(next_obs[row])}. Learned models also imagine what never happens: it has to be a finite number everywhere "
        "(clamp what goes into a root, a logarithm or a division), or pass `reward_fn='learned'`."
    )


def check_observations(obs: th.Tensor, next_obs: th.Tensor) -> None:
    """
    Refuse imagined observations that are no finite numbers.

    :param obs: raw, imagined (..., O)
    :param next_obs: what was imagined to follow (..., O)
    :raises ValueError: if one is NaN or infinite
    """
    bad = (~(th.isfinite(obs) & th.isfinite(next_obs)).all(-1)).flatten()
    if bad.any():
        row = int(bad.int().argmax())
        before, after = (_shown(x.reshape(-1, x.shape[-1])[row]) for x in (obs, next_obs))
        raise ValueError(
            f"The learned models imagined an observation that is NaN or infinite: {after} after {before}. Keep imagined "
            "observations near the data (`dynamics_kwargs['clip_margin']`), or lower the `learning_rate`."
        )


def _shown(values: th.Tensor) -> str:
    return np.array2string(values.detach().cpu().numpy(), precision=6, threshold=20)


def in_float32(values: np.ndarray) -> np.ndarray:
    """Tell which of the numbers are finite, and still are in single precision, in which models are fitted."""
    with np.errstate(over="ignore", invalid="ignore"):
        finite: np.ndarray = np.isfinite(values) & np.isfinite(np.asarray(values).astype(np.float32))
    return finite


# A mean of so many standard deviations costs digits of single precision that matter
LARGE_MEAN = 1e3


def mean_tail(mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Compute what single precision leaves of a mean.

    :param mean: of columns (K,) float64
    :param std: their standard deviation (K,)
    :return: what is missing if the mean is rounded to single precision, where that matters; else 0, (K,) float64
    """
    return th.where(mean.abs() > LARGE_MEAN * std, mean - mean.float(), 0.0)


def as_floating(values: np.ndarray) -> np.ndarray:
    """Return integers as floating-point numbers that hold them, others as they are."""
    return values.astype(np.result_type(values.dtype, np.float32), copy=False)


def resolution(values: th.Tensor) -> th.Tensor:
    """
    A column whose spread is below this is constant, as far as its numbers tell: what is left is rounding.

    :param values: (B, K), in the dtype in which they were observed
    :return: (K,) float64, 0 for a column of zeros
    """
    dtype = values.dtype if values.is_floating_point() else th.float64
    # Single precision: one row in 10,000 is the next number. Double precision shows the rounding of the simulator, too, which
    # is many last digits
    digits = 2.0**10 if dtype == th.float64 else 0.01
    return digits * th.finfo(dtype).eps * values.abs().amax(0).double()
