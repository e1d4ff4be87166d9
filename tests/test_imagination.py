"""Imagined rollouts compared with simulations in plain Python, with hand-written dynamics."""

import threading

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_mbmpo.common.actions import ActionCodec
from sb3_mbmpo.common.distributions import Bernoullis, Categoricals, DiagGaussian
from sb3_mbmpo.common.streams import spawned
from sb3_mbmpo.dynamics import Prediction
from sb3_mbmpo.imagination.model_env import ModelEnv
from sb3_mbmpo.imagination.rollouts import (
    ALIVE_CHECK_INTERVAL,
    FLOPS_PER_THREAD,
    TaskGroup,
    halved_in_the_middle,
    imagine,
    task_groups,
)
from sb3_mbmpo.rewards.functions import never_terminates

M, T, N = 2, 4, 3
ACT = spaces.Box(np.zeros(1, np.float32), np.full(1, 4, np.float32))  # the policies' -1 is 0, their 1 is 4


def seeded(seed=0):
    return th.Generator().manual_seed(seed)


# -- Linear dynamics, different for each model ----------------------------------------------------------------------------


def linear_step(obs, action):
    """Predict with a model ``m`` that decays by 0.9 and adds (m + 1) x (1, -0.5) x action."""
    gain = (1.0 + th.arange(len(obs))).view(-1, 1, 1) * th.tensor([1.0, -0.5])
    return Prediction(0.9 * obs + gain * action, None, None)


def telling_reward(obs, action, next_obs):
    """Return a reward that reveals every argument."""
    return obs[:, 0] + 10 * action[:, 0] + 100 * next_obs[:, 1]


def never(next_obs):
    return th.zeros(len(next_obs), dtype=th.bool)


def model_env(step, reward_fn=None, termination_fn=None, action_space=ACT, n_models=M):
    return ModelEnv(step, reward_fn, termination_fn, ActionCodec(action_space), n_models, flops=0, device=th.device("cpu"))


def imagined(model_env, act, start, to_policy_input=lambda obs: (obs - 3) / 2, *, generator, **kwargs):
    groups, generators = task_groups([model_env], len(start)), spawned(generator, len(start))
    return imagine(groups, [act], start, to_policy_input=to_policy_input, generators=generators, **kwargs)


LINEAR = model_env(linear_step, telling_reward)
START = th.randn(T, N, 2, generator=seeded())
WEIGHTS = th.tensor([[0.2, -0.1], [-0.3, 0.0], [0.0, 0.5], [0.1, 0.1]])  # weights of each task's policy
STD = 0.8


def linear_policies(policy_input, std=STD):
    mean = (policy_input @ WEIGHTS.unsqueeze(-1)).requires_grad_()
    return DiagGaussian(mean, th.full((T, 1, 1), std).log())


def without_noise(policy_input):
    return linear_policies(policy_input, std=0.0)


