"""Any number of workers learns the same, to the last bit: random numbers and sums belong to the work, not to the worker."""

import pytest
import torch as th
from tiny import ACTION_SPACES, Drift, Unknown, assert_same, parameters, tiny_model

ODD_SIZES = dict(n_models=5, n_tasks=10, n_imagined_rollouts=7, horizon=11, chunk_size=80)  # a group's tasks in several chunks
PROBABILISTIC = dict(net_arch=[8], max_epochs=3, probabilistic=True)
CASES = {
    "Gaussian": (Drift(), {}),
    "discrete": (Drift(ACTION_SPACES["discrete"]), ODD_SIZES),
    "multi_discrete": (Drift(ACTION_SPACES["multi_discrete"]), dict(baseline="linear")),
    "multi_binary": (Drift(ACTION_SPACES["multi_binary"]), dict(n_models=3, n_tasks=6)),
    "probabilistic members, learned heads": (Unknown(), dict(dynamics_kwargs=PROBABILISTIC)),
    "deliberate noise": (Drift(), dict(dynamics_kwargs={**PROBABILISTIC, "output_noise": 0.3})),
    "PPO, linear baseline, real states": (
        Drift(),
        dict(ODD_SIZES, outer_optimizer="ppo", outer_kwargs={}, baseline="linear", imagined_start="buffer"),
    ),
    "learned step sizes": (Drift(), dict(ODD_SIZES, learn_inner_lr=True, n_inner_steps=2, unadapted_share=0.3)),
}


@pytest.fixture
def threads_for_small_networks(monkeypatch):
    for stage in ("imagination.rollouts", "dynamics.parallel"):
        monkeypatch.setattr(f"sb3_mbmpo.{stage}.FLOPS_PER_THREAD", 1e-3)
    monkeypatch.setattr("sb3_mbmpo.dynamics.parallel.MIN_FLOPS_TO_HAND_OVER", 0)


def state(model):
    """Return all that training changes."""
    moments = model.dynamics.optimizer.state_dict()["state"]
    averages = {f"{number}.{name}": value for number, state in moments.items() for name, value in state.items()}
    random = {name: generator.get_state() for name, generator in model._generators.items()}
    return {**parameters(model), **averages, **random, "adapted": model._adapted}


def learned(case, n_threads, monkeypatch):
    env, options = CASES[case]
    monkeypatch.setattr("sb3_mbmpo.mbmpo.worker_threads", lambda device: n_threads)
    env.action_space.seed(0)
    return state(tiny_model(env, **options).learn(60))


@pytest.mark.usefixtures("threads_for_small_networks")
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads_learns_the_same(case, monkeypatch):
    alone = learned(case, 1, monkeypatch)
    for n_threads in (2, 4):
        assert_same(learned(case, n_threads, monkeypatch), alone)


def test_a_stream_is_that_of_its_task_however_many_tasks_there_are(monkeypatch):
    model = tiny_model(n_tasks=4).learn(20)
    sample = model._meta_trainer(model._generators, n_threads=1).sample_starts
    state = sample.generator.get_state()
    four = sample(4, 5)
    sample.generator.set_state(state)
    assert th.equal(sample(2, 5), four[:2])
