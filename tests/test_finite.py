"""NaN and infinity: messages name their source, and no parameter, action or buffer adopts them."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from tiny import ACTION_SPACES, Drift, assert_same, parameters, tiny_model, vec_drift

from sb3_mbmpo import MBMPO, DynamicsEnsemble
from sb3_mbmpo.common.finite import check_rewards
from sb3_mbmpo.dynamics import Transitions
from sb3_mbmpo.meta.adaptation import is_usable

fork = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Double(Drift):
    """An environment with double-precision observations and prescribed rewards."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.observation_space = spaces.Box(-np.inf, np.inf, self.observation_space.shape, np.float64)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs.astype(np.float64), info

    def step(self, action):
        obs, *rest = super().step(action)
        value = self.bad.get((self.n_steps, "double"))
        obs = obs.astype(np.float64)
        obs[0] = obs[0] if value is None else value
        return obs, *rest


def everything_finite(model):
    buffer = model.replay_buffer
    rows = buffer.size()
    stored = (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards)
    assert all(np.isfinite(np.asarray(array[:rows], dtype=np.float32)).all() for array in stored)
    bounds = ("dynamics.observation_low", "dynamics.observation_high")  # infinite before the first fit
    assert all(th.isfinite(value).all() for key, value in parameters(model).items() if key not in bounds or model._n_fits)
    assert th.isfinite(model._adapted).all()


def root_of(threshold):
    """Return a reward function that is NaN where the first observation is beyond a threshold."""
    return lambda obs, action, next_obs: (threshold - next_obs[:, 0]).sqrt()


# ---------------------------------------------------------------- a reward function that is not finite


def test_a_reward_that_is_nan_at_the_first_observation_is_named_before_any_step():
    model = tiny_model(Drift(random_start=False), reward_fn=root_of(0.4))
    with pytest.raises(ValueError, match=r"(?s)reward function \(argument\) gave the reward nan for obs \[0.5 .*learned"):
        model.learn(40)
    assert model.num_timesteps == 0


def test_a_reward_that_is_nan_on_real_steps_is_named():
    # Finite where nothing moves, as when the function is tried out at set-up
    model = tiny_model(reward_fn=lambda obs, action, next_obs: (1e-9 - (next_obs - obs).abs().amax(1)).sqrt())
    with pytest.raises(ValueError, match=r"(?s)\(argument\) gave the reward nan for obs \[.*, action \[.*next_obs \["):
        model.learn(40)
    everything_finite(model)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["box", "discrete"])
def test_a_reward_that_is_not_finite_at_imagined_states_only_is_named(name, value, tmp_path):
    # Outside the data: the models may go slightly beyond it
    env, farthest = Drift(ACTION_SPACES[name], random_start=True), []

    def reward_fn(obs, action, next_obs):
        if not farthest or len(next_obs) <= 21:
            farthest.append(next_obs.amax())
            return -next_obs.square().sum(1)
        return th.where(next_obs[:, 0] > max(farthest) - 2, th.full_like(next_obs[:, 0], value), 0.0)

    model = tiny_model(env, reward_fn=reward_fn, n_imagined_rollouts=6)
    with pytest.raises(ValueError, match=rf"gave the reward {value} for obs \[.*finite number everywhere"):
        model.learn(60)
    assert model.num_timesteps == 20
    everything_finite(model)
    model.reward_fn = "learned"
    model.save(tmp_path / "model")
    everything_finite(MBMPO.load(tmp_path / "model"))


class Root(BaseFeaturesExtractor):
    """Features that are NaN where the first observation is beyond a threshold."""

    def __init__(self, observation_space, threshold):
        super().__init__(observation_space, 2)
        self.threshold = threshold

    def forward(self, obs):
        return obs + (self.threshold - obs[..., :1]).sqrt()


def with_root(threshold):
    kwargs = dict(features_extractor_class=Root, features_extractor_kwargs=dict(threshold=threshold))
    return dict(net_arch=[8], **kwargs)


@pytest.mark.parametrize("name", ["box", "discrete", "multi_binary"])
@pytest.mark.parametrize(("threshold", "where"), [(0.3, "imagined observation"), (1.2, r"observation .*real step")])
def test_a_features_extractor_that_is_nan_is_named(threshold, where, name):
    model = tiny_model(Drift(ACTION_SPACES[name]), policy_kwargs=with_root(threshold))
    with pytest.raises(ValueError, match=rf"(?s)no finite action for the {where}.*a features extractor of your own"):
        model.learn(60)
    everything_finite(model)


@pytest.mark.filterwarnings("ignore:The reward function")
def test_a_reward_that_takes_anything_hides_no_features_that_are_nan():
    model = tiny_model(policy_kwargs=with_root(0.3), reward_fn=lambda obs, action, next_obs: th.ones(len(obs)))
    with pytest.raises(ValueError, match=r"no finite action for the imagined observation \["):
        model.learn(60)


