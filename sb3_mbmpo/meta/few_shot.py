"""Adaptation of the meta-policy to real episodes.

Legend of shapes: ``B`` rows, ``H`` steps, ``N`` episodes, ``O`` observation size, ``P`` actor parameters.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize
from torch.nn.utils.rnn import pad_sequence

from sb3_mbmpo.common.actions import ActionCodec
from sb3_mbmpo.common.env_reading import check_running
from sb3_mbmpo.common.finite import in_float32
from sb3_mbmpo.imagination.rollouts import Act, ImaginedRollouts
from sb3_mbmpo.meta.adaptation import TaskBatch, adapt, is_usable
from sb3_mbmpo.meta.advantages import ValueFn
from sb3_mbmpo.meta.problem import MetaParameters
from sb3_mbmpo.meta.settings import MetaSettings
from sb3_mbmpo.policies import MetaPolicy


class _Step(NamedTuple):
    policy_input: th.Tensor
    sample: th.Tensor
    reward: float
    terminated: bool


def adapt_to_episodes(
    env: VecEnv,
    policy: MetaPolicy,
    *,
    meta: MetaParameters,
    settings: MetaSettings,
    critic: ValueFn,
    n_episodes: int,
    generator: th.Generator,
) -> th.Tensor:
    """
    Adapt a policy to real episodes of an environment.

    :param env: the environment; it is reset
    :param policy: the meta-policy
    :param meta: the meta-policy's parameters, and the step size of the adaptation
    :param settings: hyperparameters, of which those of advantages and ``n_inner_steps`` are used
    :param critic: the value function of the baseline "critic"
    :param n_episodes: number of episodes, divided among the policy-gradient steps
    :param generator: samples the actions
    :return: adapted parameters (P,)
    :raises ValueError: if the adapted policy is not finite, or the environment returns a number that is not finite
    """
    parameters = meta.theta.unsqueeze(0)
    for step in range(settings.n_inner_steps):
        share = (n_episodes + step) // settings.n_inner_steps
        episodes = collect_episodes(env, policy.actor(parameters), policy, n_episodes=share, generator=generator)
        batch = TaskBatch.from_rollouts(episodes, settings.estimate(episodes, critic).advantages)
        parameters = adapt(policy.actor, parameters, [batch], meta.inner_lr)
        check_adaptation(bool(is_usable(policy.actor, parameters, batch.policy_input).all()))
    return parameters[0]


def check_env(
    env: VecEnv | None, *, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], is_normalized: bool
) -> VecEnv:
    """
    Reject an environment that does not fit the policy's training.

    :param env: the environment in which to collect episodes
    :param observation_space: that of the training environment
    :param action_space: that of the training environment
    :param is_normalized: whether VecNormalize scaled the policy's observations in training
    :return: the environment
    :raises ValueError: if it is None or closed, or has other spaces or no VecNormalize
    """
    if env is None:
        raise ValueError("There is no environment to adapt to: pass `env`, or `model_index` to adapt to a learned model.")
    check_running(env)
    check_for_correct_spaces(env, observation_space, action_space)
    if is_normalized and unwrap_vec_normalize(env) is None:
        raise ValueError(
            "The model was trained on observations scaled by VecNormalize: wrap `env` in VecNormalize too, with the "
            "statistics of the training environment (`stable_baselines3.common.vec_env.sync_envs_normalization`)."
        )
    return env


def check_adaptation(is_finite: bool) -> None:
    """
    Reject an adaptation that is not finite.

    :param is_finite: whether the adapted policy is finite
    :raises ValueError: if it is not
    """
    if not is_finite:
        raise ValueError(
            "The adapted policy is NaN or infinite: pass a lower `inner_lr` to `adapt`. Very large rewards or observations "
            "may be the cause, too."
        )


def collect_episodes(
    env: VecEnv, act: Act, policy: MetaPolicy, *, n_episodes: int, generator: th.Generator
) -> ImaginedRollouts:
    """
    Collect real episodes of one policy, in the format of imagined rollouts, from which adaptation works alike.

    As in SB3's ``evaluate_policy``, episodes are divided evenly among the environments: otherwise short ones would be
    over-represented.

    :param env: the environment. VecNormalize scales the observations, with unchanged statistics; rewards are unscaled
    :param act: standardised observations (1, B, O) -> distributions
    :param policy: standardises observations and converts actions
    :param n_episodes: number of complete episodes
    :param generator: samples the actions
    :return: one task with one rollout per episode (1, H, N, .), as long as the longest; ``alive`` is False after the end of
        shorter ones
    """
    codec = ActionCodec(policy.action_space)
    normalizer = unwrap_vec_normalize(env)
    quota = (n_episodes + np.arange(env.num_envs)) // env.num_envs
    running: list[list[_Step]] = [[] for _ in range(env.num_envs)]
    episodes: list[list[_Step]] = []
    final_inputs: list[th.Tensor] = []
    is_unknown = False
    with _frozen(normalizer):
        obs = env.reset()
        _check_numbers("observation", obs)
        while quota.any():
            # A copy: an environment may write all its observations into one array
            policy_input = policy.standardize(th.as_tensor(np.array(obs), device=policy.device))
            with th.no_grad():
                sample = act(policy_input.unsqueeze(0)).sample(generator).squeeze(0)
            obs, rewards, dones, infos = env.step(codec.to_numpy(codec.to_env(sample)))
            if normalizer is not None:
                rewards = normalizer.get_original_reward()
            _check_numbers("observation", obs)
            _check_numbers("reward", rewards)
            for i in np.flatnonzero(quota):
                terminated = bool(dones[i]) and not infos[i].get("TimeLimit.truncated", False)
                running[i].append(_Step(policy_input[i], sample[i], float(rewards[i]), terminated))
                if dones[i]:
                    final_obs = infos[i].get("terminal_observation")
                    if final_obs is None:
                        is_unknown = True
                        final_inputs.append(policy_input[i])
                    else:
                        _check_numbers("terminal observation", final_obs)
                        final_inputs.append(policy.standardize(th.as_tensor(np.asarray(final_obs), device=policy.device)))
                    episodes.append(running[i])
                    running[i] = []
                    quota[i] -= 1
    if is_unknown:
        warnings.warn(
            "The environment ended an episode without `infos[i]['terminal_observation']`: where its last step led is not "
            "known, and taken to be worth as much as the observation before."
        )
    lengths = th.tensor([len(episode) for episode in episodes], device=policy.device)
    alive = th.arange(int(lengths.max()), device=policy.device).unsqueeze(1) < lengths
    inputs, actions, rewards_, terminations = (
        [th.stack([th.as_tensor(step[k], device=policy.device) for step in episode]) for episode in episodes] for k in range(4)
    )
    # Each episode's final observation directly follows its last step, where a critic bootstraps
    padded = pad_sequence([th.cat([x, final.unsqueeze(0)]) for x, final in zip(inputs, final_inputs, strict=True)])
    return ImaginedRollouts(
        policy_input=padded[:-1].unsqueeze(0),
        actions=pad_sequence(actions).unsqueeze(0),
        rewards=pad_sequence(rewards_).unsqueeze(0),
        alive=alive.unsqueeze(0),
        terminated=pad_sequence(terminations).unsqueeze(0),
        final_input=padded[-1:].unsqueeze(0),
        penalties=th.zeros_like(alive, dtype=padded.dtype).unsqueeze(0),
    )


def _check_numbers(name: str, values: Any) -> None:
    if not in_float32(np.asarray(values)).all():
        raise ValueError(f"The environment to `adapt` to returned a NaN or infinite {name}: {values}. The model is unchanged.")


@contextmanager
def _frozen(normalizer: VecNormalize | None) -> Iterator[None]:
    """Keep the statistics of VecNormalize unchanged inside the block."""
    if normalizer is None:
        yield
        return
    was_training, normalizer.training = normalizer.training, False
    try:
        yield
    finally:
        normalizer.training = was_training