def simulate(task, rollout, noise):
    """
    Simulate one imagined rollout in the plainest way.

    :return: policy inputs, actions, rewards
    """
    model = task // (T // M)
    obs, history = START[task, rollout].double().numpy(), []
    for e in noise:
        policy_input = (obs - 3) / 2
        action = WEIGHTS[task].double().numpy() @ policy_input + STD * e
        env_action = 2 + 2 * min(max(action, -1), 1)
        next_obs = 0.9 * obs + (model + 1) * np.array([1, -0.5]) * env_action
        history.append((policy_input, [action], obs[0] + 10 * env_action + 100 * next_obs[1]))
        obs = next_obs
    return [np.array(column) for column in zip(*history, strict=True)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("horizon", [1, 7])
@pytest.mark.parametrize("termination_fn", [None, never])
def test_rollouts_equal_a_simulation_task_by_task(deterministic, horizon, termination_fn):
    world = LINEAR._replace(termination_fn=termination_fn)
    policies = without_noise if deterministic else linear_policies
    rollouts = imagined(world, policies, START, horizon=horizon, generator=seeded(1))
    noise = th.stack([th.randn(horizon, N, generator=generator).T for generator in spawned(seeded(1), T)])
    noise = noise * (not deterministic)
    for task in range(T):
        for rollout in range(N):
            simulated = simulate(task, rollout, noise[task, rollout].tolist())
            for ours, expected in zip(rollouts[:3], simulated, strict=True):
                # Rewards are hundreds, and float32
                np.testing.assert_allclose(ours[task, :, rollout], expected, rtol=1e-5, atol=1e-4)
    assert rollouts.alive.all()
    assert not rollouts.terminated.any()
    assert (rollouts.lengths() == horizon).all()
    th.testing.assert_close(rollouts.returns(), rollouts.rewards.sum(1))
    assert not any(x.requires_grad for x in rollouts)


def test_actions_are_unclipped_samples_and_rewards_are_of_clipped_ones():
    world = LINEAR._replace(reward_fn=lambda obs, action, next_obs: action[:, 0])
    rollouts = imagined(world, linear_policies, START, horizon=20, generator=seeded())
    actions = rollouts.actions.squeeze(-1)
    assert actions.min() < -1
    assert actions.max() > 1
    th.testing.assert_close(rollouts.rewards, 2 + 2 * actions.clamp(-1, 1))


def test_the_generator_decides_everything():
    first, same, other = (imagined(LINEAR, linear_policies, START, horizon=3, generator=seeded(seed)) for seed in (0, 0, 1))
    assert all(th.equal(ours, theirs) for ours, theirs in zip(first, same, strict=True))
    assert not th.equal(first.actions, other.actions)


# One model to a group: each computes the gain of its own model
def group_envs(n_groups, **kwargs):
    def step_of(model):
        def step(obs, action):
            return Prediction(0.9 * obs + (model + 1) * th.tensor([1.0, -0.5]) * action, None, None)

        return step

    return [model_env(step_of(m), telling_reward, n_models=1)._replace(**kwargs) for m in range(n_groups)]


def group_policies(n_groups, std=STD):
    weights = WEIGHTS.repeat(3, 1)
    tasks = [weights[2 * m : 2 * m + 2].unsqueeze(-1) for m in range(n_groups)]
    log_std = th.full((2, 1, 1), std).log()
    return [lambda policy_input, w=w: DiagGaussian(policy_input @ w, log_std) for w in tasks]


@pytest.mark.parametrize("n_threads", [2, 3, 4])
@pytest.mark.parametrize("termination_fn", [None, lambda next_obs: next_obs[:, 0] > 9])
def test_threads_imagine_what_one_would_to_the_last_bit(n_threads, termination_fn):
    """Five groups on two or more threads: some threads go on with what others have begun."""
    envs = group_envs(5, termination_fn=termination_fn, flops=int(1e9))
    starts = START.repeat(3, 1, 1)[:10]
    options = dict(to_policy_input=lambda obs: (obs - 3) / 2, horizon=37)
    one, several = (
        imagine(task_groups(envs, 10), group_policies(5), starts, generators=spawned(seeded(), 10), n_threads=n, **options)
        for n in (1, n_threads)
    )
    assert all(th.equal(ours, theirs) for ours, theirs in zip(several, one, strict=True))
    noise = th.stack([th.randn(37, N, 1, generator=generator) for generator in spawned(seeded(), 10)])
    mean = (several.policy_input @ WEIGHTS.repeat(3, 1)[:10].view(10, 1, 2, 1)).masked_fill(~several.alive.unsqueeze(-1), 0)
    length = several.alive.shape[1]
    alive = several.alive.unsqueeze(-1)
    th.testing.assert_close((several.actions - mean) * alive, STD * noise[:, :length] * alive, atol=1e-4, rtol=1e-4)


def test_groups_imagine_what_all_models_together_would():
    together = imagined(LINEAR, linear_policies, START, horizon=7, generator=seeded())
    options = dict(to_policy_input=lambda obs: (obs - 3) / 2, horizon=7, generators=spawned(seeded(), T))
    in_groups = imagine(task_groups(group_envs(2), T), group_policies(2), START, **options)
    for ours, theirs in zip(in_groups, together, strict=True):
        th.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("work", "n_threads"), [(0.9, 1), (3.9, 1), (4.1, 2), (9.1, 3), (26, 5), (1e6, 7)])
def test_as_many_threads_as_the_work_of_a_step_is_worth(work, n_threads):
    """The n-th thread saves work / n (n - 1) and costs each of the others one unit."""
    callers, everyone = set(), threading.Barrier(n_threads)

    def noting(obs, action):
        if threading.get_ident() not in callers:
            callers.add(threading.get_ident())
            everyone.wait(timeout=10)  # no thread is done before the last has started
        return Prediction(obs, None, None)

    flops = int(work * FLOPS_PER_THREAD / (7 * 100))
    envs = [model_env(noting, telling_reward, n_models=1)._replace(flops=flops)] * 7
    policies = [lambda policy_input: DiagGaussian(policy_input[..., :1], th.zeros(1, 1, 1))] * 7
    options = dict(to_policy_input=lambda obs: obs, horizon=8, generators=spawned(seeded(), 7), n_threads=7)
    imagine(task_groups(envs, 7), policies, th.zeros(7, 100, 2), **options)
    assert len(callers) == n_threads


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("bad", range(3))
def test_an_error_in_any_group_reaches_the_caller(bad, n_threads):
    """No thread waits forever for a group that another thread will never hand over."""

    def failing(obs, action):
        raise ArithmeticError("step")

    envs = group_envs(3, flops=int(1e9))
    envs[bad] = envs[bad]._replace(step=failing)
    options = dict(to_policy_input=lambda obs: obs, horizon=4, generators=spawned(seeded(), 6), n_threads=n_threads)
    with pytest.raises(ArithmeticError, match="step"):
        imagine(task_groups(envs, 6), group_policies(3), START.repeat(2, 1, 1)[:6], **options)


