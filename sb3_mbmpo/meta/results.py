"""What meta-training returns: adaptations, meta-steps and the metrics of an iteration.

Legend of shapes: ``T`` tasks, ``P`` parameters.
"""

from statistics import fmean
from typing import NamedTuple

import torch as th

from sb3_mbmpo.imagination.rollouts import ImaginedRollouts, Outcome
from sb3_mbmpo.meta.adaptation import TaskBatch
from sb3_mbmpo.meta.critic import CriticReport
from sb3_mbmpo.meta.outer_step import StepReport
from sb3_mbmpo.meta.problem import MetaParameters


class Adaptation(NamedTuple):
    """
    The meta-policy adapted to every task.

    :param parameters: theta'_k (T, P)
    :param batches: data of each inner step
    :param rollouts: imagined with the meta-policy, before the first inner step
    :param failed: tasks whose parameters or actions would not have been finite; they kept their parameters (T,) bool
    :param critic: metrics of the critic's fit to ``rollouts``; None if it was not trained
    """

    parameters: th.Tensor
    batches: tuple[TaskBatch, ...]
    rollouts: ImaginedRollouts
    failed: th.Tensor
    critic: CriticReport | None = None


class MetaStep(NamedTuple):
    """
    The result of one meta-step.

    :param meta: the new meta-parameters
    :param pre: what the meta-policy imagined
    :param post: what the adapted policies imagined
    :param report: metrics of the outer step
    :param critic: metrics of the critic's fit; None without a critic
    """

    meta: MetaParameters
    pre: Outcome
    post: Outcome
    report: StepReport
    critic: CriticReport | None = None


class MetaTraining(NamedTuple):
    """
    The result of one iteration's meta-training.

    :param meta: the new meta-parameters
    :param adapted: their adaptation to every task (T, P)
    :param failed: tasks whose parameters or actions would not have been finite; they kept their parameters (T,) bool
    :param outcome: what the meta-policy imagined
    :param steps: metrics of the meta-steps that were adopted
    :param critic: metrics of the critic's fit in each of them; empty without a critic
    :param inner_kl: mean KL from the meta-policy to the adapted policies in nats, at the meta-policy's imagined steps
    :param last_post: what the adapted policies imagined in the last meta-step; None without meta-steps
    """

    meta: MetaParameters
    adapted: th.Tensor
    failed: th.Tensor
    outcome: Outcome
    steps: tuple[StepReport, ...]
    critic: tuple[CriticReport, ...]
    inner_kl: float
    last_post: Outcome | None

    def explained_variance(self) -> float:
        """Return the share of the imagined returns' variance that the critic explained; 0 if it was not trained."""
        return fmean(report.explained_variance for report in self.critic) if self.critic else 0.0

    def metrics(self) -> dict[str, float]:
        """Return the metrics for the logger, by key."""
        found = {
            "imagined/ep_rew_mean": float(self.outcome.returns().mean()),
            "imagined/ep_len_mean": float(self.outcome.lengths().float().mean()),
            "imagined/rew_mean_step": float(self.outcome.rewards.sum() / self.outcome.alive.sum()),
            "imagined/penalty_mean_step": float(self.outcome.penalties.sum() / self.outcome.alive.sum()),
            "train/inner_kl": self.inner_kl,
        }
        if self.last_post is not None:
            found |= {
                "imagined/ep_rew_mean_adapted": float(self.last_post.returns().mean()),
                "train/policy_objective": fmean(report.objective_gain for report in self.steps),
                "train/kl_divergence": fmean(report.kl_divergence for report in self.steps),
                "train/is_line_search_success": fmean(report.accepted for report in self.steps),
                "train/line_search_steps": fmean(report.line_search_steps for report in self.steps),
            }
        if self.critic:
            found |= {
                "train/value_loss": fmean(report.value_loss for report in self.critic),
                "train/explained_variance": self.explained_variance(),
            }
        return found
