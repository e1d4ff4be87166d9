"""Imagined rollouts: the policies of all tasks act in the learned models, step by step, in tensors. This is the hot loop.

The functions know neither SB3 nor the environment; they receive callables and tensors.

Legend of shapes: ``M`` models, ``T`` tasks, ``N`` rollouts per task, ``H`` horizon, ``O`` observation size, ``A`` action size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from threading import Event
from typing import NamedTuple

import torch as th

from sb3_mbmpo.common.distributions import ActionDistribution, action_noise
from sb3_mbmpo.common.finite import check_observations, check_policy_output
from sb3_mbmpo.common.threads import in_parallel, worthwhile_threads
from sb3_mbmpo.dynamics.parallel import Piece, timetable
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
    :param penalties: (T, H, N), what is subtracted from the rewards before advantages are estimated; 0 without a penalty
    """

    policy_input: th.Tensor
    actions: th.Tensor
    rewards: th.Tensor
    alive: th.Tensor
    terminated: th.Tensor
    final_input: th.Tensor
    penalties: th.Tensor

    def of_tasks(self, tasks: slice) -> "ImaginedRollouts":
        """Return the rollouts of some of the tasks."""
        return ImaginedRollouts(*(x[tasks] for x in self))

    def returns(self) -> th.Tensor:
        """Return the undiscounted return of each rollout (T, N)."""
        return self.outcome().returns()

    def lengths(self) -> th.Tensor:
        """Return the number of steps until termination or horizon (T, N)."""
        return self.outcome().lengths()

    def outcome(self) -> "Outcome":
        """Return what the rollouts earned."""
        return Outcome(self.rewards, self.alive, self.penalties)


class Outcome(NamedTuple):
    """
    What imagined rollouts earned.

    :param rewards: (T, H, N), without penalties
    :param alive: (T, H, N) bool
    :param penalties: (T, H, N)
    """

    rewards: th.Tensor
    alive: th.Tensor
    penalties: th.Tensor

    def returns(self) -> th.Tensor:
        """Return the undiscounted return of each rollout (T, N)."""
        return (self.rewards * self.alive).sum(1)

    def lengths(self) -> th.Tensor:
        """Return the number of steps until termination or horizon (T, N)."""
        return self.alive.sum(1)


class TaskGroup(NamedTuple):
    """
    Tasks that are imagined together.

    :param model_env: their models
    :param tasks: numbers of the tasks, the same number for each of the models
    """

    model_env: ModelEnv
    tasks: slice