def test_an_imagined_environment_names_it_too():
    model = tiny_model(vec_drift()).learn(20)
    model._functions.reward = model._functions.reward._replace(fn=root_of(-100.0))
    env = model.imagined_env(n_envs=3)
    env.reset()
    with pytest.raises(ValueError, match="`reward_fn` gave the reward nan"):
        env.step(np.zeros((3, 2)))


def test_the_message_shows_the_transition_that_did_it():
    obs, action = th.arange(6.0).reshape(3, 2), th.tensor([[0.1], [0.2], [0.3]])
    with pytest.raises(ValueError, match=r"f gave the reward nan for obs \[2. 3.\], action \[0.2\], next_obs \[12. 13.\]"):
        check_rewards("f", th.tensor([1.0, np.nan, np.inf]), obs=obs, action=action, next_obs=obs + 10)


def test_an_observation_that_is_not_finite_is_not_blamed_on_the_reward_function():
    obs = th.ones(3, 2)
    next_obs = obs.clone()
    next_obs[2, 1] = np.inf
    with pytest.raises(
        ValueError, match=r"models imagined an observation that is NaN or infinite: \[ ?1. inf\] after \[1. 1.\]"
    ):
        check_rewards("f", -next_obs.sum(1), obs=obs, action=obs, next_obs=next_obs)


def test_a_learned_reward_that_is_not_finite_is_named():
    model = tiny_model(reward_fn="learned").learn(20)
    model.dynamics.target_mean[-1] = np.nan
    env = model.imagined_env(n_envs=3)
    env.reset()
    with pytest.raises(ValueError, match=r"The reward head of the models gave the reward nan for obs \["):
        env.step(np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"The reward head of the models gave the reward nan for obs \["):
        model.adapt(model_index=0)


@pytest.mark.parametrize("name", ["box", "discrete"])
def test_parameters_without_finite_actions_in_the_imagination_are_named(name):
    model = tiny_model(Drift(ACTION_SPACES[name])).learn(20)
    model.policy.set_actor_vector(th.full_like(model.policy.actor_vector(), 3e38))
    with pytest.raises(ValueError, match=r"no finite action for the imagined observation \[.*lower `inner_lr`"):
        model.adapt(model_index=0)


# ---------------------------------------------------------------- parameters and actions


