"""The meta-policy: explicit parameter sets compared with Stable-Baselines3's own evaluation, and saved policies."""

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_mbmpo import MlpPolicy
from sb3_mbmpo.common.distributions import DiagGaussian

OBSERVATION_SPACE = spaces.Box(-np.inf, np.inf, (3,))
BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([3.0, 10.0], np.float32))
SQUARE_BOX = spaces.Box(-0.5, 0.5, (2, 2))
ACTION_SPACES = [BOX, SQUARE_BOX, spaces.Discrete(3), spaces.MultiDiscrete([2, 4]), spaces.MultiBinary(3)]
N_TASKS, N_ROWS = 3, 7

all_action_spaces = pytest.mark.parametrize("action_space", ACTION_SPACES, ids=str)


class Encoder(BaseFeaturesExtractor):
    """A features extractor with parameters."""

    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=4)
        self.linear = nn.Linear(observation_space.shape[0], 4)

    def forward(self, observations):
        return th.tanh(self.linear(observations))


ARCHITECTURES = {
    "default": {},
    "linear": {"net_arch": []},
    "relu": {"net_arch": {"pi": [8, 5]}, "activation_fn": nn.ReLU},
    "encoder": {"net_arch": [8], "features_extractor_class": Encoder},
    "separate encoder": {"net_arch": [8], "features_extractor_class": Encoder, "share_features_extractor": False},
    "activation with parameters": {"net_arch": [8], "activation_fn": nn.PReLU},
}
PLAIN = ["default", "linear", "relu"]
all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


def make_policy(action_space=BOX, seed=0, **kwargs):
    """Make a policy whose outputs visibly depend on all parameters (Stable-Baselines3 initialises the last layer near 0)."""
    th.manual_seed(seed)
    policy = MlpPolicy(OBSERVATION_SPACE, action_space, lambda _: 0.0, **kwargs)
    policy.set_actor_vector(policy.actor_vector() + 0.3 * th.randn_like(policy.actor_vector()))
    policy.set_observation_statistics(observations(100, seed=1))
    return policy


def observations(n_rows=N_ROWS, seed=2):
    """Draw observations that are far from standardised, (n_rows, O) in float64, as MBMPO stores its data."""
    noise = th.randn(n_rows, 3, generator=th.Generator().manual_seed(seed), dtype=th.double)
    return noise * th.tensor([0.1, 1.0, 20.0]) + th.tensor([5.0, 0.0, -30.0])


def nearby(policy, n_tasks=N_TASKS):
    """Return different parameters for each task (T, P)."""
    vector = policy.actor_vector()
    return vector + 0.1 * th.randn(n_tasks, len(vector), generator=th.Generator().manual_seed(3), dtype=vector.dtype)


# -- Explicit parameter sets ----------------------------------------------------------------------------------------------


def sb3_actions(policy, actions):
    """Return actions (B, A) in the form that the log-likelihoods of Stable-Baselines3's distributions expect."""
    return actions.squeeze(-1) if isinstance(policy.action_space, spaces.Discrete) else actions.float()


def to_env_units(policy, actions):
    """Convert the policy's own actions in [-1, 1] (..., A) to the environment's units, and return log |d env / d own|, too."""
    space = policy.action_space
    if not isinstance(space, spaces.Box):
        return actions, 0.0
    low, high = (th.as_tensor(bound.reshape(-1), dtype=th.double) for bound in (space.low, space.high))
    return (low + (high - low) * (actions + 1) / 2).float(), float(((high - low) / 2).log().sum())


def assert_actor_equals_sb3(policy):
    obs, parameters = observations(), nearby(policy)
    distribution = policy.actor(parameters)(policy.standardize(obs).expand(N_TASKS, -1, -1))
    actions = distribution.sample(th.Generator().manual_seed(0))
    for task in range(N_TASKS):
        theirs = policy.with_actor_vector(parameters[task]).get_distribution(obs)
        env_actions, log_range = to_env_units(policy, actions[task])
        mode, log_prob = theirs.mode().float(), theirs.log_prob(sb3_actions(policy, env_actions)) + log_range
        ours = to_env_units(policy, distribution.mode()[task])[0]
        # Single precision
        th.testing.assert_close(ours.float().view_as(mode), mode, rtol=2e-6, atol=2e-5)
        th.testing.assert_close(distribution.log_prob(actions)[task], log_prob, rtol=2e-6, atol=2e-5)


@all_action_spaces
def test_the_actor_equals_sb3_for_every_action_space(action_space):
    assert_actor_equals_sb3(make_policy(action_space))


