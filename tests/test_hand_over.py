"""Objects that the training passes to workers are values: pickled and unpickled, they compute the same."""

import pickle

import gymnasium as gym
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tiny import ACTION_SPACES, Drift, Unknown, tiny_model

from sb3_mbmpo.common.streams import spawned
from sb3_mbmpo.imagination.rollouts import imagine


def copied(value):
    return pickle.loads(pickle.dumps(value))


def imagined(trainer, parameters):
    acts = [trainer.actor(parameters[tasks]) for tasks in trainer.task_slices]
    jobs = trainer.groups, acts, trainer.sample_starts(2, 3), trainer.to_policy_input, trainer.generator
    here, there = jobs, copied(jobs)
    return [
        imagine(groups, acts, starts, to_policy_input=to_policy_input, horizon=4, generators=spawned(generator, 2))
        for groups, acts, starts, to_policy_input, generator in (there, here)
    ]


MODELS = {
    "known functions": lambda: tiny_model(make_vec_env("Pendulum-v1")),
    "VecNormalize": lambda: tiny_model(VecNormalize(make_vec_env("Pendulum-v1"))),
    "learned heads": lambda: tiny_model(Unknown()),
    "choices": lambda: tiny_model(Drift(ACTION_SPACES["multi_discrete"])),
    "probabilistic": lambda: tiny_model(Unknown(), dynamics_kwargs=dict(net_arch=[8], max_epochs=2, probabilistic=True)),
    "bad models": lambda: tiny_model(Drift(), dynamics_kwargs=dict(net_arch=[8], max_epochs=2, output_noise=0.5)),
    "any architecture": lambda: tiny_model(Drift(), policy_kwargs=dict(net_arch=[8], activation_fn=th.nn.PReLU)),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_imagination_handed_to_another_process_is_the_same(name):
    model = MODELS[name]().learn(20)
    trainer = model._meta_trainer(model._generators, n_threads=1)
    there, here = imagined(trainer, model._adapted)
    assert all(th.equal(x, y) for x, y in zip(there, here, strict=True))


def test_starts_are_drawn_alike():
    model = tiny_model(gym.make("Pendulum-v1"), imagined_start="buffer").learn(40)
    sample = model._meta_trainer(model._generators, n_threads=1).sample_starts
    assert th.equal(copied(sample)(2, 50), sample(2, 50))
