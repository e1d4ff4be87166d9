"""Imagined rollouts: the policies of all tasks act in the learned models, step by step, in tensors. This is the hot loop.

The functions know neither SB3 nor the environment; they receive callables and tensors.

Legend of shapes: ``M`` models, ``T`` tasks, ``N`` rollouts per task, ``H`` horizon, ``O`` observation size, ``A`` action size.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch as th

from sb3_mbmpo.common.distributions import ActionDistribution
from sb3_mbmpo.common.finite import check_answers, check_observations
from sb3_mbmpo.common.threads import even_shares, in_parallel, worthwhile_threads
from sb3_mbmpo.dynamics import StepFn
from sb3_mbmpo.imagination.model_env import ModelEnv

# Raw observations (..., O) -> input of the policies' networks (..., O)
ToPolicyInput = Callable[[th.Tensor], th.Tensor]
# Policy input (T, B, O) -> distribution of each row
Act = Callable[[th.Tensor], ActionDistribution]
# Check for living rollouts only every so many steps, because a check costs a synchronisation on GPUs
ALIVE_CHECK_INTERVAL = 10
# Cost of a further thread to the others at each step, expressed as the work of the models that takes as long
FLOPS_PER_THREAD = 16e6


class ImaginedRollouts(NamedTuple):
    """
    Imagined rollouts of all tasks. The time axis follows the task axis, so that the rows of a task are one block of memory.

    :param policy_input: (T, H, N, O), standardised observations as the policies saw them
    :param actions: (T, H, N, A) unclipped samples, or (T, H, N, K) long
    :param rewards: (T, H, N)
    :param alive: (T, H, N) bool, False for steps after the rollout's termination, which never count
    :param terminated: (T, H, N) bool, True for steps that terminated their rollout
    :param final_input: (T, 1, N, O), the standardised observation after the last step, at which a critic bootstraps rollouts
        that reached the horizon
    """

    policy_input: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    alive: th.Tensor
    terminated: th.Tensor
    final_input: th.Tensor

    def of_tasks(self, tasks: slice) -> "ImaginedRollouts":
        """Return the rollouts of some of the tasks."""
        return ImaginedRollouts(*(x[tasks] for x in self))

    def returns(self) -> th.Tensor:
        """Return the undiscounted return of each rollout (T, N)."""
        return (self.rewards * self.alive).sum(1)

    def lengths(self) -> th.Tensor:
        """Return the number of steps until termination or horizon (T, N)."""
        return self.alive.sum(1)


@th.no_grad()
def imagine(
    model_env: ModelEnv,
    act: Act,
    start_obs: th.Tensor,
    *,
    to_policy_input: ToPolicyInput,
    horizon: int,
    generator: th.Generator,
) -> ImaginedRollouts:
    """
    Imagine rollouts of each task's policy in the task's model. Task ``i`` uses model ``i // (T / M)``.

    The rollouts of every task are divided among several threads. Each draws its own random numbers, so that the same seed
    gives the same rollouts only with the same number of threads.

    :param model_env: models, reward, termination
    :param act: the policies of the ``T`` tasks
    :param start_obs: raw first observations (T, N, O)
    :param to_policy_input: standardises observations
    :param horizon: maximum number of steps; fewer are returned if every rollout has terminated
    :param generator: samples the actions
    :return: the rollouts
    :raises ValueError: if the number of tasks is not a multiple of that of models, or a reward is not finite
    """
    n_tasks, n_rollouts, observation_dim = start_obs.shape
    if n_tasks % model_env.n_models != 0:
        raise ValueError(f"{n_tasks} tasks cannot be divided evenly among {model_env.n_models} models: use a multiple.")

    # Observations may be in double precision, but the policies' input is not
    dtype = to_policy_input(start_obs[:1, :1]).dtype

    # Zeros mean not alive, for steps that no thread reaches because every rollout has terminated
    def history(*trailing: int, dtype: th.dtype = dtype) -> th.Tensor:
        return th.zeros((n_tasks, horizon, n_rollouts, *trailing), dtype=dtype, device=start_obs.device)

    actions = history(model_env.codec.sample_dim, dtype=dtype if model_env.codec.is_continuous else th.long)
    rollouts = ImaginedRollouts(
        policy_input=history(observation_dim),
        actions=actions,
        rewards=history(),
        alive=history(dtype=th.bool),
        terminated=history(dtype=th.bool),
        final_input=history(observation_dim)[:, :1].clone(),
    )

    worthwhile = worthwhile_threads(n_tasks * n_rollouts * model_env.flops, FLOPS_PER_THREAD)
    n_threads = min(len(model_env.steps), n_rollouts, worthwhile)
    generators = [generator] if n_threads == 1 else forked(generator, n_threads)
    jobs = [
        partial(
            _imagine_share,
            model_env,
            step,
            act,
            start_obs[:, share],
            to_policy_input=to_policy_input,
            rollouts=ImaginedRollouts(*(x[:, :, share] for x in rollouts)),
            generator=own_generator,
        )
        for step, own_generator, share in zip(model_env.steps, generators, even_shares(n_rollouts, n_threads), strict=False)
    ]
    length = max(in_parallel(jobs, n_threads))
    return ImaginedRollouts(*(x[:, :length].contiguous() for x in rollouts))


def forked(generator: th.Generator, number: int) -> list[th.Generator]:
    """Return independent generators, seeded by the given one, whose own state afterwards does not depend on ``number``."""
    seed = int(th.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return [th.Generator(generator.device).manual_seed(seed + i) for i in range(number)]


@th.no_grad()  # PyTorch keeps this setting for each thread
def _imagine_share(
    model_env: ModelEnv,
    step: StepFn,
    act: Act,
    start_obs: th.Tensor,
    *,
    to_policy_input: ToPolicyInput,
    rollouts: ImaginedRollouts,
    generator: th.Generator,
) -> int:
    """
    Imagine some rollouts of every task; this is the hot loop. The other parameters are those of ``imagine``.

    :param step: the step function of this thread
    :param rollouts: receives the results
    :return: how many steps were imagined
    :raises ValueError: if a living rollout earned a reward that is not finite
    """
    horizon = rollouts.rewards.shape[1]
    n_tasks, n_rollouts = start_obs.shape[:2]
    rows, per_model = n_tasks * n_rollouts, (model_env.n_models, n_tasks * n_rollouts // model_env.n_models, -1)
    # Raw observations, time first, for the reward functions, which are called once for all steps
    observations = start_obs.new_empty((horizon + 1, *start_obs.shape))
    observations[0] = start_obs
    # All views are made before the loop: because of the GIL, every call of PyTorch may wait for the other threads
    of_tasks, of_models = observations.unbind(0), observations.view(horizon + 1, *per_model).unbind(0)
    policy_inputs, actions, rewards, alives, terminated, (final_input,) = (x.unbind(1) for x in rollouts)
    obs, obs_of_models = of_tasks[0], of_models[0]
    alive = th.ones((n_tasks, n_rollouts), dtype=th.bool, device=obs.device)
    length, ends = horizon, None
    for t in range(horizon):
        policy_input = to_policy_input(obs)
        distribution = act(policy_input)
        try:
            action = distribution.sample(generator)
        except RuntimeError:  # discrete actions cannot be drawn with probability NaN
            check_observations(of_tasks[max(t - 1, 0)], obs)
            check_answers(obs, distribution.parameters[0])
            raise
        encoded = model_env.codec.to_dynamics(model_env.codec.to_env(action))
        prediction = step(obs_of_models, encoded.view(per_model))

        policy_inputs[t].copy_(policy_input)
        actions[t].copy_(action)
        of_models[t + 1].copy_(prediction.next_obs)
        if prediction.reward is not None:
            rewards[t].copy_(prediction.reward.view(n_tasks, n_rollouts))

        logit = prediction.termination_logit
        ends = model_env.terminated(prediction.next_obs.view(rows, -1), None if logit is None else logit.reshape(rows))
        if ends is None:
            obs, obs_of_models = of_tasks[t + 1], of_models[t + 1]
            continue
        ends = ends.view(n_tasks, n_rollouts)
        alives[t].copy_(alive)
        terminated[t].copy_(ends & alive)
        alive = alive & ~ends
        if (t + 1) % ALIVE_CHECK_INTERVAL == 0 and not alive.any():
            length = t + 1
            break
        # Freeze finished rollouts: outside the data, models diverge, and 0 * NaN is NaN in every masked mean
        obs = th.where(alive.unsqueeze(-1), of_tasks[t + 1], obs)
        obs_of_models = obs.view(per_model)
    if ends is None:
        rollouts.alive.fill_(True)
    final_input.copy_(to_policy_input(obs))

    # Rewards do not affect the rollout: one call for all steps is far cheaper than one per step
    def transitions() -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        env_actions = model_env.codec.to_env(rollouts.actions[:, :length].transpose(0, 1)).flatten(0, 2)
        return observations[:length].flatten(0, 2), env_actions, observations[1 : length + 1].flatten(0, 2)

    if model_env.reward_fn is not None:  # else the loop has stored the models' predictions
        reward = model_env.reward(*transitions(), predicted=None)
        rollouts.rewards[:, :length] = reward.view(length, n_tasks, n_rollouts).transpose(0, 1)
    # Rewards after the termination are meaningless, and may be NaN
    rollouts.rewards.masked_fill_(~rollouts.alive, 0)
    if not (th.isfinite(rollouts.rewards).all() & th.isfinite(rollouts.actions).all()):
        for t in range(length):
            check_answers(of_tasks[t], actions[t])
        from_obs, env_actions, to_obs = transitions()
        earned = rollouts.rewards[:, :length].transpose(0, 1).flatten()
        model_env.check_rewards(earned, obs=from_obs, action=env_actions, next_obs=to_obs)
    return length