@all_architectures
def test_the_actor_equals_sb3_for_every_architecture(architecture):
    assert_actor_equals_sb3(make_policy(**architecture))


@all_action_spaces
@pytest.mark.parametrize("name", PLAIN)
def test_the_fast_path_equals_vmap(action_space, name, monkeypatch):
    policy = make_policy(action_space, **ARCHITECTURES[name]).double()
    policy_input = policy.standardize(observations()).expand(N_TASKS, -1, -1)

    def output_and_gradient():
        parameters = nearby(policy).requires_grad_()
        output = policy.actor(parameters)(policy_input).parameters[0]
        return output, th.autograd.grad(output.square().sum(), parameters)[0]

    fast = output_and_gradient()
    monkeypatch.setattr(policy, "_stacked_mlp", None)
    monkeypatch.setattr(policy, "_is_plain_mlp", lambda: False)
    th.testing.assert_close(fast, output_and_gradient())


@pytest.mark.parametrize("name", PLAIN)
def test_the_path_without_gradients_equals_the_one_with(name):
    policy = make_policy(**ARCHITECTURES[name])
    policy_input, parameters = 10 * th.randn(N_TASKS, N_ROWS, 3, generator=th.Generator().manual_seed(0)), nearby(policy)
    with th.no_grad():
        without = policy.actor(parameters)(policy_input).mode()
    th.testing.assert_close(without, policy.actor(parameters)(policy_input).mode(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_plain_networks_take_the_fast_path(name, monkeypatch):
    policy = make_policy(**ARCHITECTURES[name])
    monkeypatch.setattr(policy, "_stacked_any" if name in PLAIN else "_stacked_mlp", None)
    assert policy.actor(nearby(policy))(th.zeros(N_TASKS, N_ROWS, 3)).mode().shape == (N_TASKS, N_ROWS, 2)


@pytest.mark.parametrize("name", ["default", "encoder", "activation with parameters"])
def test_first_and_second_derivatives(name):
    policy = make_policy(**{"net_arch": [4], **ARCHITECTURES[name]}).double()
    policy_input = th.randn(2, 4, 3, dtype=th.double, generator=th.Generator().manual_seed(0))
    actions = policy.actor(nearby(policy, 2))(policy_input).sample(th.Generator().manual_seed(1))
    log_likelihood = lambda parameters: policy.actor(parameters)(policy_input).log_prob(actions).sum(1)  # noqa: E731
    parameters = nearby(policy, 2).requires_grad_()
    assert th.autograd.gradcheck(log_likelihood, parameters, fast_mode=True)
    assert th.autograd.gradgradcheck(log_likelihood, parameters, fast_mode=True)


@all_architectures
def test_the_actor_parameters_are_those_that_act(architecture):
    policy = make_policy(**architecture)
    policy.get_distribution(observations()).log_prob(th.zeros(N_ROWS, 2)).sum().backward()
    acting = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert set(policy.actor_parameters()) == acting
    assert all(parameter.grad.any() for parameter in policy.actor_parameters().values())


@all_action_spaces
def test_actor_vector_round_trip(action_space):
    policy, other = make_policy(action_space, seed=0), make_policy(action_space, seed=1)
    critic = {name: value.clone() for name, value in other.state_dict().items() if "value" in name}
    other.set_actor_vector(policy.actor_vector())
    assert th.equal(other.actor_vector(), policy.actor_vector())
    np.testing.assert_array_equal(predictions(other), predictions(policy))
    assert all(th.equal(other.state_dict()[name], value) for name, value in critic.items())


def test_a_vector_stays_the_callers():
    policy = make_policy(log_std_min=-1.0)
    vector = th.full_like(policy.actor_vector(), -2.0)
    policy.set_actor_vector(vector)
    assert (vector == -2).all(), "the projection must not write into the argument"
    vector.fill_(5.0)
    assert not (policy.actor_vector() == 5).any(), "the policy must not share memory with the argument"
    policy.actor_vector().fill_(6.0)
    assert not (policy.actor_vector() == 6).any(), "the result must not share memory with the policy"


def test_with_actor_vector_is_independent():
    policy = make_policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    parameters = nearby(policy)
    adapted = policy.with_actor_vector(parameters[1])
    assert th.equal(adapted.actor_vector(), parameters[1])
    assert th.equal(adapted.observation_mean, policy.observation_mean)
    adapted.set_observation_statistics(100 * observations())
    adapted.set_actor_vector(parameters[2])
    assert all(th.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_the_deviation_is_projected():
    policy = make_policy(log_std_min=math.log(0.3))
    policy.set_actor_vector(policy.actor_vector().fill_(-3.0))
    th.testing.assert_close(policy.log_std.exp(), th.full((2,), 0.3))
    assert (policy.action_net.weight == -3).all()
    policy.log_std.data.fill_(0.5)
    policy.set_actor_vector(policy.actor_vector())
    assert (policy.log_std == 0.5).all(), "above the minimum nothing happens"


# -- Standardised observations --------------------------------------------------------------------------------------------


def test_observations_are_standardised():
    data = observations(1000)
    data[:, 1] = 4.0  # constant: shifted, not scaled
    policy = make_policy()
    policy.set_observation_statistics(data)
    standardised = policy.standardize(data)
    assert standardised.dtype == th.float32
    # float32 keeps seven digits of observations that are 50 standard deviations from 0
    th.testing.assert_close(standardised.mean(0), th.zeros(3), rtol=0, atol=1e-5)
    th.testing.assert_close(standardised.std(0, correction=0), th.tensor([1.0, 0.0, 1.0]), rtol=1e-5, atol=0)
    th.testing.assert_close(policy.standardize(data[:1] + 1)[0, 1], th.tensor(1.0))


def test_standardisation_can_be_turned_off():
    policy = make_policy(normalize_observation=False)
    th.testing.assert_close(policy.standardize(observations()), observations().float(), rtol=0, atol=0)


def test_every_entry_to_the_networks_standardises_once():
    policy, obs = make_policy(), observations()
    plain = make_policy()
    plain.observation_mean.zero_(), plain.observation_std.fill_(1)
    expected = plain.get_distribution(policy.standardize(obs))
    actions, values, log_prob = policy(obs, deterministic=True)
    th.testing.assert_close(actions, expected.mode())
    th.testing.assert_close(log_prob, expected.log_prob(actions))
    th.testing.assert_close(policy.get_distribution(obs).mode(), expected.mode())
    th.testing.assert_close(values, plain.predict_values(policy.standardize(obs)))
    th.testing.assert_close(policy.predict_values(obs), values)
    th.testing.assert_close(policy.evaluate_actions(obs, actions)[1], log_prob)


# -- Units of actions -----------------------------------------------------------------------------------------------------

RANGES = [spaces.Box(np.float32([-3, 10]), np.float32([5, 12])), spaces.Box(-1, 1, (2,)), spaces.Box(-2e-3, 0, (2,))]


class Exported(th.nn.Module):
    """The module that SB3's recipe for ONNX export creates."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, obs):
        return self.policy(obs, deterministic=True)


@pytest.mark.parametrize("space", RANGES, ids=str)
def test_the_exported_policy_acts_as_predict_does(space):
    policy, obs = make_policy(space), observations()
    with th.no_grad():
        policy.action_net.weight.mul_(50)  # beyond the bounds, too
    # The recipe leaves clipping to the user of the exported policy; `squash_output` would need more
    assert not policy.squash_output
    exported = np.clip(Exported(policy)(obs)[0].detach().numpy(), space.low, space.high)
    predicted = policy.predict(obs.numpy(), deterministic=True)[0]
    np.testing.assert_allclose(exported, predicted, rtol=1e-6)
    assert (predicted == space.low).any() or (predicted == space.high).any()
    np.testing.assert_allclose(exported, np.clip(policy.get_distribution(obs).mode().detach().numpy(), space.low, space.high))


@pytest.mark.parametrize("space", RANGES, ids=str)
def test_cloned_actions_are_those_that_predict_gives(space):
    policy, obs = make_policy(space, log_std_init=-2.0), observations()
    shown = th.as_tensor(space.low + (space.high - space.low) * np.float32([0.25, 0.8])).expand(len(obs), -1)
    optimizer = th.optim.Adam(policy.parameters(), lr=0.03)
    for _ in range(100):
        loss = -policy.evaluate_actions(obs, shown)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cloned = policy.predict(obs.numpy(), deterministic=True)[0]
    np.testing.assert_allclose(cloned, shown, rtol=0, atol=0.05 * (space.high - space.low).max())


def test_densities_are_of_the_environments_units():
    # Three times the range, a third of the density; and `forward` returns a sample's own density
    wide, unit = make_policy(spaces.Box(-3, 3, (2,))), make_policy(spaces.Box(-1, 1, (2,)))
    wide.set_actor_vector(unit.actor_vector())
    obs = observations()
    actions, _, log_prob = unit(obs)
    th.testing.assert_close(wide.evaluate_actions(obs, 3 * actions)[1], log_prob - 2 * np.log(3))
    actions, _, log_prob = wide(obs)
    th.testing.assert_close(wide.evaluate_actions(obs, actions)[1], log_prob)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e60])
def test_predict_refuses_what_has_no_finite_answer(value):
    obs = np.full((1, 3), value)
    for given in (obs, obs[0], obs.tolist()):
        with pytest.raises(ValueError, match="no action for an observation"):
            make_policy(RANGES[0]).predict(given)


@pytest.mark.parametrize("looks", [True, False], ids=["PyTorch looks", "python -O"])
@pytest.mark.parametrize("name", ["action_net.weight", "log_std"])
def test_predict_gives_no_action_of_parameters_that_are_not_finite(name, looks, monkeypatch):
    monkeypatch.setattr(th.distributions.Distribution, "_validate_args", looks)
    policy = make_policy(RANGES[0])
    dict(policy.named_parameters())[name].data.fill_(np.nan)
    with pytest.raises(ValueError, match="parameters, or the outputs of its features extractor, are NaN or infinite"):
        policy.predict(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_not_taken(value):
    policy = make_policy()
    before = policy.actor_vector()
    bad = before.index_fill(0, th.tensor([2]), value)
    for take in (policy.set_actor_vector, policy.with_actor_vector):
        with pytest.raises(ValueError, match="not all finite"):
            take(bad)
    assert th.equal(policy.actor_vector(), before)


# -- predict, save, load --------------------------------------------------------------------------------------------------


def predictions(policy):
    return policy.predict(observations().numpy(), deterministic=True)[0]


@pytest.mark.parametrize(("mean", "share"), [(-100.0, 0.0), (-1.0, 0.0), (0.0, 0.5), (0.5, 0.75), (1.0, 1.0), (100.0, 1.0)])
@pytest.mark.parametrize("action_space", [BOX, SQUARE_BOX], ids=str)
def test_predict_maps_to_the_bounds(action_space, mean, share):
    policy = make_policy(action_space)
    policy.set_actor_vector(th.zeros_like(policy.actor_vector()))
    policy.action_net.bias.data.fill_(mean)
    expected = action_space.low + share * (action_space.high - action_space.low)
    np.testing.assert_allclose(predictions(policy), np.broadcast_to(expected, (N_ROWS, *action_space.shape)))
    np.testing.assert_allclose(policy.predict(np.zeros(3), deterministic=True)[0], expected)


@all_action_spaces
def test_predicted_samples_are_actions(action_space):
    policy = make_policy(action_space)
    actions, _ = policy.predict(observations(200).numpy())
    assert all(action_space.contains(np.asarray(action, action_space.dtype)) for action in actions)
    assert len(np.unique(actions, axis=0)) > 1, "not sampled"


@all_action_spaces
def test_a_loaded_policy_predicts_the_same(action_space, tmp_path):
    policy = make_policy(action_space, net_arch=[6], log_std_min=-1.5, activation_fn=nn.ReLU)
    policy.save(tmp_path / "policy.pt")
    loaded = MlpPolicy.load(tmp_path / "policy.pt", device="cpu")
    np.testing.assert_array_equal(predictions(loaded), predictions(policy))
    assert all(th.equal(value, policy.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert loaded.log_std_min == -1.5
    # The statistics are those of the data, not of a fresh policy, and are still updated
    assert th.equal(loaded.observation_mean, observations(100, seed=1).mean(0).float())
    loaded.set_observation_statistics(observations())
    assert not th.equal(loaded.observation_mean, policy.observation_mean)


def test_a_loaded_policy_does_not_start_to_standardise(tmp_path):
    make_policy(normalize_observation=False).save(tmp_path / "policy.pt")
    loaded = MlpPolicy.load(tmp_path / "policy.pt", device="cpu")
    loaded.set_observation_statistics(observations())
    assert (loaded.observation_mean == 0).all()


@pytest.mark.parametrize("option", ["use_sde", "squash_output"])
def test_state_dependent_exploration_is_refused(option):
    with pytest.raises(ValueError, match="gSDE"):
        make_policy(**{option: True})
    make_policy(**{option: False})


def test_a_box_is_a_gaussian_with_one_deviation_for_all_rows():
    policy = make_policy(log_std_init=-0.7, net_arch=[4])
    distribution = policy.actor(nearby(policy))(th.zeros(N_TASKS, N_ROWS, 3))
    assert isinstance(distribution, DiagGaussian)
    assert distribution.log_std.shape == (N_TASKS, 1, 2)
