"""A policy that was exported, or whose gradients were asked for, is as good as before."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from tiny import ACTION_SPACES, Drift, assert_same, parameters, tiny_model


class Deterministic(th.nn.Module):
    """The part of a policy that users export."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, obs):
        return self.policy(obs, deterministic=True)[0]


@pytest.fixture
def unchecked(monkeypatch):
    """Switch off the checks of distributions, which the exporter cannot follow."""
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", False)


OBS = np.float32([[0.5, -0.25]])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")  # PyTorch's exporter warns of its own parts
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_the_same_policy_acts_learns_and_is_copied_after_an_export(space, used_before):
    model, twin = (tiny_model(Drift(space)) for _ in range(2))
    if used_before:
        model.predict(OBS)
    exported = th.export.export(Deterministic(model.policy).eval(), (th.zeros(1, 2),), strict=False)
    expected = twin.predict(OBS, deterministic=True)[0]
    copied = model.policy.with_actor_vector(model.policy.actor_vector())
    for policy in (model, copied):
        np.testing.assert_array_equal(policy.predict(OBS, deterministic=True)[0], expected)
    np.testing.assert_allclose(exported.module()(th.as_tensor(OBS)).detach().numpy(), expected, atol=1e-6)
    assert_same(parameters(model.learn(20)), parameters(twin.learn(20)))


@pytest.mark.parametrize("space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_a_policy_whose_gradients_were_asked_for_can_be_copied_and_adapted(space):
    model = tiny_model(Drift(space)).learn(20)
    model.policy(th.as_tensor(OBS))  # keeps the distribution of the actions, with its gradients
    for policy in (copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model.policy))):
        assert_same(policy.state_dict(), model.policy.state_dict())
        np.testing.assert_array_equal(*(x.predict(OBS, deterministic=True)[0] for x in (policy, model)))
    assert model.adapt(n_episodes=1).action_space == space
    assert model.policy.action_dist.distribution is not None  # the original keeps it
