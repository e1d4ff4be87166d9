"""MBMPO as a whole: supported settings, seeds, and the functions that it was given."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from tiny import ACTION_SPACES, Drift, Unknown, assert_same, parameters, tiny_model

from sb3_mbmpo.meta.adaptation import adapt


class FlakyExtractor(BaseFeaturesExtractor):
    """A features extractor whose layers behave differently in training mode."""

    def __init__(self, observation_space, features_dim=6):
        super().__init__(observation_space, features_dim)
        self.layers = th.nn.Sequential(
            th.nn.Linear(observation_space.shape[0], features_dim), th.nn.BatchNorm1d(features_dim), th.nn.Dropout(0.5)
        )

    def forward(self, observations):
        return self.layers(observations)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("env_class", [Drift, Unknown])
@pytest.mark.parametrize("action_space", ACTION_SPACES.values(), ids=ACTION_SPACES)
def test_learns_on_every_action_space(action_space, env_class):
    model = tiny_model(env_class(action_space))
    before = parameters(model)
    model.learn(60)
    assert model.num_timesteps == model.env.envs[0].unwrapped.n_steps == 60
    after = parameters(model)
    assert all(th.isfinite(value).all() for value in after.values())
    for learned in ("policy.action_net.weight", "dynamics.weights.0", "policy.observation_mean"):
        assert not th.equal(before[learned], after[learned])
    assert (model.dynamics.learned_reward, model.dynamics.learned_termination) == (env_class is Unknown,) * 2
    action, state = model.predict(model.env.reset(), deterministic=True)
    assert state is None
    assert model.action_space.contains(action[0])


@pytest.mark.parametrize(
    "options",
    [
        dict(outer_optimizer="ppo", outer_kwargs=dict(n_epochs=2)),
        dict(n_inner_steps=2),
        dict(first_order=True),
        dict(baseline="zero", normalize_advantage=False, gae_lambda=0.9),
        dict(imagined_start="buffer"),
        dict(exploration="meta", ent_coef=0.01),
        dict(n_tasks=6, n_models=3, sub_sampling_factor=2),
        dict(dynamics_kwargs=dict(net_arch=[8], max_epochs=2, probabilistic=True, activation_fn="swish")),
        dict(dynamics_kwargs=dict(net_arch=[], max_epochs=2, weight_norm=True, reinit_every=1, clip_margin=None)),
        dict(learning_rate=lambda progress: 1e-3 * progress, buffer_size=30),
        dict(policy_kwargs=dict(net_arch=dict(pi=[6, 5]), activation_fn=th.nn.ReLU, log_std_init=-1.0, ortho_init=False)),
        dict(policy_kwargs=dict(net_arch=[], normalize_observation=False)),
        dict(policy_kwargs=dict(net_arch=[6], features_extractor_class=FlakyExtractor, share_features_extractor=False)),
        dict(n_steps=np.int64(20), gamma=np.float32(0.9)),
    ],
    ids=lambda options: "-".join(options),
)
def test_options_run(options):
    model = tiny_model(**options)
    before = parameters(model)
    model.learn(40)
    assert all(th.isfinite(value).all() for value in parameters(model).values())
    assert not th.equal(before["policy.action_net.weight"], model.policy.action_net.weight)


def test_learned_inner_step_sizes_move():
    model = tiny_model(learn_inner_lr=True).learn(20)
    assert len(model.learned_inner_lr) == len(model.policy.actor_vector())
    assert not th.equal(model.learned_inner_lr, th.full_like(model.learned_inner_lr, 0.1))


def test_layers_with_a_training_mode_stay_in_evaluation_mode():
    """Two forward passes of one parameter set must agree: likelihood ratios divide them."""
    model = tiny_model(policy_kwargs=dict(net_arch=[6], features_extractor_class=FlakyExtractor)).learn(40)
    assert not model.policy.training
    statistics = model.policy.features_extractor.layers[1].running_mean
    assert th.equal(statistics, th.zeros_like(statistics)), "imagined rollouts must not leak into batch statistics"
    obs = model.env.reset()
    np.testing.assert_array_equal(*(model.predict(obs, deterministic=True)[0] for _ in range(2)))


@pytest.mark.parametrize("outer_optimizer", ["trpo", "ppo"])
def test_the_chunk_size_bounds_what_is_differentiated_at_a_time_and_changes_nothing_else(monkeypatch, outer_optimizer):
    # Strong damping, because conjugate gradient would amplify rounding errors that depend on the order of sums
    settings = dict(n_tasks=4, n_imagined_rollouts=3, horizon=4, outer_optimizer=outer_optimizer, cg_damping=0.1)
    whole = tiny_model(**settings).learn(40)
    n_tasks_at_a_time = []

    def recorded(actor, theta, batches, *args, **kwargs):
        n_tasks_at_a_time.append(len(batches[0].policy_input))
        return adapt(actor, theta, batches, *args, **kwargs)

    monkeypatch.setattr("sb3_mbmpo.meta.problem.adapt", recorded)
    monkeypatch.setattr("sb3_mbmpo.meta.training.adapt", recorded)
    small = tiny_model(chunk_size=3 * 4, **settings).learn(40)
    assert set(n_tasks_at_a_time) == {1}
    th.testing.assert_close(parameters(small), parameters(whole))


def test_without_meta_steps_only_the_dynamics_learn():
    model = tiny_model(n_meta_steps=0)
    theta, weights = model.policy.actor_vector(), model.dynamics.weights[0].clone()
    model.learn(60)
    assert th.equal(theta, model.policy.actor_vector())
    assert not th.equal(weights, model.dynamics.weights[0])


def test_predict_on_one_or_many_observations():
    model = tiny_model()
    obs = np.ones((5, 2), np.float32)
    many, _ = model.predict(obs, deterministic=True)
    one, _ = model.predict(obs[0], deterministic=True)
    assert many.shape == (5, 2)
    np.testing.assert_allclose(one, many[0], rtol=1e-6)
    samples, _ = model.predict(np.ones((200, 2), np.float32), deterministic=False)
    assert samples.std() > 0
    assert (samples >= model.action_space.low).all()
    assert (samples <= model.action_space.high).all()


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("action_space", [ACTION_SPACES["box"], ACTION_SPACES["discrete"]])
def test_same_seed_same_numbers(action_space):
    one, same, other = (tiny_model(Drift(action_space), seed=seed).learn(60) for seed in (1, 1, 2))
    assert_same(parameters(one), parameters(same))
    np.testing.assert_array_equal(one.replay_buffer.observations, same.replay_buffer.observations)
    assert not th.equal(one.policy.actor_vector(), other.policy.actor_vector())


def test_set_random_seed_begins_the_streams_anew():
    models = [tiny_model(Drift(), seed=None) for _ in range(2)]
    models[1].set_parameters(models[0].get_parameters())
    for model in models:
        model.set_random_seed(5)
        model.set_random_seed(None)
    assert_same(*(parameters(model.learn(40)) for model in models))


def test_training_neither_uses_nor_moves_global_generators():
    models = []
    for seed in (1, 2):
        model = tiny_model()
        th.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        states = th.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        models.append(model.learn(40))
        np.testing.assert_array_equal(states[0], th.get_rng_state())
        np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert_same(*map(parameters, models))


# ---------------------------------------------------------------- reward and termination

BAD_FUNCTIONS = {
    "column": (dict(reward_fn=lambda o, a, n: n[:, :1]), r"shape \(5,\).*shape \(5, 1\)"),
    "one number": (dict(reward_fn=lambda o, a, n: n.mean()), r"shape \(5,\).*shape \(\)"),
    "wrong axis": (dict(reward_fn=lambda o, a, n: n.sum(0)), r"shape \(5,\).*shape \(2,\)"),
    "integers": (dict(reward_fn=lambda o, a, n: n.sum(1).long()), r"floating.*torch.int64"),
    "numpy": (dict(reward_fn=lambda o, a, n: n.sum(1).numpy()), "returned a ndarray: use torch"),
    "other device": (dict(reward_fn=lambda o, a, n: n.sum(1).to("meta")), "on cpu.*on meta"),
    **{
        name: (dict(termination_fn=fn), r"termination_fn must return a torch.bool tensor of shape \(5,\)")
        for name, fn in {"float": lambda n: n[:, 0], "shape": lambda n: n > 1}.items()
    },
}


@pytest.mark.parametrize(("arguments", "match"), BAD_FUNCTIONS.values(), ids=BAD_FUNCTIONS)
def test_a_bad_function_is_refused_before_any_real_step(arguments, match):
    model = tiny_model(**arguments)
    with pytest.raises(ValueError, match=match):
        model.learn(40)
    assert model.env.envs[0].unwrapped.n_steps == 0


def test_functions_that_contradict_the_environment_are_warned_of_once():
    with pytest.warns(UserWarning, match="contradicts|misses") as caught:
        tiny_model(reward_fn=lambda o, a, n: n.sum(1), termination_fn=lambda n: n[:, 0] < 0.5).learn(60)
    messages = [str(warning.message) for warning in caught if "`horizon`" not in str(warning.message)]
    assert [message.split(" (")[0] for message in messages] == ["The termination function", "The reward function"]
    assert "reward_fn='learned'" in messages[1]


def test_set_env_brings_its_own_functions():
    class Paid(Drift):
        @staticmethod
        def reward(obs, action, next_obs):
            return next_obs[:, 0] * 0 + 7.0

    model = tiny_model().learn(20)
    model.set_env(Paid())
    env = model.imagined_env(n_envs=2, horizon=3)
    env.reset()
    assert env.step(np.zeros((2, 2)))[1].tolist() == [7.0, 7.0]


def test_verbose_says_once_what_was_resolved(capsys):
    tiny_model(verbose=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MBMPO:")]
    assert len(lines) == 1
    for part in ("Box(-inf, inf, (2,)", "reward: env.reward", "termination: env.done", "horizon: 4", "models", "device: cpu"):
        assert part in lines[0]
