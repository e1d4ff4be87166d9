"""The learned environment as functions of tensors, which training, ``ModelVecEnv`` and the report all use.

Legend of shapes: ``M`` models, ``B`` rows, ``O`` observation size, ``A`` action size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_mbmpo.common.actions import ActionCodec
from sb3_mbmpo.common.finite import check_rewards
from sb3_mbmpo.dynamics import DisagreementPenalty, DynamicsEnsemble, StepFn, perturbed_step_fn
from sb3_mbmpo.rewards.functions import RewardFn, TerminationFn, never_terminates


class ModelEnv(NamedTuple):
    """
    Models, reward and termination of the learned environment, with the weights at construction.

    :param step: (obs (M, B, O), encoded action (M, B, A)[, noise (M, B, noise_dim)]) -> Prediction
    :param reward_fn: (obs (B, O), action (B, A), next_obs (B, O)) -> (B,); None: the models predict the reward
    :param termination_fn: next_obs (B, O) -> (B,) bool; None: the models predict termination, or rollouts never terminate
    :param codec: converts actions
    :param n_models: ``M``
    :param flops: floating-point operations of a step for one row, from which the number of threads follows
    :param device: where the models are
    :param noise_dim: how many standard normal numbers a step takes for one row
    :param penalty: (obs (B, O), encoded action (B, A)) -> (B,), which training subtracts from the rewards; None: nothing
    """

    step: StepFn
    reward_fn: RewardFn | None
    termination_fn: TerminationFn | None
    codec: ActionCodec
    n_models: int
    flops: int
    device: th.device
    noise_dim: int = 0
    penalty: DisagreementPenalty | None = None

    @classmethod
    def of(
        cls,
        dynamics: DynamicsEnsemble,
        *,
        reward_fn: RewardFn | None,
        termination_fn: TerminationFn | None,
        clip_margin: float | None,
        generator: th.Generator | None = None,
        members: Sequence[int] | None = None,
        output_bias: np.ndarray | None = None,
        output_noise: float = 0.0,
        penalty: DisagreementPenalty | None = None,
    ) -> "ModelEnv":
        """
        Build the environment from an ensemble.

        :param dynamics: the ensemble
        :param reward_fn: the reward function; None: the ensemble's reward head
        :param termination_fn: the termination function; None: the ensemble's termination head, or rollouts never terminate if
            it has none
        :param clip_margin: see ``DynamicsEnsemble.step_fn``
        :param generator: draws the noise of the models where ``step`` is given none; None: the means of probabilistic members
        :param members: the members that are the ``M`` models; None: all
        :param output_bias: deliberate error of each member of the ensemble (n_models, O), see ``perturbed_step_fn``
        :param output_noise: deliberate noise, see ``perturbed_step_fn``
        :param penalty: see above
        """
        step = perturbed_step_fn(
            dynamics,
            generator,
            clip_margin=clip_margin,
            members=members,
            output_bias=np.zeros((dynamics.n_models, dynamics.observation_dim)) if output_bias is None else output_bias,
            output_noise=output_noise,
        )
        return cls(
            step=step,
            reward_fn=reward_fn,
            termination_fn=termination_fn,
            codec=dynamics.codec,
            n_models=dynamics.n_models if members is None else len(members),
            flops=dynamics.flops,
            device=dynamics.device,
            noise_dim=step.noise_dim,
            penalty=penalty,
        )

    def reward(self, obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor, predicted: th.Tensor | None) -> th.Tensor:
        """
        Evaluate the reward function, or return the models' prediction.

        :param obs: raw (B, O)
        :param action: in the environment's units (B, A), or (B, K) long
        :param next_obs: raw (B, O)
        :param predicted: by the models' reward head (B,); None if they have none
        :return: (B,)
        """
        if self.reward_fn is not None:
            return self.reward_fn(obs, self.codec.to_reward(action), next_obs)
        assert predicted is not None
        return predicted

    def check_rewards(self, rewards: th.Tensor, *, obs: th.Tensor, action: th.Tensor, next_obs: th.Tensor) -> None:
        """
        Reject rewards that are not finite. The other parameters are those of ``reward``.

        :param rewards: (B,)
        :raises ValueError: if a reward is NaN or infinite; the message shows the transition
        """
        source = "The reward head of the models" if self.reward_fn is None else "`reward_fn`"
        check_rewards(source, rewards, obs=obs, action=self.codec.to_reward(action), next_obs=next_obs)

    def terminated(self, next_obs: th.Tensor, logit: th.Tensor | None) -> th.Tensor | None:
        """
        Tell which rows terminate.

        :param next_obs: raw (B, O)
        :param logit: logit of the models' termination head (B,); None if they have none
        :return: (B,) bool; None: rollouts never terminate
        """
        if self.termination_fn is never_terminates:
            return None
        if self.termination_fn is not None:
            return self.termination_fn(next_obs)
        return None if logit is None else logit > 0
