"""The numbers behind the report's plots, compared with simulators whose errors are known and with direct computation."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import VecNormalize
from tiny import ACTION_SPACES, Drift, assert_same, parameters, tiny_model, vec_drift

from sb3_mbmpo.common.actions import ActionCodec
from sb3_mbmpo.dynamics import Prediction
from sb3_mbmpo.imagination.model_env import ModelEnv
from sb3_mbmpo.report import episodes as real_episodes
from sb3_mbmpo.report import study as diagnostics

GROWTH = 1.1  # growth factor of a distance in one step of Drift


class Simulator:
    """
    ``Drift`` itself in place of an ensemble; member ``i`` adds ``biases[i]`` to every dimension.
    """

    def __init__(self, biases, env):
        self.biases = th.tensor(biases).view(-1, 1, 1)
        self.n_models, self.device, self.flops = len(biases), th.device("cpu"), 0
        self.codec = ActionCodec(env.action_space)
        self.observation_dim = env.observation_space.shape[0]
        self.observation_std = th.tensor([0.5, 2.0])
        self.target_std = th.tensor([0.25, 0.0])
        self.observation_low, self.observation_high = th.tensor([-2.0, -2.0]), th.tensor([2.0, 2.0])

    def step_fn(self, clip_margin=None, *, generator=None, members=None):
        def step(obs, action):
            return Prediction(GROWTH * obs + 0.1 * (action.mean(-1, keepdim=True) - 0.5) + self.biases, None, None)

        step.noise_dim = 0
        return step

    def predict(self, obs, action):
        return diagnostics.open_loop(model_env(self), obs, action[:, None])[:, :, 0]


def model_env(dynamics, clip_margin=None):
    functions = dict(reward_fn=None, termination_fn=None)
    return ModelEnv.of(dynamics, **functions, clip_margin=clip_margin)


def horizon_errors(simulator, episodes, horizon):
    scale = simulator.observation_std.numpy()
    return diagnostics.horizon_errors(model_env(simulator), episodes, horizon=horizon, scale=scale)


@pytest.fixture(scope="module")
def trained():
    return tiny_model(Drift()).learn(40)


def random_episodes(n=4, **kwargs):
    env = Drift(**kwargs)
    return real_episodes.play_episodes(env, real_episodes.RandomPolicy(env.action_space, 0), n, seed=0)


# -- Real episodes --------------------------------------------------------------------------------------------------------


def test_an_episode_is_what_the_environment_did():
    env = Drift(length=5)
    seen = []
    act = real_episodes.RandomPolicy(env.action_space, 3)
    episode = real_episodes.play_episode(env, act, seed=7, on_step=lambda: seen.append(env.x.copy()))
    np.testing.assert_array_equal(episode.obs, seen)
    again = Drift(length=5)
    obs, _ = again.reset(seed=7)
    np.testing.assert_array_equal(episode.obs[0], obs)
    for action, next_obs, reward in zip(episode.actions, episode.obs[1:], episode.rewards, strict=True):
        obs, real, *_ = again.step(action)
        np.testing.assert_array_equal(obs, next_obs)
        assert reward == real


def test_episodes_differ_from_one_another_and_between_seeds():
    env = Drift()
    act = real_episodes.RandomPolicy(env.action_space, 0)
    starts = [e.obs[0, 0] for seed in (0, 1) for e in real_episodes.play_episodes(env, act, 3, seed)]
    assert len(set(starts)) == 6


@pytest.mark.parametrize("space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_the_meta_actor_is_predict(space):
    model = tiny_model(Drift(space)).learn(40)
    obs = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    expected, _ = model.predict(obs, deterministic=True)
    np.testing.assert_allclose(real_episodes.meta_actor(model)(obs), expected, rtol=1e-5, atol=1e-6)


def test_raw_observations_pass_vec_normalize_on_their_way_to_the_policy():
    env = VecNormalize(vec_drift())
    model = tiny_model(env).learn(40)
    obs = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    expected, _ = model.predict(env.normalize_obs(obs), deterministic=True)
    np.testing.assert_allclose(real_episodes.meta_actor(model)(obs), expected, rtol=1e-5, atol=1e-7)


# -- Errors of predictions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["box", "multi_binary"])  # the others are one-hot, with another mean
def test_an_exact_model_has_no_error(name):
    space = ACTION_SPACES[name]
    episodes = random_episodes(action_space=space)
    simulator = Simulator([0.0], Drift(space))
    errors = horizon_errors(simulator, episodes, horizon=10)
    assert errors.members.shape == (1, 4, 2)
    assert errors.members.max() < 1e-5
    assert diagnostics.one_step_errors(simulator, episodes)[0, 0] < 1e-5


def test_a_constant_bias_adds_up_as_the_task_lets_it_grow():
    bias = 0.03
    simulator = Simulator([0.0, bias], Drift())
    errors = horizon_errors(simulator, random_episodes(), horizon=10)
    ahead = np.arange(1, errors.members.shape[1] + 1)
    expected = bias * (GROWTH**ahead - 1) / (GROWTH - 1)
    np.testing.assert_allclose(errors.members[1], expected[:, None] / [0.5, 2.0], rtol=1e-3)


def test_one_step_errors_are_in_units_of_the_changes_and_nan_where_nothing_changes():
    errors = diagnostics.one_step_errors(Simulator([0.0, -0.05], Drift()), random_episodes())
    np.testing.assert_allclose(errors[1, 0], 0.05 / 0.25, rtol=1e-4)
    assert np.isnan(errors[:, 1]).all()


def test_the_forecast_that_nothing_changes():
    episodes = random_episodes(n=1)
    errors = horizon_errors(Simulator([0.0], Drift()), episodes, horizon=3)
    obs = episodes[0].obs
    for k in (1, 2, 3):
        pairs = [obs[t + k] - obs[t] for t in range(len(obs) - 3)]
        np.testing.assert_allclose(errors.unchanged[k - 1], np.sqrt(np.square(pairs).mean(0)) / [0.5, 2.0], rtol=1e-5)


@pytest.mark.parametrize(("horizon", "longest", "expected"), [(3, 20, 3), (50, 20, 10), (1000, 400, 100), (50, 1, 1)])
def test_how_far_ahead(horizon, longest, expected):
    obs = np.zeros((longest + 1, 2), np.float32)
    episode = real_episodes.Episode(obs, np.zeros((longest, 2), np.float32), np.zeros(longest))
    errors = horizon_errors(Simulator([0.0], Drift()), [episode], horizon=horizon)
    assert errors.members.shape == (1, expected, 2)


def test_windows_stay_within_episodes_and_are_few():
    episodes = [
        real_episodes.Episode(10 * i + np.arange(n + 1)[:, None], 10 * i + np.arange(n)[:, None], np.zeros(n))
        for i, n in enumerate([4, 2, 3])
    ]
    obs, actions = diagnostics.windows(episodes, 3)
    np.testing.assert_array_equal(obs[..., 0], [[0, 1, 2, 3], [1, 2, 3, 4], [20, 21, 22, 23]])
    np.testing.assert_array_equal(actions[..., 0], obs[:, :-1, 0])
    many = [real_episodes.Episode(np.zeros((1001, 2)), np.zeros((1000, 2)), np.zeros(1000))]
    assert diagnostics.MAX_STARTS / 2 < len(diagnostics.windows(many, 1)[0]) <= diagnostics.MAX_STARTS


def test_predictions_use_the_clipping_of_the_imagination(trained):
    obs, actions = np.full((1, 2), 100, np.float32), np.zeros((1, 1, 2), np.float32)
    predicted = diagnostics.open_loop(model_env(trained.dynamics, 0.0), obs, actions)
    np.testing.assert_allclose(predicted[:, 0, 0], trained.dynamics.observation_high.expand(2, -1), rtol=1e-6)


# -- Trajectories ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [diagnostics.replay, diagnostics.play])
def test_an_exact_model_repeats_the_episode_and_its_rewards(function):
    model = tiny_model(Drift(length=6), horizon=5).learn(40)
    episode = real_episodes.play_episodes(Drift(length=6), real_episodes.meta_actor(model), 1, seed=0)[0]
    model.dynamics = Simulator([0.0, 0.1], Drift())
    trajectory = function(model, episode)
    assert trajectory.real.shape == (6, 2)
    assert trajectory.imagined.shape == (2, 6, 2)
    np.testing.assert_allclose(trajectory.imagined[0], trajectory.real, atol=1e-5)
    np.testing.assert_allclose(trajectory.imagined_rewards[0], trajectory.real_rewards, atol=1e-4)
    assert np.abs(trajectory.imagined[1, 1:] - trajectory.real[1:]).min() > 0.05


def test_the_policy_acts_on_what_a_member_imagines():
    model = tiny_model(Drift()).learn(40)
    episode = real_episodes.play_episodes(Drift(), real_episodes.meta_actor(model), 1, seed=0)[0]
    played = diagnostics.play(model, episode)
    step = model.dynamics.step_fn(model._dynamics_options.clip_margin)
    obs = th.as_tensor(played.imagined[1, 0])
    for imagined in played.imagined[1, 1:]:
        action, _ = model.predict(obs.numpy(), deterministic=True)
        encoded = th.as_tensor(action).expand(2, 1, 2)
        obs = step(obs.expand(2, 1, 2), encoded).next_obs[1, 0]
        np.testing.assert_allclose(obs, imagined, rtol=1e-4, atol=1e-5)


def test_a_learned_reward_is_that_of_the_member():
    model = tiny_model(Drift(), reward_fn="learned").learn(40)
    obs = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    actions = np.zeros((4, 2), np.float32)
    step = model.dynamics.step_fn()
    batch = th.as_tensor(obs[:-1]).expand(2, -1, -1), th.as_tensor(actions).expand(2, -1, -1)
    for member in range(2):
        rewards = diagnostics.imagined_rewards(model, obs, actions, member)
        np.testing.assert_allclose(rewards, step(*batch).reward[member], rtol=1e-5)


# -- Disagreement and adaptation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["box", "discrete", "multi_binary"])
def test_kl_is_that_of_sb3s_distributions(name):
    model = tiny_model(Drift(ACTION_SPACES[name]), inner_lr=0.3).learn(40)
    obs = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)

    @th.no_grad()
    def distribution(policy):
        # SB3's object modifies itself, but replaces PyTorch's object inside it
        return policy.get_distribution(th.as_tensor(obs)).distribution

    before = distribution(model.policy)
    expected = []
    for theta in model._adapted:
        kl = th.distributions.kl_divergence(before, distribution(model.policy.with_actor_vector(theta)))
        expected.append(kl if name == "discrete" else kl.sum(-1))
    expected = th.stack(expected).mean(0)
    found = diagnostics.adaptation_kl(model, obs)
    assert found.min() > 1e-7
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)


def test_two_dimensions_are_mapped_over_the_range_of_the_data(trained):
    episodes = random_episodes()
    found = diagnostics.plasticity(trained, episodes)
    size = diagnostics.MAP_SIZE
    assert found.is_map
    low, high = trained.dynamics.observation_low.numpy(), trained.dynamics.observation_high.numpy()
    np.testing.assert_allclose(found.obs[[0, size - 1, -1]], [low, [high[0], low[1]], high], rtol=1e-6)
    assert len(found.visited) == sum(len(episode.obs) for episode in episodes)
    point = found.obs[1234:1235]
    action, _ = trained.predict(point, deterministic=True)
    np.testing.assert_allclose(found.disagreement[1234], trained.dynamics.disagreement(point, action)[0], rtol=1e-4)


def test_other_observations_are_those_of_the_episodes():
    model = tiny_model(Drift(size=3)).learn(40)
    episodes = random_episodes(size=3)
    found = diagnostics.plasticity(model, episodes)
    assert not found.is_map
    np.testing.assert_array_equal(found.obs, np.concatenate([episode.obs for episode in episodes]))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 1000], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 2, 3], [1, 3, 2, 4], 4.5 / np.sqrt(4.5 * 5)),
    ],
)
def test_rank_correlation_by_hand(a, b, expected):
    assert diagnostics.rank_correlation(np.array(a), np.array(b)) == pytest.approx(expected)


def test_there_is_no_rank_correlation_with_a_constant():
    assert np.isnan(diagnostics.rank_correlation(np.array([1, 2, 3]), np.ones(3)))


# -- Everything together --------------------------------------------------------------------------------------------------


def test_a_study_changes_nothing_of_the_model(trained):
    def state():
        generators = {name: g.get_state() for name, g in trained._generators.items()}
        return {
            **parameters(trained),
            **generators,
            "space": trained.action_space.np_random.bit_generator.state["state"]["state"],
        }

    before, global_state = state(), th.get_rng_state()
    first = diagnostics.study_model(trained, Drift(), n_episodes=2)
    assert_same(before, state())
    assert th.equal(global_state, th.get_rng_state())
    again = diagnostics.study_model(trained, Drift(), n_episodes=2)
    np.testing.assert_array_equal(first.replayed.imagined, again.replayed.imagined)
    for name in ("meta-policy", "random actions"):
        np.testing.assert_array_equal(first.actors[name].one_step, again.actors[name].one_step)


def test_figures_of_a_study_are_over_members_and_dimensions(trained):
    study = diagnostics.study_model(trained, Drift(), n_episodes=2)
    actor = study.actors["meta-policy"]
    found = study.metrics()
    assert found["one_step_rmse"] == pytest.approx(np.sqrt(np.square(actor.one_step).mean()))
    assert found["horizon_rmse"] == pytest.approx(np.sqrt(np.square(actor.horizon_errors.members[:, -1]).mean()))
    np.testing.assert_allclose(study.returns(), [episode.rewards.sum() for episode in actor.episodes])


def test_what_cannot_be_studied_says_why(trained):
    with pytest.raises(ValueError, match="not been trained"):
        diagnostics.study_model(tiny_model(), Drift())
    with pytest.raises(ValueError, match=r"observation_space.*\(3,\)"):
        diagnostics.study_model(trained, Drift(size=3))
    with pytest.raises(ValueError, match="action_space"):
        diagnostics.study_model(trained, Drift(gym.spaces.Discrete(2)))