@pytest.mark.parametrize("name", ["box", "discrete"])
@pytest.mark.parametrize(
    "arguments",
    [
        dict(inner_lr=1e37, n_inner_steps=2),
        dict(inner_lr=1e30, policy_kwargs=dict(net_arch=[8, 8], activation_fn=th.nn.ReLU)),
        dict(outer_optimizer="ppo", outer_kwargs=dict(learning_rate=1e30)),
        dict(target_kl=1e20),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The adaptations", "ignore:The line search", "ignore:The validation loss")
def test_steps_of_any_size_leave_finite_policies(name, arguments):
    model = tiny_model(Drift(ACTION_SPACES[name]), n_meta_steps=2, **arguments).learn(60)  # its step asserts every action
    assert model.num_timesteps == 60
    everything_finite(model)


def test_adaptations_that_fail_are_warned_of_and_the_meta_policy_acts():
    with pytest.warns(UserWarning, match=r"adaptations to 2 of 2 tasks are NaN or infinite.*lower `inner_lr`"):
        model = tiny_model(inner_lr=3e38).learn(20)
    assert th.equal(model._adapted, model.policy.actor_vector().expand(2, -1))
    with pytest.raises(ValueError, match="lower `inner_lr` to `adapt`"):
        model.adapt(model_index=0, inner_lr=3e38)
    with pytest.raises(ValueError, match="lower `inner_lr` to `adapt`"):
        model.adapt(n_episodes=2, inner_lr=3e38)


def adapt_to_nan(model):
    model._adapted[:] = np.nan


def overflow_the_deviation(model):
    with th.no_grad():
        model.policy.log_std.fill_(100)
    model._begin_adapted()


@pytest.mark.parametrize(
    ("name", "spoil"),
    [*((name, adapt_to_nan) for name in ("box", "discrete", "multi_binary")), ("box", overflow_the_deviation)],
)
def test_no_action_that_is_no_number_is_sent(name, spoil):
    model = tiny_model(Drift(ACTION_SPACES[name])).learn(20)
    spoil(model)
    with pytest.raises(ValueError, match=r"no finite action for the observation \[.*real step 20, environment 0"):
        model.learn(20, reset_num_timesteps=False)
    assert model.env.get_attr("n_steps") == [20]
    assert model.replay_buffer.size() == 20


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "arguments",
    [dict(outer_optimizer="ppo", outer_kwargs=dict(learning_rate=100.0, n_epochs=1)), dict(target_kl=1e20)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The adaptations", "ignore:The line search")
def test_no_policy_is_adopted_whose_deviation_overflows(arguments, seed):
    # Its parameters, its objective and its KL divergence to the old policy are all finite
    model = tiny_model(seed=seed, **arguments).learn(20)
    assert is_usable(model.policy.actor, model.policy.actor_vector().unsqueeze(0), th.zeros(1, 1, 2)).all()


# ---------------------------------------------------------------- what is stored


@pytest.mark.parametrize("value", [1e39, -1e60, np.nan, np.inf])
@pytest.mark.parametrize("step", [27, 24], ids=["observation", "terminal observation"])
def test_what_single_precision_cannot_hold_stops_training(step, value):
    model = tiny_model(Double(random_start=False, bad={(step, "double"): value}))
    with pytest.raises(ValueError, match=f"NaN or infinite .*observation at real step {step}"):
        model.learn(60)
    assert model.replay_buffer.size() == step - 1
    everything_finite(model)


class Half(Drift):
    """An environment with observations in half precision; a worker process passes them on as they are computed, in single."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = spaces.Box(-np.inf, np.inf, self.observation_space.shape, np.float16)


@fork
@pytest.mark.parametrize(
    ("env_class", "where", "value", "named"),
    [
        (Half, (27, "obs"), 1e5, "observation at real step 27"),
        (Half, (24, "obs"), 1e5, "terminal observation at real step 24"),
        (Half, ("reset", "obs"), 1e5, "observation at real step 0"),
        (Drift, (27, "reward"), 1e39, "reward at real step 27"),
    ],
    ids=["half precision", "terminal", "first", "reward in single precision"],
)
def test_what_the_buffer_cannot_hold_stops_training_though_a_worker_can_send_it(env_class, where, value, named):
    # A DummyVecEnv would already hold the same as the buffer
    env = SubprocVecEnv([lambda: env_class(random_start=False, bad={where: value})], start_method="fork")
    model = tiny_model(env, reward_fn="learned", termination_fn=None)
    with pytest.raises(ValueError, match=f"a NaN or infinite {named}"):
        model.learn(60)
    everything_finite(model)
    env.close()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("norm_obs", [True, False])
def test_terminal_observations_under_vec_normalize(norm_obs, value):
    # Without clipping, an infinite observation stays infinite
    env = VecNormalize(vec_drift(random_start=False, bad={(24, "obs"): value}), norm_obs=norm_obs, clip_obs=np.inf)
    model = tiny_model(env)
    with pytest.raises(ValueError, match=r"terminal observation at real step 24.*So are the statistics of VecNormalize"):
        model.learn(60)
    everything_finite(model)


@pytest.mark.parametrize(("where", "kind"), [((27, "obs"), "observation"), ((27, "reward"), "reward")])
def test_the_message_says_that_the_statistics_are_not_intact(where, kind, tmp_path):
    env = VecNormalize(vec_drift(random_start=False, bad={where: np.nan}))
    model = tiny_model(env)
    with pytest.raises(ValueError, match=rf"infinite {kind} at real step 27.*VecNormalize are not.*VecCheckNan"):
        model.learn(60)
    everything_finite(model)
    before = parameters(model)
    model.save(tmp_path / "model")
    assert_same(parameters(MBMPO.load(tmp_path / "model")), before)


@pytest.mark.parametrize("column", ["obs", "next_obs", "reward"])
@pytest.mark.parametrize("value", [1e39, -1e300])
def test_no_ensemble_is_fitted_to_what_single_precision_cannot_hold(column, value):
    obs, action, reward = th.rand(20, 2).double(), th.rand(20, 2), th.rand(20).double()
    data = Transitions(obs, action, obs + 0.1, reward, th.zeros(20, dtype=th.bool))
    getattr(data, column)[3] = value
    env = Drift()
    ensemble = DynamicsEnsemble(env.observation_space, env.action_space, 2, net_arch=[8], learned_reward=True, seed=0)
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    with pytest.raises(ValueError, match="NaN or infinite: the dynamics cannot be fitted"):
        ensemble.fit(data, max_epochs=1)
    assert_same(ensemble.state_dict(), before)


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ((2, "obs"), "observation"),
        ((8, "obs"), "terminal observation"),
        (("reset", "obs"), "observation"),
        ((2, "reward"), "reward"),
    ],
)
def test_adaptation_to_episodes_with_numbers_that_are_none(where, named):
    model = tiny_model().learn(20)
    with pytest.raises(ValueError, match=f"`adapt` to returned a NaN or infinite {named}"):
        model.adapt(vec_drift(random_start=False, bad={where: np.nan}), n_episodes=2)
    model.adapt(vec_drift(), n_episodes=2)
