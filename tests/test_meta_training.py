"""The authors' early stop of the meta-steps. The steps themselves are tested in test_meta and test_imagination."""

import pytest
import tiny
import torch as th

from sb3_mbmpo.imagination import ImaginedRollouts
from sb3_mbmpo.meta_training import MetaTrainer, ReturnDrop


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
    )


@pytest.mark.parametrize(
    ("returns", "falls", "best"),
    [
        ([1.0, 2.0, 3.0], [False, False, False], 2),
        ([1.0, 2.0, 1.0], [False, False, True], 1),
        ([10.0, 20.0, 13.0], [False, False, False], 1),  # the average was 0.8 * 10 + 0.2 * 20 = 12
        ([5.0, 5.0, 5.0], [False, False, False], 0),  # solved for good: the first of equals stays
        ([-3.0, -9.0], [False, True], 0),
    ],
)
def test_a_return_below_the_rolling_average_is_a_drop(returns, falls, best):
    drop, phis = ReturnDrop(), [th.tensor([float(i)]) for i in range(len(returns))]
    assert [drop.fell(phi, rollouts(value)) for phi, value in zip(phis, returns, strict=True)] == falls
    assert drop.best is phis[best]


@pytest.mark.parametrize(
    ("returns", "steps_kept"),
    [
        ([1.0, 2.0, 0.0], 1),  # falls in the third step: back to what the first step made, which imagined 2
        ([1.0, 2.0, 3.0, 0.0], 2),  # falls after the last step
        ([1.0, 2.0, 3.0, 4.0], 3),  # never falls
    ],
)
def test_stop_on_return_drop_goes_back_to_the_best(returns, steps_kept, monkeypatch):
    model = tiny.tiny_model(n_meta_steps=3, stop_on_return_drop=True)
    found, imagine = iter(returns), MetaTrainer.adapt

    def adapt_with_given_return(trainer, phi, **options):
        adaptation = imagine(trainer, phi, **options)
        mean = next(found, returns[-1]) / float(adaptation.rollouts.alive.sum(1).float().mean())
        return adaptation._replace(rollouts=adaptation.rollouts._replace(rewards=mean * adaptation.rollouts.alive.float()))

    def step(trainer, phi):
        taken = original_step(trainer, phi)
        return taken._replace(phi=phi + 1)

    original_step = MetaTrainer.step
    monkeypatch.setattr(MetaTrainer, "adapt", adapt_with_given_return)
    monkeypatch.setattr(MetaTrainer, "step", step)
    before = model.policy.actor_vector()
    model.learn(model.learning_starts)
    assert th.allclose(model.policy.actor_vector() - before, th.full_like(before, float(steps_kept)), atol=1e-5)
