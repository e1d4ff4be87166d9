"""The critic: its scale, its regression, and its place in training, files and policies."""

import copy

import numpy as np
import pytest
import tiny
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_mbmpo import MBMPO, MlpPolicy
from sb3_mbmpo.imagination.rollouts import ImaginedRollouts
from sb3_mbmpo.meta.advantages import AdvantageEstimate, baseline_values
from sb3_mbmpo.meta.critic import Critic


class Tripled(BaseFeaturesExtractor):
    """A features extractor with its own parameters."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 3 * observation_space.shape[0])
        self.linear = th.nn.Linear(observation_space.shape[0], self.features_dim)

    def forward(self, observations):
        return self.linear(observations)


def make_policy(seed=0, **kwargs):
    th.manual_seed(seed)
    options = {"net_arch": dict(pi=[4], vf=[16])} | kwargs
    return MlpPolicy(spaces.Box(-1, 1, (2,)), tiny.ACTION_SPACES["box"], lambda _: 1e-2, **options)


def make_critic(policy, n_updates=100, batch_size=64):
    return Critic(policy, th.Generator().manual_seed(0), n_updates=n_updates, batch_size=batch_size)


def regression(critic, target, n_rows=200, alive_share=1.0, seed=0):
    """Return rollouts of one step from random states, and an estimate whose returns are a function of these states."""
    draw = th.Generator().manual_seed(seed)
    states = th.randn(2, 1, n_rows, 2, generator=draw)
    alive = th.rand(2, 1, n_rows, generator=draw) < alive_share
    returns = target(states)
    rollouts = ImaginedRollouts(states, th.zeros(2, 1, n_rows, 1), returns, alive, ~alive, states, th.zeros_like(returns))
    return rollouts, AdvantageEstimate(th.zeros_like(returns), critic(states), returns)


def quadratic(states):
    return 500 + 40 * states[..., 0] - 25 * states[..., 1].square()


# -- Scale ----------------------------------------------------------------------------------------------------------------


def test_new_units_leave_every_value_as_it_was():
    policy = make_policy().double()
    states = th.randn(5, 2, dtype=th.double)
    untrained = policy.values(states)
    policy.value_net.rescale(th.tensor(50.0), th.tensor(3.0))
    before = policy.values(states)
    th.testing.assert_close(before, 50 + 3 * untrained)
    for mean, std in [(100.0, 7.0), (-3.0, 1e-4), (0.0, 1e6)]:
        policy.value_net.rescale(th.tensor(mean), th.tensor(std))
        th.testing.assert_close(policy.values(states), before)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_critic_learns_returns_of_any_size(scale):
    policy = make_policy()
    critic = make_critic(policy, n_updates=400)
    rollouts, estimate = regression(critic, lambda states: scale * quadratic(states))
    critic.fit(rollouts, estimate)
    _, truth = regression(critic, lambda states: scale * quadratic(states), seed=1)
    assert (truth.values - truth.returns).var() < 0.02 * truth.returns.var()


def test_returns_that_are_all_alike_stay_finite():
    policy = make_policy()
    critic = make_critic(policy)
    rollouts, estimate = regression(critic, lambda states: th.full(states.shape[:-1], 3.0))
    report = critic.fit(rollouts, estimate)
    assert th.allclose(critic(rollouts.policy_input), th.tensor(3.0), atol=0.01)
    assert np.isfinite(report.value_loss)
    assert np.isnan(report.explained_variance), "there is no variance to explain"


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-9, 1e9, 1e30, 1e36])
def test_returns_of_extreme_sizes_are_learned_and_leave_finite_numbers(scale):
    policy, ordinary = make_policy(), make_policy()
    for each, factor in ((ordinary, 1.0), (policy, scale)):
        critic = make_critic(each)
        reports = [critic.fit(*regression(critic, lambda states: factor * states[..., 0])) for _ in range(3)]  # noqa: B023
        assert_finite(each)
    if scale > 1e-37:  # numbers near the smallest float32 have fewer digits
        assert reports[-1].explained_variance > 0.9
        states = th.randn(5, 2)
        th.testing.assert_close(policy.values(states) / scale, ordinary.values(states), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("old", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("new", [float("nan"), float("inf"), 3e38, 1e36, 1e-36])
def test_targets_that_jump_to_anything_leave_finite_numbers(old, new):
    policy = make_policy()
    critic = make_critic(policy)
    critic.fit(*regression(critic, lambda states: old * quadratic(states)))
    before = copy.deepcopy(policy.state_dict())
    momenta = copy.deepcopy(policy.optimizer.state_dict()["state"])
    report = critic.fit(*regression(critic, lambda states: new * states[..., 0]))
    assert_finite(policy)
    if not np.isfinite(report.value_loss):
        tiny.assert_same(policy.state_dict(), before)
        for key, state in policy.optimizer.state_dict()["state"].items():
            tiny.assert_same(state, momenta[key])
    if not new < 1e38:  # as products, 3e38 is infinite
        assert np.isnan(report.value_loss)
    if new == 1e36:
        assert np.isfinite(report.value_loss)


def assert_finite(policy):
    state = policy.optimizer.state_dict()["state"]
    for tensor in [*policy.state_dict().values(), *(value for each in state.values() for value in each.values())]:
        assert th.isfinite(tensor).all()


@pytest.mark.filterwarnings("ignore:The validation loss of the dynamics jumped")
def test_a_step_size_that_destroys_the_critic_is_warned_of_and_undone():
    model = tiny.tiny_model(policy_kwargs=dict(net_arch=[8], optimizer_class=th.optim.SGD), learning_rate=lambda p: 1e30)
    with pytest.warns(UserWarning, match="fits of the critic gave numbers that are NaN or infinite, so it keeps"):
        model.learn(60)
    assert_finite(model.policy)


@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_training_does_not_depend_on_the_unit_of_the_reward(exponent):
    class InUnits(tiny.Drift):
        factor = 2.0**exponent

        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, reward * self.factor, *rest

        @staticmethod
        def reward(obs, action, next_obs):
            return -next_obs.square().sum(1) * InUnits.factor

    plain, model = (tiny.tiny_model(env, imagined_start="buffer").learn(40) for env in (tiny.Drift(), InUnits()))
    start = tiny.tiny_model().policy.actor_vector()
    moved = plain.policy.actor_vector() - start
    assert moved.norm() > 0.01
    th.testing.assert_close(model.policy.actor_vector() - start, moved, rtol=0, atol=0.02 * float(moved.norm()))


# -- Regression -----------------------------------------------------------------------------------------------------------


def test_rows_after_a_termination_do_not_count():
    policy, same = make_policy(), make_policy()
    rollouts, estimate = regression(make_critic(policy), quadratic, alive_share=0.5)
    dead = ~rollouts.alive
    assert dead.any()
    garbage = rollouts._replace(policy_input=rollouts.policy_input.masked_fill(dead[..., None], 1e6))
    wrong = estimate._replace(returns=estimate.returns.masked_fill(dead, -1e9))
    assert make_critic(policy).fit(rollouts, estimate) == make_critic(same).fit(garbage, wrong)
    tiny.assert_same(policy.state_dict(), same.state_dict())


def test_the_report_by_hand():
    policy = make_policy()
    rollouts, _ = regression(make_critic(policy), quadratic, n_rows=2)
    returns = th.tensor([1.0, 2.0, 3.0, 6.0]).view(2, 1, 2)
    values = returns + th.tensor([0.0, 2.0, 0.0, 2.0]).view(2, 1, 2)
    estimate = AdvantageEstimate(th.zeros_like(returns), values, returns)
    report = make_critic(policy, n_updates=0).fit(rollouts, estimate)
    # Var(0, 2, 0, 2) = 1 of Var(1, 2, 3, 6) = 3.5
    assert report.explained_variance == pytest.approx(1 - 1 / 3.5)
    assert report.value_loss == 0, "no update, no loss"


def test_only_the_critic_learns():
    for kwargs in (
        dict(),
        dict(features_extractor_class=Tripled),
        dict(features_extractor_class=Tripled, share_features_extractor=False),
    ):
        policy = make_policy(**kwargs)
        names = set(policy.critic_parameters())
        assert names.isdisjoint(policy.actor_parameters())
        assert names | set(policy.actor_parameters()) == {name for name, _ in policy.named_parameters()}
        before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
        make_critic(policy).fit(*regression(make_critic(policy), quadratic))
        changed = {name for name, parameter in policy.named_parameters() if not th.equal(parameter, before[name])}
        assert changed == names


# -- In the policy, in training and in files ------------------------------------------------------------------------------


def test_every_way_to_ask_for_values_gives_units_of_the_reward():
    policy = make_policy()
    policy.set_observation_statistics(th.randn(50, 2).double() * 3 + 1)
    make_critic(policy).fit(*regression(make_critic(policy), quadratic))
    obs = th.randn(6, 2)
    values = policy.values(policy.standardize(obs)).unsqueeze(1)
    assert values.mean() > 100
    th.testing.assert_close(policy.predict_values(obs), values)
    th.testing.assert_close(policy(obs)[1], values)
    th.testing.assert_close(policy.evaluate_actions(obs, th.zeros(6, 2))[0], values)


@pytest.mark.parametrize("action_space", tiny.ACTION_SPACES)
def test_training_explains_returns_and_logs_it(action_space):
    more = dict(n_meta_steps=3, n_imagined_rollouts=50, n_critic_updates=200, batch_size=64, learning_rate=5e-3)
    model = tiny.tiny_model(tiny.Drift(tiny.ACTION_SPACES[action_space]), **more)
    seen = {}
    model.set_logger(logger := tiny_logger(seen))
    model.learn(60)
    assert logger is model.logger
    assert seen["train/value_loss"] > 0
    assert seen["train/explained_variance"] > 0.3


def tiny_logger(seen):
    """Make a logger that keeps the last values of all keys in a dictionary."""
    from stable_baselines3.common.logger import KVWriter, Logger

    class Keep(KVWriter):
        def write(self, key_values, key_excluded, step=0):
            seen.update(key_values)

        def close(self):
            pass

    return Logger(None, [Keep()])


def test_a_loaded_critic_is_the_saved_one(tmp_path):
    model = tiny.tiny_model().learn(40)
    model.save(tmp_path / "model")
    loaded = MBMPO.load(tmp_path / "model")
    obs = th.randn(5, 2)
    assert th.equal(loaded.policy.predict_values(obs), model.policy.predict_values(obs))
    ours, theirs = (m.policy.optimizer.state_dict() for m in (model, loaded))
    assert ours["param_groups"] == theirs["param_groups"]
    assert len(ours["state"]) > 0
    for key, state in ours["state"].items():
        tiny.assert_same(state, theirs["state"][key])


def test_adapting_leaves_the_critic_alone():
    model = tiny.tiny_model().learn(40)
    before = tiny.parameters(model)
    model.adapt(model_index=1)
    model.adapt(tiny.vec_drift(2), n_episodes=4)
    tiny.assert_same(tiny.parameters(model), before)


def test_the_other_baselines_train_no_critic():
    model = tiny.tiny_model(baseline="linear")
    before = {name: parameter.detach().clone() for name, parameter in model.policy.critic_parameters().items()}
    model.learn(40)
    tiny.assert_same({name: p.detach() for name, p in model.policy.critic_parameters().items()}, before)


def test_the_value_of_a_cut_real_episode_is_that_of_its_last_observation():
    # Two environments whose episodes are truncated after 3 and 5 steps: the shorter one's value follows its last step
    from sb3_mbmpo.meta.few_shot import collect_episodes

    env = tiny.DummyVecEnv([lambda length=length: tiny.Drift(length=length, random_start=False) for length in (3, 5)])
    policy = make_policy()
    act = policy.actor(policy.actor_vector().unsqueeze(0))
    episodes = collect_episodes(env, act, policy, n_episodes=2, generator=th.Generator().manual_seed(0))
    values = baseline_values(episodes, 0.9, "critic", policy.values)[0]
    assert episodes.alive.sum(1).tolist() == [[3, 5]]
    assert not episodes.terminated.any()
    for episode, n_steps in enumerate((3, 5)):
        step = int(n_steps) - 1
        x = episodes.policy_input[0, step, episode].numpy()
        action = policy._codec.to_env(episodes.actions[0, step, episode]).numpy()
        after = th.as_tensor(tiny.push(x, action))
        th.testing.assert_close(values[n_steps, episode], policy.values(after.unsqueeze(0))[0])
