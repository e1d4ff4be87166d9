"""The training loss of an ensemble member.

Legend of shapes: ``M`` members, ``B`` rows, ``D`` targets: the changes of the observation, and the reward if it is learned.
"""

import torch as th
import torch.nn.functional as F

from sb3_mbmpo.dynamics.networks import softly_bounded

# Weight of the distance between a probabilistic member's learned bounds, which keeps them close to its variances
BOUNDS_WEIGHT = 0.01


def member_losses(
    prediction: tuple[th.Tensor, th.Tensor | None, th.Tensor | None],
    targets: th.Tensor,
    terminated: th.Tensor,
    observation_dim: int,
    *,
    log_var_bounds: tuple[th.Tensor, th.Tensor] | None = None,
    beta: float = 0.0,
) -> th.Tensor:
    """
    Return the loss of each member's predictions of real steps.

    It is the mean squared error of the standardised changes (Clavera et al. 2018, the loss of "Model Learning"), or the
    negative Gaussian log-likelihood of probabilistic members (Chua et al. 2018); plus the same for the reward, plus the cross
    entropy of the termination.

    :param prediction: means (M, B, D), unbounded log-variances (M, B, D) of probabilistic members, logits of the termination
        (M, B) if it is learned
    :param targets: standardised (M, B, D)
    :param terminated: 1 where the step ended the episode, else 0 (M, B)
    :param observation_dim: number of targets that are changes of the observation; a further one is the reward
    :param log_var_bounds: learned bounds of the log-variances, each (M, 1, D)
    :param beta: weight each Gaussian term by its variance to this power (Seitzer et al. 2022). With 0, the likelihood itself,
        a member that takes a dimension for noise hardly learns its mean any more; with 1, means learn as from squared errors
    :return: loss of each member (M,)
    """
    mean, log_var, logit = prediction
    error = (mean - targets).square()
    if log_var is not None:
        assert log_var_bounds is not None
        lower, upper = log_var_bounds
        log_var = softly_bounded(log_var, lower, upper)
        error = (error * th.exp(-log_var) + log_var) * th.exp(beta * log_var).detach()
    loss = error[..., :observation_dim].mean((1, 2))
    if error.shape[-1] > observation_dim:
        loss = loss + error[..., -1].mean(1)
    if logit is not None:
        entropy = F.binary_cross_entropy_with_logits(logit, terminated, reduction="none")
        loss = loss + entropy.mean(1)
    if log_var_bounds is not None:
        lower, upper = log_var_bounds
        loss = loss + BOUNDS_WEIGHT * (upper - lower).sum((1, 2))
    return loss