@pytest.mark.parametrize(
    ("models", "n_tasks", "bounds"),
    [
        ([2, 1, 2], 20, [0, 8, 10, 12, 20]),  # two processes take 10 each
        ([2, 1, 2], 15, [0, 6, 7, 9, 15]),
        ([2, 1, 2], 5, [0, 2, 3, 5]),
        ([2, 2], 8, [0, 4, 8]),
        ([1, 1], 2, [0, 1, 2]),
        ([5], 20, [0, 20]),
    ],
)
def test_a_model_in_the_middle_is_shared_by_two_processes(models, n_tasks, bounds):
    envs = [LINEAR._replace(n_models=n) for n in models]
    groups = halved_in_the_middle(task_groups(envs, n_tasks))
    assert [0, *(group.tasks.stop for group in groups)] == bounds
    assert [group.tasks.start for group in groups] == bounds[:-1]
    assert all(isinstance(group, TaskGroup) for group in groups)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_streams_do_not_depend_on_how_many_there_are(number):
    generator, expected = seeded(), seeded()
    children, (only_child,) = spawned(generator, number), spawned(expected, 1)
    assert th.equal(th.rand(3, generator=generator), th.rand(3, generator=expected))
    draws = [th.rand(3, generator=child) for child in children]
    assert th.equal(draws[0], th.rand(3, generator=only_child))
    assert len(th.stack(draws).unique()) == 3 * number


def test_starts_need_not_be_contiguous():
    transposed = START.transpose(0, 1).contiguous().transpose(0, 1)
    expected = imagined(LINEAR, linear_policies, START, horizon=3, generator=seeded())
    assert th.equal(imagined(LINEAR, linear_policies, transposed, horizon=3, generator=seeded()).rewards, expected.rewards)


@pytest.mark.parametrize("n_tasks", [1, 3])
def test_tasks_that_cannot_be_shared_out_are_refused(n_tasks):
    with pytest.raises(ValueError, match=f"{n_tasks} tasks .* among 2 models"):
        imagined(LINEAR, linear_policies, th.zeros(n_tasks, N, 2), horizon=3, generator=seeded())


def test_choices_reach_the_model_one_hot_and_the_reward_as_numbers():
    seen = []

    def step(obs, action):
        seen.append(action)
        return Prediction(obs, None, None)

    def reward_fn(obs, action, next_obs):
        assert action.shape == (len(obs),)
        return 10.0 * action

    def act(policy_input):  # task i always chooses i % 3: no batch of the first model has the last choice
        logits = th.full((T, N, 3), -1e9)
        logits[th.arange(T), :, th.arange(T) % 3] = 0
        return Categoricals(logits, (3,))

    world = model_env(step, reward_fn, action_space=spaces.Discrete(3))
    rollouts = imagined(world, act, START, horizon=2, generator=seeded())
    choices = th.tensor([0, 1, 2, 0]).view(T, 1, 1, 1).expand(T, 2, N, 1)
    assert rollouts.actions.dtype == th.long
    assert th.equal(rollouts.actions, choices)
    assert th.equal(rollouts.rewards, 10.0 * choices.squeeze(-1))
    one_hot = th.tensor([[[1.0, 0, 0]] * N + [[0, 1, 0]] * N, [[0, 0, 1]] * N + [[1, 0, 0]] * N])
    assert all(th.equal(action, one_hot) for action in seen)


@pytest.mark.parametrize(
    ("space", "family"),
    [(spaces.Discrete(2), lambda logits: Categoricals(logits, (2,))), (spaces.MultiBinary(2), Bernoullis)],
    ids=["Discrete", "MultiBinary"],
)
def test_a_probability_that_is_nan_is_reported(space, family):
    world = model_env(lambda obs, action: Prediction(obs, None, None), lambda obs, action, next_obs: obs[:, 0], None, space)
    with pytest.raises(ValueError, match=r"no finite action.*lower `inner_lr`"):
        imagined(world, lambda policy_input: family(policy_input * np.nan), START, horizon=2, generator=seeded())


# -- Termination ----------------------------------------------------------------------------------------------------------


