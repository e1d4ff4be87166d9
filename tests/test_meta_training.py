"""The authors' early stopping of the meta-steps. The steps themselves are tested in test_outer_step and test_imagination."""

import itertools

import pytest
import torch as th

from sb3_mbmpo.imagination.rollouts import ImaginedRollouts
from sb3_mbmpo.meta.outer_step import StepReport
from sb3_mbmpo.meta.problem import MetaParameters
from sb3_mbmpo.meta.results import Adaptation, MetaStep
from sb3_mbmpo.meta.training import MetaTrainer, ReturnDrop, adapting_tasks


def meta(*theta: float) -> MetaParameters:
    return MetaParameters(th.tensor(theta), inner_lr=0.1)


def rollouts(imagined_return: float) -> ImaginedRollouts:
    shape = (1, 1, 1)
    alive = th.ones(shape, dtype=th.bool)
    return ImaginedRollouts(
        policy_input=th.zeros(1, 1, 1, 1),
        actions=th.zeros(1, 1, 1, 1),
        rewards=th.full(shape, imagined_return),
        alive=alive,
        terminated=~alive,
        final_input=th.zeros(1, 1, 1, 1),
        penalties=th.zeros(shape),
    )


@pytest.mark.parametrize(
    ("returns", "falls", "best"),
    [
        ([1.0, 2.0, 3.0], [False, False, False], 2),
        ([1.0, 2.0, 1.0], [False, False, True], 1),
        ([10.0, 20.0, 13.0], [False, False, False], 1),  # the average was 0.8 * 10 + 0.2 * 20 = 12
        ([5.0, 5.0, 5.0], [False, False, False], 0),  # already solved: the first of equals is kept
        ([-3.0, -9.0], [False, True], 0),
    ],
)
def test_a_return_below_the_rolling_average_is_a_drop(returns, falls, best):
    drop, metas = ReturnDrop(), [meta(float(i)) for i in range(len(returns))]
    assert [drop.fell(x, rollouts(value)) for x, value in zip(metas, returns, strict=True)] == falls
    assert drop.best is metas[best]


@pytest.mark.parametrize(
    ("returns", "steps_kept"),
    [
        ([1.0, 2.0, 0.0], 1),  # falls in the third step: back to the result of the first step, which imagined 2
        ([1.0, 2.0, 3.0, 0.0], 2),  # falls after the last step
        ([1.0, 2.0, 3.0, 4.0], 3),  # never falls
    ],
)
def test_stop_on_return_drop_goes_back_to_the_best(returns, steps_kept):
    trainer = scripted(returns)
    training = trainer.train(meta(0.0, 0.0), n_meta_steps=3, stop_on_return_drop=True)
    assert th.equal(training.meta.theta, th.full((2,), float(steps_kept)))
    assert th.equal(training.adapted, training.meta.theta.expand(1, -1)), "the acting policies derive from it"


def test_every_step_is_adopted_and_shown():
    adopted, shown = [], []

    def bounded(meta):
        adopted.append(meta.theta.tolist())
        return meta._replace(theta=meta.theta.clamp(max=1.5))

    trainer = scripted([1.0, 2.0, 0.0], adopt=bounded)
    training = trainer.train(meta(0.0), n_meta_steps=2, on_step=lambda *args: shown.append(args))
    assert adopted == [[1.0], [2.0], [1.5]], "the meta-policy ends with the last one"
    assert [(number, step.meta.theta.item()) for number, step in shown] == [(1, 1.0), (2, 2.0)]
    assert training.meta.theta.item() == 1.5, "the value adopted by the policy is kept"
    assert training.metrics()["train/kl_divergence"] == pytest.approx(0.1)
    assert training.metrics()["imagined/ep_rew_mean"] == 0.0


def test_each_meta_step_continues_the_direction_of_the_one_before():
    trainer = scripted([4.0])
    for _ in range(2):  # an iteration begins anew: its models are others
        training = trainer.train(meta(0.0), n_meta_steps=3)
        assert [report.direction.item() for report in training.steps] == [1.0, 2.0, 3.0]


def test_without_meta_steps_the_policy_is_only_adapted():
    training = scripted([4.0]).train(meta(0.0), n_meta_steps=0)
    assert (training.meta.theta.item(), training.steps, training.last_post) == (0.0, (), None)
    assert training.metrics()["imagined/ep_rew_mean"] == 4.0
    assert not any(key.startswith("train/kl") for key in training.metrics())


class Scripted(MetaTrainer):
    """A trainer that imagines rollouts with the given returns, one by one; each step adds 1 to the outer variable."""

    def adapt(self, meta, **options):
        return Adaptation(meta.theta.expand(1, -1), (), rollouts(next(self.settings)), th.zeros(1, dtype=th.bool))

    def step(self, meta, previous=None):
        pre = self.adapt(meta).rollouts
        # The number of the step stands for its direction
        direction = th.ones(1) if previous is None else previous.direction + 1
        return MetaStep(meta._replace(theta=meta.theta + 1), pre, pre, StepReport(0.5, 0.1, True, 1, direction))

    def inner_kl(self, meta, adaptation):
        return 0.0

    def gather_all(self, tensors):
        return tensors


def scripted(returns, adopt=lambda meta: meta):
    found = itertools.chain(returns, itertools.repeat(returns[-1]))
    return Scripted(*[None] * 4, settings=found, generator=None, stopwatch=None, adopt=adopt)


@pytest.mark.parametrize(
    ("n_tasks", "share", "unadapted"),
    [
        (20, 0.25, [3, 7, 11, 15, 19]),  # one in each of five models
        (20, 0.1, [9, 19]),
        (10, 0.3, [3, 6, 9]),
        (5, 0.25, [3]),
        (4, 1.0, [0, 1, 2, 3]),
    ],
)
def test_tasks_that_do_not_adapt_are_spread_over_the_models(n_tasks, share, unadapted):
    adapts = adapting_tasks(n_tasks, share, like=th.zeros(1, dtype=th.float64))
    assert adapts.dtype == th.float64
    assert adapts.shape == (n_tasks, 1)
    assert [i for i in range(n_tasks) if adapts[i] == 0] == unadapted
    assert adapts.sum() == n_tasks - len(unadapted)


@pytest.mark.parametrize(("n_tasks", "share"), [(20, 0.0), (3, 0.25)])
def test_a_share_of_less_than_a_task_is_none(n_tasks, share):
    assert adapting_tasks(n_tasks, share, like=th.zeros(1)) is None
