"""Meta-training in a learned environment: the order of imagination, adaptation and meta-updates. It changes no state.

Legend of shapes: ``T`` tasks, ``N`` rollouts per task, ``P`` parameters, ``O`` observation size.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch as th

from sb3_mbmpo.common.streams import spawned
from sb3_mbmpo.common.threads import in_parallel
from sb3_mbmpo.common.world import ALONE, World
from sb3_mbmpo.dynamics import groups
from sb3_mbmpo.imagination.model_env import ModelEnv
from sb3_mbmpo.imagination.rollouts import (
    ImaginedRollouts,
    Outcome,
    TaskGroup,
    ToPolicyInput,
    halved_in_the_middle,
    imagine,
    task_groups,
)
from sb3_mbmpo.meta.adaptation import Actor, TaskBatch, adapt, is_usable
from sb3_mbmpo.meta.advantages import AdvantageEstimate
from sb3_mbmpo.meta.critic import Critic, CriticReport
from sb3_mbmpo.meta.outer_step import StepReport, proximal_step, trust_region_step
from sb3_mbmpo.meta.problem import MetaParameters, MetaProblem, task_chunks
from sb3_mbmpo.meta.results import Adaptation, MetaStep, MetaTraining
from sb3_mbmpo.meta.settings import MetaSettings

Result = TypeVar("Result")
# (T tasks, number of rows) -> raw first observations (T, rows, O) of imagined rollouts
SampleStarts = Callable[[int, int], th.Tensor]


def adapting_tasks(n_tasks: int, unadapted_share: float, *, like: th.Tensor) -> th.Tensor | None:
    """
    Choose the tasks whose policy is the meta-policy itself, spread evenly over all tasks and so over the models.

    The objective of Clavera et al. 2018 asks nothing of the meta-policy but to be good after its inner step: there are
    solutions that are useless without one. ``predict`` has none.

    :param n_tasks: number of tasks ``T``
    :param unadapted_share: share of the tasks, rounded down to whole tasks
    :param like: a tensor of the dtype and on the device of the parameters
    :return: 1 for tasks that adapt, 0 for the others (T, 1); None: all adapt
    """
    counts = [math.floor(unadapted_share * i + 1e-9) for i in range(n_tasks + 1)]
    if counts[-1] == 0:
        return None
    return like.new_tensor([float(after == before) for before, after in pairwise(counts)]).unsqueeze(1)


class MetaTrainer(NamedTuple):
    """
    The meta-training of an iteration: everything that is constant over its meta-steps.

    :param model_envs: the learned environment, in groups of models; a process uses those of its tasks
    :param to_policy_input: standardises observations
    :param actor: the policy as a function of its parameters
    :param sample_starts: draws first observations
    :param settings: hyperparameters
    :param generator: determines each task's own stream of imagined actions and of the models' noise
    :param stopwatch: called around each stage: ``with stopwatch("imagination"): ...``
    :param adopt: sets the policy's meta-parameters, and returns them as the policy stores them, because it may bound some
    :param critic: the value function of the baseline "critic"; None with other baselines
    :param n_threads: how many threads imagine and differentiate
    :param world: the processes that share the tasks; all of them train the same meta-parameters
    """

    model_envs: Sequence[ModelEnv]
    to_policy_input: ToPolicyInput
    actor: Actor
    sample_starts: SampleStarts
    settings: MetaSettings
    generator: th.Generator
    stopwatch: Callable[[str], Any]
    adopt: Callable[[MetaParameters], MetaParameters]
    critic: Critic | None = None
    n_threads: int = 1
    world: World = ALONE

    def train(
        self,
        meta: MetaParameters,
        *,
        n_meta_steps: int,
        stop_on_return_drop: bool = False,
        on_step: Callable[[int, MetaStep], None] = lambda number, step: None,
    ) -> MetaTraining:
        """
        Improve the meta-policy by several meta-steps, then adapt it to every task.

        :param meta: meta-parameters
        :param n_meta_steps: number of outer steps
        :param stop_on_return_drop: stop when the imagined return drops, and return to the best, see ``ReturnDrop``
        :param on_step: called with the number of each adopted step, from 1 on, and the step
        :return: the new meta-parameters, their adaptation and the metrics
        """
        reports: list[StepReport] = []
        critic_reports: list[CriticReport] = []
        last_post: Outcome | None = None
        drop, fell = ReturnDrop(), False
        for number in range(1, n_meta_steps + 1):
            step = self.step(meta, reports[-1] if reports else None)
            fell = stop_on_return_drop and drop.fell(meta, step.pre)
            if fell:
                break
            meta = self.adopt(step.meta)
            reports.append(step.report)
            if step.critic is not None:
                critic_reports.append(step.critic)
            last_post = step.post
            on_step(number, step)
        meta = drop.best if fell else meta
        adaptation = self.adapt(meta)
        outcome = self._outcome(adaptation.rollouts)
        if stop_on_return_drop and not fell and drop.fell(meta, outcome):
            meta = drop.best
            adaptation = self.adapt(meta)
            outcome = self._outcome(adaptation.rollouts)
        return MetaTraining(
            meta=self.adopt(meta),
            adapted=self.gather(adaptation.parameters),
            failed=self.gather(adaptation.failed),
            outcome=outcome,
            steps=tuple(reports),
            critic=tuple(critic_reports),
            inner_kl=self.inner_kl(meta, adaptation),
            last_post=last_post,
        )

    def imagine(self, parameters: th.Tensor) -> tuple[ImaginedRollouts, AdvantageEstimate]:
        """
        Imagine rollouts of each task's policy in the task's model, and estimate their advantages.

        :param parameters: parameters of the policy of each task of this process (T, P)
        :return: rollouts and their advantages
        """
        with self.stopwatch("imagination"):
            rollouts = self.imagined(parameters)
        return rollouts, self.judge(rollouts)

    def imagined(self, parameters: th.Tensor) -> ImaginedRollouts:
        """Imagine rollouts of each of this process's tasks with the task's policy; its parameters are (T, P)."""
        s = self.settings
        return imagine(
            self.groups,
            [self.actor(parameters[tasks]) for _, tasks in self.groups],
            self.sample_starts(s.n_tasks, s.n_imagined_rollouts)[self.own_tasks],
            to_policy_input=self.to_policy_input,
            horizon=s.horizon,
            generators=spawned(self.generator, s.n_tasks)[self.own_tasks],
            n_threads=self.n_threads,
            longest=self.world.largest,
        )

    # ---------------------------------------------------------------- which tasks are this process's

    @property
    def task_slices(self) -> list[slice]:
        """Tasks whose policies may be differentiated together, counted from this process's first task."""
        if groups.SAME_DIGITS_UP_TO == 1:  # the tasks of all its groups: fewer and larger operations
            return [slice(0, self.own_tasks.stop - self.own_tasks.start)]
        return [tasks for _, tasks in self.groups]

    @property
    def groups(self) -> list[TaskGroup]:
        """This process's groups of tasks, counted from its first task."""
        own = self.own_tasks
        return [
            TaskGroup(model_env, slice(tasks.start - own.start, tasks.stop - own.start))
            for model_env, tasks in self._all_groups()
            if own.start <= tasks.start < own.stop
        ]

    @property
    def own_tasks(self) -> slice:
        """This process's tasks, among all tasks."""
        return self._shares()[self.world.rank]

    def _all_groups(self) -> list[TaskGroup]:
        return halved_in_the_middle(task_groups(self.model_envs, self.settings.n_tasks))

    def _shares(self) -> list[slice]:
        """Return the tasks of each process."""
        shares = groups.shares_of_processes([tasks for _, tasks in self._all_groups()], self.world.size)
        return [slice(share[0].start, share[-1].stop) for share in shares]

    def gather(self, rows: th.Tensor) -> th.Tensor:
        """Add the rows of the other processes' tasks, (T, ...) -> (all tasks, ...)."""
        return self.gather_all([rows])[0]

    def gather_all(self, tensors: Sequence[th.Tensor]) -> list[th.Tensor]:
        """Add the rows of the other processes' tasks to several tensors, in one message."""
        return self.world.gather_all(tensors, [share.stop - share.start for share in self._shares()])

    # ---------------------------------------------------------------- the parts of a meta-step

    def judge(self, rollouts: ImaginedRollouts) -> AdvantageEstimate:
        """Estimate the advantages of all tasks, in several threads."""

        def of_tasks(tasks: slice) -> AdvantageEstimate:
            return self.settings.estimate(rollouts.of_tasks(tasks), self.critic)

        parts = self._by_task(rollouts.rewards, of_tasks)
        return AdvantageEstimate(*(th.cat(x) for x in zip(*parts, strict=True)))

    def _by_task(self, rewards: th.Tensor, function: Callable[[slice], Result]) -> list[Result]:
        """
        Apply a function to chunks of tasks, in several threads.

        :param rewards: (T, H, N) or (T, B); its shape tells the amount of work
        :param function: some of the tasks -> their results
        :return: results of the chunks, in order
        """
        chunks = task_chunks(self.task_slices, rewards[0].numel(), self.settings.chunk_size)
        return in_parallel([partial(function, tasks) for tasks in chunks], self.n_threads)

    def adapt(
        self,
        meta: MetaParameters,
        *,
        adapts: th.Tensor | None = None,
        critic_learns: bool = False,
    ) -> Adaptation:
        """
        Adapt the meta-policy to every task, by one or several inner steps.

        :param meta: meta-parameters
        :param adapts: which of this process's tasks adapt, see ``MetaParameters.step_size``
        :param critic_learns: train the critic on the meta-policy's rollouts
        :return: the adapted parameters and the data they were adapted to, of this process's tasks
        """
        parameters = meta.theta.expand(self.own_tasks.stop - self.own_tasks.start, -1)
        failed = th.zeros(len(parameters), dtype=th.bool, device=parameters.device)
        batches: list[TaskBatch] = []
        first_rollouts = report = None
        for _ in range(self.settings.n_inner_steps):
            rollouts, estimate = self.imagine(parameters)
            batch = TaskBatch.from_rollouts(rollouts, estimate.advantages)
            if first_rollouts is None:
                first_rollouts = rollouts
                if self.critic is not None and critic_learns:
                    # After the advantages: a critic already fitted to these returns would hide the differences of actions
                    everything = self.gather_all([*rollouts, *estimate])
                    n_fields = len(rollouts)
                    of_all = ImaginedRollouts(*everything[:n_fields])
                    report = self.critic.fit(of_all, AdvantageEstimate(*everything[n_fields:]))
            batches.append(batch)
            adapted, usable = self._one_inner_step(parameters, batch, meta, adapts)
            fails = ~usable
            parameters, failed = th.where(fails.unsqueeze(1), parameters, adapted), failed | fails
        assert first_rollouts is not None
        return Adaptation(parameters, batches=tuple(batches), rollouts=first_rollouts, failed=failed, critic=report)

    def _one_inner_step(
        self, parameters: th.Tensor, batch: TaskBatch, meta: MetaParameters, adapts: th.Tensor | None
    ) -> tuple[th.Tensor, th.Tensor]:
        """Return the adapted parameters (T, P), and which of them are finite, as are their policies' actions (T,)."""

        def of_tasks(tasks: slice) -> tuple[th.Tensor, th.Tensor]:
            step_size = meta.step_size(None if adapts is None else adapts[tasks])
            adapted = adapt(self.actor, parameters[tasks], [batch.tasks(tasks)], step_size)
            return adapted, is_usable(self.actor, adapted, batch.policy_input[tasks])

        adapted, usable = zip(*self._by_task(batch.advantages, of_tasks), strict=True)
        return th.cat(adapted), th.cat(usable)

    def step(self, meta: MetaParameters, previous: StepReport | None = None) -> MetaStep:
        """
        Take one meta-step: imagine, adapt, imagine with the adapted policies, and update the meta-policy.

        This is the inner loop of algorithm 1 in Clavera et al. 2018.

        :param meta: meta-parameters
        :param previous: metrics of the step before, whose direction the momentum continues; None for the first step
        :return: the new meta-parameters, the rollouts and the metrics
        """
        s = self.settings
        adapts = adapting_tasks(s.n_tasks, s.unadapted_share, like=meta.theta)
        adapts = None if adapts is None else adapts[self.own_tasks]
        adaptation = self.adapt(meta, adapts=adapts, critic_learns=True)
        post_rollouts, estimate = self.imagine(adaptation.parameters)
        problem = MetaProblem(
            actor=self.actor,
            pre=adaptation.batches,
            post=TaskBatch.from_rollouts(post_rollouts, estimate.advantages),
            first_order=s.first_order,
            ent_coef=s.ent_coef,
            chunk_size=s.chunk_size,
            groups=self.task_slices,
            n_threads=self.n_threads,
            adapts=adapts,
            mean=lambda rows: self.world.mean(rows, s.n_tasks),
        )
        if s.outer_optimizer == "trpo":
            direction = None if previous is None else previous.direction
            meta, report = trust_region_step(problem, meta, direction, **s.outer_kwargs)
        else:
            meta, report = proximal_step(problem, meta, **s.outer_kwargs)
        return MetaStep(
            meta,
            pre=self._outcome(adaptation.rollouts),
            post=self._outcome(post_rollouts),
            report=report,
            critic=adaptation.critic,
        )

    def _outcome(self, rollouts: ImaginedRollouts) -> Outcome:
        """Return the outcome of all processes' rollouts."""
        return Outcome(*self.gather_all(rollouts.outcome()))

    def inner_kl(self, meta: MetaParameters, adaptation: Adaptation) -> float:
        """Return the mean KL from the meta-policy to the adapted policies in nats, at the meta-policy's imagined steps."""

        @th.no_grad()  # PyTorch keeps this setting for each thread
        def of_tasks(tasks: slice) -> th.Tensor:
            batch, parameters = adaptation.batches[0].tasks(tasks), adaptation.parameters[tasks]
            before = self.actor(meta.theta.expand(len(parameters), -1))(batch.policy_input)
            after = self.actor(parameters)(batch.policy_input)
            return (batch.weight * before.kl_divergence(after)).sum(1)

        return float(self.gather(th.cat(self._by_task(adaptation.batches[0].advantages, of_tasks))).mean())


class ReturnDrop:
    """
    The authors' early stopping of meta-steps, when the imagined return falls below its rolling average (0.8 old, 0.2 new).

    Once a policy has solved its task, only noise is left to learn, and a trust-region step is as long for noise as for a
    gradient.

    :param best: the meta-parameters with the highest imagined return so far
    """

    best: MetaParameters

    def __init__(self) -> None:
        self._best_return = self._average = -math.inf

    def fell(self, meta: MetaParameters, outcome: Outcome) -> bool:
        """
        Compare an imagined return with the rolling average so far, and update it.

        :param meta: meta-parameters
        :param outcome: what their meta-policy imagined
        :return: whether to stop, and return to ``best``
        """
        imagined = float(outcome.returns().mean())
        if imagined > self._best_return:
            self.best, self._best_return = meta, imagined
        before = self._average
        self._average = imagined if before == -math.inf else 0.8 * before + 0.2 * imagined
        return imagined < before