def task_groups(model_envs: Sequence[ModelEnv], n_tasks: int) -> list[TaskGroup]:
    """
    Divide the tasks by their models: task ``i`` uses model ``i // (T / M)``.

    :param model_envs: models, reward and termination of each group of models
    :param n_tasks: number of tasks
    :return: the tasks of each group of models
    :raises ValueError: if the number of tasks is not a multiple of that of models
    """
    n_models = sum(model_env.n_models for model_env in model_envs)
    if n_tasks % n_models != 0:
        raise ValueError(f"{n_tasks} tasks cannot be divided evenly among {n_models} models: use a multiple.")
    bounds = [0, *accumulate(model_env.n_models * n_tasks // n_models for model_env in model_envs)]
    return [TaskGroup(model_env, slice(*pair)) for model_env, pair in zip(model_envs, pairwise(bounds), strict=True)]


def halved_in_the_middle(groups: Sequence[TaskGroup]) -> list[TaskGroup]:
    """Divide a group of one model that has the middle task, so that two processes can share all tasks evenly."""
    halved, middle = [], groups[-1].tasks.stop // 2
    for group in groups:
        cuts = [group.tasks.start, group.tasks.stop]
        if group.model_env.n_models == 1 and group.tasks.start < middle < group.tasks.stop:
            cuts.insert(1, middle)
        halved += [group._replace(tasks=slice(*pair)) for pair in pairwise(cuts)]
    return halved


class Noise(NamedTuple):
    """
    The random numbers of imagined rollouts, drawn ahead; each task has its own.

    :param actions: one value per step, (T, N, width), see ``action_noise``
    :param models: one value per step, standard normal (T, N, noise_dim)
    """

    actions: Sequence[th.Tensor]
    models: Sequence[th.Tensor]

    @classmethod
    def draw(
        cls, model_env: ModelEnv, generators: Sequence[th.Generator], *, horizon: int, n_rollouts: int, dtype: th.dtype
    ) -> "Noise":
        """
        Draw the numbers of some tasks.

        :param model_env: determines what is drawn
        :param generators: one for each task
        :param horizon: ``H``
        :param n_rollouts: ``N``
        :param dtype: that of the policies
        """
        space, steps = model_env.codec.action_space, (horizon, n_rollouts)
        actions = [action_noise(space, steps, generator, dtype) for generator in generators]
        models = [
            th.randn((*steps, model_env.noise_dim), generator=generator, device=generator.device) for generator in generators
        ]
        return cls(th.stack(actions, 1).unbind(0), th.stack(models, 1).unbind(0))


@th.no_grad()
def imagine(
    groups: Sequence[TaskGroup],
    acts: Sequence[Act],
    start_obs: th.Tensor,
    *,
    to_policy_input: ToPolicyInput,
    horizon: int,
    generators: Sequence[th.Generator],
    n_threads: int = 1,
    longest: Callable[[int], int] = int,
) -> ImaginedRollouts:
    """
    Imagine rollouts of each task's policy in the task's model, group by group.

    The threads share the groups: a group is imagined as a whole, with random numbers that belong to its tasks, so the rollouts
    are the same with any number of threads.

    :param groups: all tasks, in order
    :param acts: the policies of each group's tasks
    :param start_obs: raw first observations of all tasks (T, N, O)
    :param to_policy_input: standardises observations
    :param horizon: maximum number of steps; fewer are returned if every rollout has terminated
    :param generators: one for each task, which draws its actions and its model's noise
    :param n_threads: maximum number of threads
    :param longest: makes several processes agree on a number of steps, the largest
    :return: the rollouts
    :raises ValueError: if a reward is not finite
    """
    n_tasks, n_rollouts, observation_dim = start_obs.shape

    # Observations may be in double precision, but the policies' input is not
    dtype = to_policy_input(start_obs[:1, :1]).dtype
    codec = groups[0].model_env.codec

    def history(*trailing: int, steps: int = horizon, dtype: th.dtype = dtype) -> th.Tensor:
        return start_obs.new_empty((n_tasks, steps, n_rollouts, *trailing), dtype=dtype)

    rollouts = ImaginedRollouts(
        policy_input=history(observation_dim),
        actions=history(codec.sample_dim, dtype=dtype if codec.is_continuous else th.long),
        # Zeros mean not alive, for steps that no group reaches because every rollout has terminated
        rewards=history().zero_(),
        alive=history(dtype=th.bool).zero_(),
        terminated=history(dtype=th.bool).zero_(),
        final_input=history(observation_dim, steps=1),
        penalties=history().zero_(),
    )
    jobs: list[_GroupImagination] = []
    for (model_env, tasks), act in zip(groups, acts, strict=True):
        draw = partial(Noise.draw, model_env, generators[tasks], horizon=horizon, n_rollouts=n_rollouts, dtype=dtype)
        jobs.append(_GroupImagination(model_env, act, start_obs[tasks], draw, to_policy_input, rollouts.of_tasks(tasks)))

    worthwhile = worthwhile_threads(n_tasks * n_rollouts * groups[0].model_env.flops, FLOPS_PER_THREAD)
    n_threads = min(n_threads, len(jobs), worthwhile)

    def work(pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            for job in jobs[piece.first : piece.last]:
                job.run(round(piece.begin * horizon), round(piece.end * horizon))

    in_parallel([partial(work, pieces) for pieces in timetable(len(jobs), n_threads)], n_threads)
    length = longest(max(job.length for job in jobs))
    return ImaginedRollouts(*(x[:, :length].contiguous() for x in rollouts))


class _GroupImagination:
    """
    The imagination of the tasks of one group of models. A thread may leave it at any step, and another one continue.

    :param model_env: the group's models
    :param act: the policies of its tasks
    :param start_obs: raw first observations (T, N, O)
    :param draw_noise: draws the random numbers
    :param to_policy_input: standardises observations
    :param rollouts: receives the results
    """

    def __init__(
        self,
        model_env: ModelEnv,
        act: Act,
        start_obs: th.Tensor,
        draw_noise: Callable[[], Noise],
        to_policy_input: ToPolicyInput,
        rollouts: ImaginedRollouts,
    ) -> None:
        self._model_env, self._act, self._to_policy_input, self._rollouts = model_env, act, to_policy_input, rollouts
        self._draw_noise, self._noise = draw_noise, Noise((), ())
        horizon = rollouts.rewards.shape[1]
        # Raw observations, time first, for the reward functions, which are called once for all steps
        self._observations = start_obs.new_empty((horizon + 1, *start_obs.shape))
        self._observations[0] = start_obs
        self._obs, self._alive = self._observations[0], th.ones(start_obs.shape[:2], dtype=th.bool, device=start_obs.device)
        self._handed_over = Event()
        self.length = horizon

    def run(self, begin: int, end: int) -> None:
        """
        Imagine some of the steps.

        :param begin: number of the first step; if it is not 0, wait for the thread that imagines the steps before it
        :param end: number after the last step
        :raises ValueError: if a living rollout earned a reward that is not finite
        """
        if begin > 0:
            self._handed_over.wait()
        try:
            self._steps(begin, end)
            if end == self._rollouts.rewards.shape[1]:
                self._finish()
        finally:
            # Release the waiting thread even after an error
            self._handed_over.set()

    @th.no_grad()  # PyTorch keeps this setting for each thread
    def _steps(self, begin: int, end: int) -> None:
        """Imagine steps; this is the hot loop."""
        model_env, step, act, to_policy_input = self._model_env, self._model_env.step, self._act, self._to_policy_input
        if begin == 0:
            self._noise = self._draw_noise()
        obs, alive = self._obs, self._alive
        n_tasks, n_rollouts = alive.shape
        horizon = len(self._observations) - 1
        rows, per_model = n_tasks * n_rollouts, (model_env.n_models, n_tasks * n_rollouts // model_env.n_models, -1)
        # All views are made before the loop: because of the GIL, every call of PyTorch may wait for the other threads
        of_tasks, of_models = self._observations.unbind(0), self._observations.view(horizon + 1, *per_model).unbind(0)
        policy_inputs, actions, rewards, alives, terminated, *_ = (x.unbind(1) for x in self._rollouts)
        action_noise, model_noise = self._noise
        noise_of_models = [(x.view(*per_model[:2], x.shape[-1]),) if x.shape[-1] > 0 else () for x in model_noise]
        obs_of_models, ends = obs.view(per_model), None
        for t in range(begin, min(end, self.length)):
            policy_input = to_policy_input(obs)
            action = act(policy_input).sample_from(action_noise[t])
            try:
                encoded = model_env.codec.to_dynamics(model_env.codec.to_env(action))
            except RuntimeError:  # discrete actions that were drawn with probability NaN have no encoding
                check_observations(of_tasks[max(t - 1, 0)], obs)
                check_policy_output(obs, act(policy_input).parameters[0])
                raise
            prediction = step(obs_of_models, encoded.view(per_model), *noise_of_models[t])

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
                self.length = t + 1
                break
            # Freeze finished rollouts: outside the data, models diverge, and 0 * NaN is NaN in every masked mean
            obs = th.where(alive.unsqueeze(-1), of_tasks[t + 1], obs)
            obs_of_models = obs.view(per_model)
        if ends is None and begin < self.length:
            self._rollouts.alive[:, begin:end] = True
        self._obs, self._alive = obs, alive

    @th.no_grad()
    def _finish(self) -> None:
        """Evaluate the reward function: rewards do not affect the rollout, and one call for all steps is far cheaper."""
        model_env, rollouts, observations, length = self._model_env, self._rollouts, self._observations, self.length
        n_tasks, n_rollouts = self._alive.shape
        rollouts.final_input.squeeze(1).copy_(self._to_policy_input(self._obs))
        self._noise = Noise((), ())
        for unreached in (rollouts.policy_input[:, length:], rollouts.actions[:, length:]):
            unreached.zero_()

        env_actions = model_env.codec.to_env(rollouts.actions[:, :length].transpose(0, 1)).flatten(0, 2)
        from_obs, to_obs = observations[:length].flatten(0, 2), observations[1 : length + 1].flatten(0, 2)
        if model_env.reward_fn is not None:  # else the loop has stored the models' predictions
            reward = model_env.reward(from_obs, env_actions, to_obs, predicted=None)
            rollouts.rewards[:, :length] = reward.view(length, n_tasks, n_rollouts).transpose(0, 1)
        if model_env.penalty is not None:
            penalty = model_env.penalty(from_obs, model_env.codec.to_dynamics(env_actions))
            rollouts.penalties[:, :length] = penalty.view(length, n_tasks, n_rollouts).transpose(0, 1)
        # Rewards after the termination are meaningless, and may be NaN
        for earned_or_lost in (rollouts.rewards, rollouts.penalties):
            earned_or_lost.masked_fill_(~rollouts.alive, 0)
        # A sum is finite only if all its terms are, and cheaper to check. Discrete choices are -1 where a probability is NaN
        actions = rollouts.actions[:, :length]
        valid = th.isfinite(actions.sum()) if model_env.codec.is_continuous else (actions >= 0).all()
        if not (th.isfinite(rollouts.rewards.sum()) & valid):
            for t in range(length):
                check_policy_output(observations[t], self._act(rollouts.policy_input[:, t]).parameters[0])
            earned = rollouts.rewards[:, :length].transpose(0, 1).flatten()
            model_env.check_rewards(earned, obs=from_obs, action=env_actions, next_obs=to_obs)
