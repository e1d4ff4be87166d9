"""MBMPO as a whole: supported settings, acting policies, absence of side effects, and errors during training."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from tiny import ACTION_SPACES, Drift, Unknown, assert_same, parameters, push, tiny_model, vec_drift

from sb3_mbmpo import MBMPO, MlpPolicy
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


class Stop(BaseCallback):
    def __init__(self, at, error=None):
        super().__init__()
        self.at, self.error = at, error

    def _on_step(self):
        if self.num_timesteps < self.at:
            return True
        if self.error is not None:
            raise self.error
        return False


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

    monkeypatch.setattr("sb3_mbmpo.meta.outer_step.adapt", recorded)
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


# ---------------------------------------------------------------- real steps


@pytest.mark.parametrize(("total", "n_envs", "expected"), [(1, 1, 1), (33, 1, 33), (60, 3, 60), (61, 3, 63), (50, 4, 52)])
def test_no_more_real_steps_than_asked_for(total, n_envs, expected):
    model = tiny_model(vec_drift(n_envs)).learn(total)
    assert model.num_timesteps == expected
    assert sum(env.unwrapped.n_steps for env in model.env.envs) == expected
    assert model.replay_buffer.size() * n_envs == expected


class Rollouts(BaseCallback):
    """A callback that records the rows of each real rollout, and what the meta-policy would have done there."""

    def __init__(self):
        super().__init__()
        self.ends, self.greedy, self.n_updates = [], [], []

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.ends.append(self.num_timesteps)
        self.n_updates.append(self.model._n_updates)
        buffer = self.model.replay_buffer
        self.greedy.append(self.model.predict(buffer.observations[: buffer.size(), 0], deterministic=True)[0])


@pytest.mark.parametrize("chunks", [[70], [10, 10, 30, 20], [25, 45]])
def test_first_fit_waits_for_the_random_steps_and_there_are_no_others(chunks):
    rollouts = Rollouts()
    model = tiny_model(learning_starts=30, policy_kwargs=dict(net_arch=[8], log_std_init=-10.0), exploration="meta")
    for chunk in chunks:
        model.learn(chunk, reset_num_timesteps=False, callback=rollouts)
    first = rollouts.ends.index(30)
    assert rollouts.n_updates[: first + 2] == [0] * (first + 1) + [1]
    actions = model.replay_buffer.actions[: model.replay_buffer.size(), 0]
    end = 30
    assert np.abs(actions[:end] - rollouts.greedy[first]).max() > 0.3, "random"
    for k in range(first + 1, len(rollouts.ends)):
        start, end = end, rollouts.ends[k]
        np.testing.assert_allclose(actions[start:end], rollouts.greedy[k][start:end], atol=1e-2)


def test_adapted_policies_act_in_turn():
    """As in the authors' code, every episode uses another model's policy, until all tasks have had their turn."""
    model = tiny_model(Drift(length=5), n_tasks=4, policy_kwargs=dict(net_arch=[8], log_std_init=-10.0)).learn(20)
    constant = th.zeros(4, len(model.policy.actor_vector()))
    constant[:, :2] = -10.0  # log_std
    constant[:, -2:] = th.tensor([[-0.75], [-0.25], [0.25], [0.75]])  # the bias of the mean, in [-1, 1]
    model._adapted.copy_(constant)
    model.learn(40, reset_num_timesteps=False, callback=Stop(60))  # before they are adapted anew
    actions = model.replay_buffer.actions[20 : model.replay_buffer.size() - 1, 0, 0]  # in [-1, 2]
    who = np.rint((actions - 0.5) / 1.5 * 2 + 1.5).astype(int)
    episodes = who[[0, 5, 10, 15]]
    np.testing.assert_array_equal(who[:15], episodes[:3].repeat(5))
    assert sorted(episodes) == [0, 1, 2, 3]
    assert [task // 2 for task in episodes] in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_a_stopped_iteration_leaves_no_torn_transition():
    """The step at which a callback stops is not stored; continuing from the observation before it would invent dynamics."""
    model = tiny_model(Drift(ACTION_SPACES["discrete"]))
    for at in (7, 31):
        model.learn(40, reset_num_timesteps=False, callback=Stop(at))
    with pytest.raises(KeyboardInterrupt):
        model.learn(40, reset_num_timesteps=False, callback=Stop(60, KeyboardInterrupt()))
    model.learn(20, reset_num_timesteps=False)
    buffer = model.replay_buffer
    for obs, action, next_obs in zip(
        buffer.observations[: buffer.pos, 0],
        buffer.actions[: buffer.pos, 0],
        buffer.next_observations[: buffer.pos, 0],
        strict=True,
    ):
        np.testing.assert_array_equal(push(obs, action), next_obs)


def test_interrupted_model_can_be_saved_and_go_on(tmp_path):
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        model.learn(60, callback=Stop(33, KeyboardInterrupt()))
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = type(model).load(tmp_path / "model", env=Drift())
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.num_timesteps == 33
    assert loaded.replay_buffer.size() == 32
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 53


@pytest.mark.parametrize("where", ["fit", "imagination"])
def test_interrupted_training_can_be_saved_and_goes_on(where, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    model = tiny_model(n_meta_steps=3).learn(20)
    targets = {"fit": "dynamics.training.ParallelTraining.mean_loss", "imagination": "meta.training.estimate_advantages"}
    with monkeypatch.context() as patched:
        patched.setattr(f"sb3_mbmpo.{targets[where]}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.learn(20, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=Drift())
    assert_same(parameters(loaded), parameters(model))
    assert model.learn(20, reset_num_timesteps=False).num_timesteps == 60


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (("reset", "obs"), "observation"),
        ((27, "obs"), "observation"),
        ((27, "reward"), "reward"),
        ((24, "obs"), "terminal observation"),
    ],
)
def test_numbers_that_are_not_finite_stop_training(where, name, value, tmp_path):
    model = tiny_model(Drift(ACTION_SPACES["discrete"], random_start=False, bad={where: value}))
    steps = 0 if where[0] == "reset" else where[0]
    with pytest.raises(ValueError, match=f"NaN or infinite {name} at real step {steps}, environment 0"):
        model.learn(60)
    buffer = model.replay_buffer
    assert buffer.size() == max(0, steps - 1)
    for array in (buffer.observations, buffer.next_observations, buffer.rewards):
        assert np.isfinite(array[: buffer.size()]).all()
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = type(model).load(tmp_path / "model", env=Drift(ACTION_SPACES["discrete"]))
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.learn(20, reset_num_timesteps=False)


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


# ---------------------------------------------------------------- adapt


@pytest.mark.parametrize("how", [dict(env=Drift(), n_episodes=3), dict(model_index=1)], ids=["env", "model"])
@pytest.mark.parametrize("action_space", [ACTION_SPACES["box"], ACTION_SPACES["multi_discrete"]])
@pytest.mark.parametrize("options", [{}, dict(learn_inner_lr=True, n_inner_steps=2)], ids=["one-step", "two-steps"])
def test_adapt_returns_a_policy_and_leaves_the_model_alone(how, action_space, options, tmp_path):
    if "env" in how:
        how = {**how, "env": Drift(action_space)}
    model, untouched = (tiny_model(Drift(action_space), **options).learn(40) for _ in range(2))
    before = parameters(model)
    policy = model.adapt(**how)
    assert not th.equal(policy.actor_vector(), model.policy.actor_vector())
    np.testing.assert_array_equal(policy.actor_vector(), model.adapt(**how).actor_vector()) if "model_index" in how else None
    assert_same(before, parameters(model))
    for both in (model, untouched):
        both.learn(20, reset_num_timesteps=False)
    assert_same(parameters(model), parameters(untouched))

    mean_reward, _ = evaluate_policy(policy, vec_drift(action_space=action_space), n_eval_episodes=2)
    assert np.isfinite(mean_reward)
    policy.save(tmp_path / "policy")
    loaded = MlpPolicy.load(tmp_path / "policy")
    obs = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    np.testing.assert_array_equal(*(p.predict(obs, deterministic=True)[0] for p in (policy, loaded)))


def test_adapt_to_each_model_differs_and_a_step_size_of_zero_does_nothing():
    model = tiny_model().learn(20)
    assert not th.equal(model.adapt(model_index=0).actor_vector(), model.adapt(model_index=1).actor_vector())
    still = tiny_model(inner_lr=0.0).learn(20)
    for how in (dict(model_index=0), dict(n_episodes=2)):
        assert th.equal(still.adapt(**how).actor_vector(), still.policy.actor_vector())


@pytest.mark.parametrize("how", [dict(n_episodes=4), dict(model_index=1)], ids=["env", "model"])
@pytest.mark.parametrize("learned", [False, True])
def test_adapt_takes_the_step_size_and_the_steps_it_is_given(how, learned):
    # Every reset of this environment is the same, so that adaptations differ only in their arguments
    env = vec_drift(random_start=False)
    model = tiny_model(env, learn_inner_lr=learned).learn(20)
    trained = model._meta_parameters()

    def step(**kwargs):
        model._adopt(trained)
        return model.adapt(**how, **kwargs).actor_vector() - model.policy.actor_vector()

    th.testing.assert_close(step(inner_lr=0.02), 2 * step(inner_lr=0.01), rtol=1e-4, atol=1e-6)
    assert step(inner_lr=0.0).abs().max() == 0
    if not learned:
        assert th.equal(step(inner_lr=model.inner_lr, n_inner_steps=1), step())
        assert th.equal(step(n_inner_steps=2), tiny_step_twice(model, how))
    assert not th.equal(step(inner_lr=0.1, n_inner_steps=2), step(inner_lr=0.1))
    assert th.equal(step(baseline="critic"), step())
    assert not th.equal(step(baseline="linear"), step())
    assert not th.equal(step(baseline="zero"), step())


def tiny_step_twice(model, how):
    """Return the change of the parameters in an adaptation with two inner steps."""
    model.n_inner_steps = 2
    try:
        return model.adapt(**how).actor_vector() - model.policy.actor_vector()
    finally:
        model.n_inner_steps = 1


@pytest.mark.parametrize(("n_envs", "n_episodes", "n_inner_steps"), [(1, 3, 1), (2, 5, 2), (3, 2, 1)])
def test_adapt_does_the_episodes_it_was_asked_for(n_envs, n_episodes, n_inner_steps):
    model = tiny_model(n_inner_steps=n_inner_steps).learn(20)
    finished = []

    class Counting(Drift):
        def step(self, action):
            result = super().step(action)
            finished.append(result[2] or result[3])
            return result

    model.adapt(vec_drift(n_envs, Counting), n_episodes=n_episodes)
    # Environments that have finished their episodes continue while the others finish theirs
    assert n_episodes <= sum(finished) <= n_episodes + n_envs * n_inner_steps


def test_adapt_on_the_training_environment_begins_a_new_episode_afterwards():
    model = tiny_model().learn(25)
    env = model.env.envs[0].unwrapped
    model.adapt(n_episodes=1)
    resets = env.n_resets
    model.learn(1, reset_num_timesteps=False)
    assert env.n_resets == resets + 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(env=Drift(), model_index=0), "not to both"),
        (dict(model_index=2), "`model_index`.*at most 1"),
        (dict(model_index=-1), "`model_index`"),
        (dict(n_episodes=0), "`n_episodes`.*at least 1"),
        (dict(n_episodes=2, n_inner_steps=3), "`n_episodes`.*at least 3"),
        (dict(n_inner_steps=0), "`n_inner_steps`.*at least 1"),
        (dict(inner_lr=-0.1), "`inner_lr`.*at least 0"),
        (dict(baseline="square"), "`baseline` must be one of"),
        (dict(env=Drift(size=3)), "Observation spaces do not match"),
        (dict(env=Drift(spaces.Discrete(2))), "Action spaces do not match"),
    ],
)
def test_adapt_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        tiny_model().adapt(**arguments)


def starts_of(model, n_rows=2_000):
    """Return the indices in the buffer of the real steps from which imagined rollouts start; all observations differ."""
    trainer = model._meta_trainer(model._generators, n_threads=1)
    starts = trainer.sample_starts(4, n_rows // 4).flatten(0, 1)
    obs = model._transitions().obs
    is_there = (starts.unsqueeze(1) == obs.unsqueeze(0)).all(2)
    assert is_there.any(1).all(), "a start that is not a real state"
    return is_there.float().argmax(1)


def test_every_real_state_is_equally_likely_as_a_start():
    model = tiny_model(imagined_start="buffer", recent_starts=0.0).learn(60)
    counts = th.bincount(starts_of(model), minlength=60).double()
    assert len(counts) == 60
    # Pearson's chi-squared with 59 degrees of freedom is above 110 in one of 10,000 draws
    assert ((counts - 2_000 / 60).square() / (2_000 / 60)).sum() < 110


def test_a_share_of_the_starts_is_recent():
    model = tiny_model(imagined_start="buffer", recent_starts=0.7).learn(60)
    model._n_new_steps = 20  # as during the training that follows 20 real steps
    recent = float((starts_of(model) >= 40).double().mean())
    # 0.7 by choice, and a third of the others by chance: 0.8, with a standard deviation of 0.009
    assert 0.76 < recent < 0.84
    model.recent_starts = 1.0
    assert (starts_of(model) >= 40).all()


def test_the_newest_steps_are_the_last_rows_even_of_a_buffer_that_is_full():
    model = tiny_model(vec_drift(2), buffer_size=40, imagined_start="buffer").learn(100)
    assert model.replay_buffer.full
    assert model.replay_buffer.pos == 10
    rows = model._transitions()
    newest = (model.replay_buffer.pos - 1) % model.replay_buffer.buffer_size
    np.testing.assert_array_equal(rows.next_obs[-2:], model.replay_buffer.next_observations[newest])
    oldest = model.replay_buffer.pos
    np.testing.assert_array_equal(rows.obs[:2], model.replay_buffer.observations[oldest])


def test_what_was_met_since_the_last_fit_is_new_to_the_next(monkeypatch):
    seen = []
    model = tiny_model(vec_drift(2), n_steps=20, learning_starts=40)
    original = model.dynamics.fit

    def fit(data, **kwargs):
        seen.append((len(data.obs), kwargs["n_new_rows"]))
        return original(data, **kwargs)

    monkeypatch.setattr(model.dynamics, "fit", fit)
    model.learn(80)
    assert seen == [(40, 40), (60, 20), (80, 20)]


def test_a_model_without_its_buffer_imagines_from_a_sample_of_it(tmp_path):
    model = tiny_model(imagined_start="buffer").learn(40)
    known = {tuple(row) for row in model._transitions().obs.tolist()}
    model.save(tmp_path / "model")
    loaded = MBMPO.load(tmp_path / "model", env=Drift())
    first = loaded.imagined_env(n_envs=30, seed=0).reset()
    assert {tuple(row) for row in first.tolist()} <= known
    assert loaded.adapt(model_index=0).predict(first)[0].shape == (30, 2)


@pytest.mark.parametrize("imagined_start", ["initial", "buffer"])
def test_imagining_before_any_real_step_is_refused(imagined_start):
    model = tiny_model(imagined_start=imagined_start)
    for imagine in (lambda: model.adapt(model_index=0), model.imagined_env):
        with pytest.raises(ValueError, match="call `learn` first"):
            imagine()


# ---------------------------------------------------------------- reward and termination


BAD_REWARDS = {
    "column": (lambda o, a, n: n[:, :1], r"shape \(5,\).*shape \(5, 1\)"),
    "one number": (lambda o, a, n: n.mean(), r"shape \(5,\).*shape \(\)"),
    "wrong axis": (lambda o, a, n: n.sum(0), r"shape \(5,\).*shape \(2,\)"),
    "integers": (lambda o, a, n: n.sum(1).long(), r"floating.*torch.int64"),
    "numpy": (lambda o, a, n: n.sum(1).numpy(), "returned a ndarray: use torch"),
    "other device": (lambda o, a, n: n.sum(1).to("meta"), "on cpu.*on meta"),
}


@pytest.mark.parametrize(("reward_fn", "match"), BAD_REWARDS.values(), ids=BAD_REWARDS)
def test_bad_reward_function_is_refused_before_any_real_step(reward_fn, match):
    model = tiny_model(reward_fn=reward_fn)
    with pytest.raises(ValueError, match=match):
        model.learn(40)
    assert model.env.envs[0].unwrapped.n_steps == 0


@pytest.mark.parametrize("termination_fn", [lambda n: n[:, 0], lambda n: n > 1], ids=["float", "shape"])
def test_bad_termination_function_is_refused_before_any_real_step(termination_fn):
    model = tiny_model(termination_fn=termination_fn)
    with pytest.raises(ValueError, match=r"termination_fn must return a torch.bool tensor of shape \(5,\)"):
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
