"""Imagined rollouts: the policies of all tasks act in the learned models, step by step, in tensors. The hot loop.

Knows neither SB3 nor the environment: it receives callables and tensors.

Legend of shapes: ``M`` models, ``T`` tasks, ``N`` rollouts a task, ``H`` horizon, ``O`` observation size, ``A`` action size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_mbmpo.actions import ActionCodec
from sb3_mbmpo.distributions import ActionDistribution
from sb3_mbmpo.dynamics import Prediction

# Policy input (T, B, O) -> distribution of each row
Act = Callable[[th.Tensor], ActionDistribution]
# How often the loop looks whether anything is still alive: a look costs a synchronisation on GPUs
ALIVE_CHECK_INTERVAL = 10


class World(NamedTuple):
    """
    Everything the imagination needs to know of the learned environment.

    :param step: (obs (M, B, O), encoded action (M, B, A)) -> Prediction
    :param reward_fn: (obs (B, O), action (B, A), next_obs (B, O)) -> (B,); None: ``step`` predicts the reward
    :param termination_fn: next_obs (B, O) -> (B,) bool; None: nothing ends, unless ``step`` predicts termination
    :param codec: translates the policies' actions
    :param to_policy_input: raw observations (..., O) -> what the policies' networks see
    :param n_models: how many models ``step`` holds
    """

    step: Callable[[th.Tensor, th.Tensor], Prediction]
    reward_fn: Callable[[th.Tensor, th.Tensor, th.Tensor], th.Tensor] | None
    termination_fn: Callable[[th.Tensor], th.Tensor] | None
    codec: ActionCodec
    to_policy_input: Callable[[th.Tensor], th.Tensor]
    n_models: int


class ImaginedRollouts(NamedTuple):
    """
    Imagined rollouts of all tasks. Time comes after the task, so that the rows of a task are one block of memory.

    :param policy_input: (T, H, N, O), standardised observations as the policies saw them
    :param actions: (T, H, N, A) unclipped samples, or (T, H, N, K) long
    :param rewards: (T, H, N)
    :param alive: (T, H, N) bool, False for steps after the rollout's termination: they never count
    :param terminated: (T, H, N) bool, the step ended its rollout for good
    """

    policy_input: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    alive: th.Tensor
    terminated: th.Tensor

    def returns(self) -> th.Tensor:
        """:return: undiscounted return of each rollout (T, N)"""
        return (self.rewards * self.alive).sum(1)

    def lengths(self) -> th.Tensor:
        """:return: steps until termination or horizon (T, N)"""
        return self.alive.sum(1)


@th.no_grad()
def imagine(
    world: World,
    act: Act,
    start_obs: th.Tensor,
    horizon: int,
    generator: th.Generator,
    deterministic: bool = False,
) -> ImaginedRollouts:
    """
    Let each task's policy act in the task's model. Task ``i`` uses model ``i // (T / M)``.

    :param world: models, reward, termination, translations
    :param act: the policies of the ``T`` tasks
    :param start_obs: raw first observations (T, N, O)
    :param horizon: steps at most; fewer are returned when every rollout has terminated
    :param generator: samples the actions
    :param deterministic: take each distribution's mode instead
    :raises ValueError: if the tasks cannot be shared out evenly among the models
    """
    n_tasks, n_rollouts, observation_dim = start_obs.shape
    if n_tasks % world.n_models != 0:
        raise ValueError(f"{n_tasks} tasks cannot be shared out evenly among {world.n_models} models.")
    rows = n_tasks * n_rollouts
    per_model = (world.n_models, rows // world.n_models, -1)

    def history(*trailing: int, dtype: th.dtype = th.float32) -> th.Tensor:
        return th.empty((n_tasks, horizon, n_rollouts, *trailing), dtype=dtype, device=start_obs.device)

    policy_inputs, observations, next_observations = (history(observation_dim) for _ in range(3))
    alive, terminated = (history(dtype=th.bool) for _ in range(2))
    rewards = history()
    actions = env_actions = None

    obs = start_obs
    still_alive = th.ones((n_tasks, n_rollouts), dtype=th.bool, device=obs.device)
    length = horizon
    for t in range(horizon):
        policy_input = world.to_policy_input(obs)
        distribution = act(policy_input)
        action = distribution.mode() if deterministic else distribution.sample(generator)
        env_action = world.codec.to_env(action)
        encoded = world.codec.to_dynamics(env_action)
        prediction = world.step(obs.reshape(per_model), encoded.reshape(per_model))
        next_obs = prediction.next_obs.view(start_obs.shape)

        if actions is None or env_actions is None:
            actions = history(*action.shape[2:], dtype=action.dtype)
            env_actions = history(*action.shape[2:], dtype=action.dtype)
        policy_inputs[:, t], observations[:, t], next_observations[:, t] = policy_input, obs, next_obs
        actions[:, t], env_actions[:, t], alive[:, t] = action, env_action, still_alive
        if prediction.reward is not None:
            rewards[:, t] = prediction.reward.view(n_tasks, n_rollouts)

        ends = _ends(world, prediction, rows)
        if ends is None:
            terminated[:, t] = False
        else:
            ends = ends.view(n_tasks, n_rollouts)
            terminated[:, t] = ends & still_alive
            still_alive = still_alive & ~ends
            if (t + 1) % ALIVE_CHECK_INTERVAL == 0 and not still_alive.any():
                length = t + 1
                break
            # The dead stay where they are: out of the data, models go astray, and 0 * NaN is NaN in every masked mean
            next_obs = th.where(still_alive.unsqueeze(-1), next_obs, obs)
        obs = next_obs

    assert actions is not None and env_actions is not None
    # Rewards do not steer the rollout: one call for all steps is far cheaper than one a step
    if world.reward_fn is not None:
        flat_action = world.codec.to_reward(env_actions[:, :length].flatten(0, 2))
        flat_obs, flat_next_obs = (x[:, :length].flatten(0, 2) for x in (observations, next_observations))
        reward = world.reward_fn(flat_obs, flat_action, flat_next_obs)
        rewards = reward.to(rewards.dtype).view(n_tasks, length, n_rollouts)
    # What a dead rollout would have earned is meaningless, and may be NaN
    rewards = rewards[:, :length].masked_fill(~alive[:, :length], 0)
    policy_inputs, actions, alive, terminated = (
        x[:, :length].contiguous() for x in (policy_inputs, actions, alive, terminated)
    )
    return ImaginedRollouts(policy_inputs, actions, rewards, alive, terminated)


def _ends(world: World, prediction: Prediction, rows: int) -> th.Tensor | None:
    """:return: which of the rows ended with this step (rows,) bool; None if nothing ever ends"""
    if world.termination_fn is not None:
        return world.termination_fn(prediction.next_obs.view(rows, -1))
    if prediction.termination_logit is not None:
        return prediction.termination_logit.reshape(rows) > 0
    return None