class Clock:
    """
    A model environment of two tasks with one model and two rollouts each.

    Observations are (minus the steps left, the time), and the reward is the time after the step. After the end of a rollout,
    all predictions for it are the same number.

    :param lengths: steps until each rollout terminates, [2, 2]
    :param afterlife: this number
    :param learned_reward: whether the model predicts the reward, instead of a reward function
    :param learned_termination: whether the model predicts the termination, instead of a termination function
    """

    def __init__(self, lengths, afterlife=np.nan, learned_reward=False, learned_termination=False):
        self.lengths, self.afterlife = th.tensor(lengths), afterlife
        self.learned_reward, self.learned_termination = learned_reward, learned_termination
        self.time = 0

    def step(self, obs, action):
        self.time += 1
        dead = self.time > self.lengths
        next_obs = (obs + 1).masked_fill(dead.unsqueeze(-1), self.afterlife)
        # Log-odds of exactly 0 do not end a rollout
        logit = th.where(self.time == self.lengths, 1e-3, 0.0).masked_fill(dead, self.afterlife)
        return Prediction(
            next_obs, next_obs[..., 1] if self.learned_reward else None, logit if self.learned_termination else None
        )

    def imagine(self, horizon):
        world = model_env(
            self.step,
            None if self.learned_reward else lambda obs, action, next_obs: next_obs[:, 1],
            None if self.learned_termination else lambda next_obs: next_obs[:, 0] >= 0,
            n_models=2,
        )
        start = th.stack([-self.lengths, th.zeros_like(self.lengths)], dim=-1).float()
        standard_normal = DiagGaussian(th.zeros(2, 2, 1), th.zeros(2, 1, 1))
        return imagined(world, lambda policy_input: standard_normal, start, horizon=horizon, generator=seeded())


@pytest.mark.parametrize("learned_reward", [False, True])
@pytest.mark.parametrize("learned_termination", [False, True])
@pytest.mark.parametrize("afterlife", [np.nan, 7.0], ids=["then NaN", "then terminating again and again"])
def test_nothing_counts_after_termination(afterlife, learned_reward, learned_termination):
    clock = Clock([[1, 3], [4, 99]], afterlife, learned_reward, learned_termination)
    rollouts = clock.imagine(horizon=5)
    time = th.arange(1, 6).view(1, 5, 1)
    ends = clock.lengths.unsqueeze(1)
    assert th.equal(rollouts.alive, time <= ends)
    assert th.equal(rollouts.terminated, time == ends)
    assert th.equal(rollouts.rewards, (time * (time <= ends)).float())
    assert rollouts.lengths().tolist() == [[1, 3], [4, 5]]
    assert rollouts.returns().tolist() == [[1, 6], [10, 15]]
    # What is masked later must be finite: 0 x NaN is NaN
    assert rollouts.policy_input.isfinite().all()
    assert rollouts.actions.isfinite().all()


@pytest.mark.parametrize(
    ("longest", "horizon", "n_steps"),
    [
        (1, 100, ALIVE_CHECK_INTERVAL),
        (ALIVE_CHECK_INTERVAL, 100, ALIVE_CHECK_INTERVAL),
        (ALIVE_CHECK_INTERVAL + 1, 100, 2 * ALIVE_CHECK_INTERVAL),
        (99, 2 * ALIVE_CHECK_INTERVAL + 3, 2 * ALIVE_CHECK_INTERVAL + 3),
        (1, 4, 4),
    ],
)
def test_imagination_ends_soon_after_everything_has(longest, horizon, n_steps):
    clock = Clock([[1, 1], [1, longest]])
    rollouts = clock.imagine(horizon)
    assert clock.time == n_steps
    steps = (2, n_steps, 2)
    assert [x.shape for x in rollouts] == [(*steps, 2), (*steps, 1), steps, steps, steps, (2, 1, 2, 2), steps]
    assert all(x.is_contiguous() for x in rollouts)
    assert rollouts.lengths().tolist() == [[1, 1], [1, min(longest, horizon)]]


@pytest.mark.parametrize(
    ("termination_fn", "logit", "expected"),
    [
        (never_terminates, th.ones(3), None),  # episodes never end, whatever the models predict
        (None, None, None),
        (None, th.tensor([-1.0, 0.0, 1.0]), [False, False, True]),
        (lambda next_obs: next_obs[:, 0] > 1, th.ones(3), [False, False, True]),
    ],
)
def test_what_ends_a_step(termination_fn, logit, expected):
    found = model_env(linear_step, termination_fn=termination_fn).terminated(th.arange(3.0).unsqueeze(1), logit)
    assert (found if found is None else found.tolist()) == expected
