"""Deliberately bad models: they have exactly the requested errors, in imagined rollouts and in ModelVecEnv."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from tiny import tiny_model

from sb3_mbmpo import MBMPO, DynamicsEnsemble, ModelVecEnv
from sb3_mbmpo.dynamics import Transitions, output_bias_array, perturbation

M, B, D = 3, 5, 2  # members, rows, observation size
BIAS = np.array([[0.5, 0], [-1, 2], [0, 0.25]])
UNIT = th.tensor([0.1, 10.0])  # standard deviations of the observed changes


def ensemble(**kwargs):
    """Make an ensemble with random weights, and the statistics of data whose changes have the deviations above."""
    made = DynamicsEnsemble(spaces.Box(-9, 9, (D,)), spaces.Box(-1, 1, (1,)), M, net_arch=(4,), seed=0, **kwargs)
    with th.no_grad():
        made.target_std[:D] = UNIT
        made.observation_low.fill_(-1)
        made.observation_high.fill_(1)
    return made


def batch(members=M):
    rng = np.random.default_rng(0)
    return (th.as_tensor(rng.uniform(-1, 1, (members, B, width)), dtype=th.float32) for width in (D, 1))


def perturbed_step_fn(dynamics, clip_margin, generator, members, output_bias, output_noise):
    options = dict(clip_margin=clip_margin, members=members, output_bias=output_bias, output_noise=output_noise)
    return perturbation.perturbed_step_fn(dynamics, generator, **options)


def generator(seed=0):
    return th.Generator().manual_seed(seed)


@pytest.mark.parametrize("members", [None, [1], [2, 0]])
def test_bias_is_added_to_the_member_it_belongs_to(members):
    dynamics, (obs, action) = ensemble(learned_reward=True), batch(M if members is None else len(members))
    exact = dynamics.step_fn(generator=generator(), members=members)(obs, action)
    biased = perturbed_step_fn(dynamics, None, generator(), members, BIAS, 0.0)(obs, action)
    expected = exact.next_obs + (th.as_tensor(BIAS[members or range(M)]).float() * UNIT).unsqueeze(1)
    th.testing.assert_close(biased.next_obs, expected, rtol=1e-6, atol=1e-6)
    assert th.equal(biased.reward, exact.reward)


def test_noise_is_normal_in_units_of_the_changes():
    dynamics, (obs, action) = ensemble(), batch()
    noisy = perturbed_step_fn(dynamics, None, generator(7), None, np.zeros((M, D)), 0.5)(obs, action).next_obs
    drawn = th.randn((M, B, D), generator=generator(7))
    expected = dynamics.step_fn(None)(obs, action).next_obs + 0.5 * drawn * UNIT
    th.testing.assert_close(noisy, expected, rtol=1e-6, atol=1e-6)


def test_bias_and_noise_come_before_the_clipping():
    dynamics, (obs, action) = ensemble(), batch()
    args = (generator(7), None, BIAS, 0.5)
    unclipped = perturbed_step_fn(dynamics, None, *args)(obs, action).next_obs
    clipped = perturbed_step_fn(dynamics, 0.25, generator(7), *args[1:])(obs, action).next_obs
    assert unclipped.abs().max() > 1.25, "otherwise there is nothing to clip"
    assert th.equal(clipped, unclipped.clamp(-1.25, 1.25))


def test_without_errors_it_is_the_step_function():
    dynamics, (obs, action) = ensemble(probabilistic=True), batch()
    one, other = generator(), generator()
    step = perturbed_step_fn(dynamics, 0.1, one, None, np.zeros((M, D)), 0.0)
    assert th.equal(step(obs, action).next_obs, dynamics.step_fn(0.1, generator=other)(obs, action).next_obs)
    assert th.equal(one.get_state(), other.get_state()), "no additional random numbers"


@pytest.mark.parametrize("probabilistic", [False, True])
def test_noise_that_is_given_replaces_the_generators(probabilistic):
    dynamics, (obs, action) = ensemble(probabilistic=probabilistic), batch()
    step = perturbed_step_fn(dynamics, None, generator(1), None, BIAS, 0.5)
    own = generator(1)  # first the members draw theirs
    widths = [D, D] if probabilistic else [D]
    noise = th.cat([th.randn((M, B, width), generator=own) for width in widths], dim=-1)
    assert step.noise_dim == sum(widths)
    given = perturbed_step_fn(dynamics, None, None, None, BIAS, 0.5)(obs, action, noise)
    assert th.equal(given.next_obs, step(obs, action).next_obs)


def test_what_never_changes_has_no_error():
    dynamics, (obs, action) = ensemble(), batch()
    with th.no_grad():
        dynamics.target_std[1] = 0
    exact = dynamics.step_fn(None)(obs, action).next_obs
    bad = perturbed_step_fn(dynamics, None, generator(), None, np.ones((M, D)), 1.0)(obs, action).next_obs
    assert th.equal(bad[..., 1], exact[..., 1])
    assert not th.equal(bad[..., 0], exact[..., 0])


def test_a_number_is_the_standard_deviation_of_the_biases():
    draws = np.random.default_rng(0).standard_normal((M, D))
    np.testing.assert_array_equal(output_bias_array(0.5, draws), 0.5 * draws)
    np.testing.assert_array_equal(output_bias_array(BIAS.tolist(), draws), BIAS)


@pytest.mark.parametrize(
    "bad", [-0.1, np.nan, np.zeros(D), np.zeros((M + 1, D)), np.full((M, D), np.inf), "much", [[1], [1, 2]]]
)
def test_a_bias_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match="`output_bias` must be"):
        output_bias_array(bad, np.zeros((M, D)))


# ---------------------------------------------------------------- ModelVecEnv


def zero_reward(obs, action, next_obs):
    return th.zeros(len(obs))


def env(dynamics, **kwargs):
    starts = np.random.default_rng(1).uniform(-1, 1, (20, D))
    return ModelVecEnv(dynamics, starts, zero_reward, **{"n_envs": 8, "clip_margin": None, "seed": 3, **kwargs})


def test_an_environment_has_the_error_of_its_member():
    dynamics = ensemble()
    exact, biased = env(dynamics), env(dynamics, output_bias=BIAS)
    np.testing.assert_array_equal(exact.reset(), biased.reset())
    action = np.zeros((8, 1))
    obs, _, _, infos = exact.step(action)
    members = [info["model_index"] for info in infos]
    assert len(set(members)) == M
    biased_obs, _, _, biased_infos = biased.step(action)
    assert [info["model_index"] for info in biased_infos] == members
    np.testing.assert_allclose(biased_obs, obs + BIAS[members] * UNIT.numpy(), rtol=1e-5, atol=1e-6)


def test_a_drawn_bias_belongs_to_the_seed_and_stays_for_all_episodes():
    dynamics = ensemble()

    def error(seed, episode):
        biased, exact = (env(dynamics, n_envs=40, seed=seed, output_bias=size) for size in (1.0, 0.0))
        for _ in range(episode + 1):
            biased.reset(), exact.reset()
        (obs, _, _, infos), (exact_obs, *_) = (e.step(np.zeros((40, 1))) for e in (biased, exact))
        by_member = {info["model_index"]: row for info, row in zip(infos, (obs - exact_obs) / UNIT.numpy(), strict=True)}
        return np.stack([by_member[m] for m in range(M)])

    first = error(3, 0)
    expected = np.random.default_rng(3).standard_normal((M, D))
    np.testing.assert_allclose(first, expected, atol=1e-4)
    np.testing.assert_allclose(error(3, 2), first, atol=1e-4)
    assert np.abs(error(4, 0) - first).max() > 0.1


@pytest.mark.parametrize(
    ("kwargs", "match"), [({"output_noise": -1}, "`output_noise`"), ({"output_bias": -1}, "`output_bias`")]
)
def test_environment_refuses(kwargs, match):
    with pytest.raises(ValueError, match=match):
        env(ensemble(), **kwargs)


# ---------------------------------------------------------------- MBMPO


def bad_model(seed=0, **kwargs):
    return tiny_model(seed=seed, dynamics_kwargs=dict(net_arch=[8], max_epochs=2, clip_margin=None, **kwargs))


def test_the_imagination_has_the_errors_and_the_ensemble_has_not():
    bias = [[1.0, 0.0], [0.0, -2.0]]
    model, exact = bad_model(output_bias=bias), bad_model()
    data = Transitions(
        *(th.as_tensor(x) for x in np.random.default_rng(0).normal(size=(4, 50, 2))[:3]), th.zeros(50), th.zeros(50)
    )
    for either in (model, exact):
        either.dynamics.fit(data, max_epochs=2, generator=generator())
        either._initial_obs = np.zeros((1, 2), np.float32)
    obs, action = th.zeros((2, 3, 2)), th.zeros((2, 3, 2))
    biased, plain = (m._model_env(None, with_errors=True).step(obs, action).next_obs for m in (model, exact))
    unit = exact.dynamics.target_std[:2]
    th.testing.assert_close(biased - plain, (th.tensor(bias) * unit).unsqueeze(1).expand(2, 3, 2), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        model.dynamics.predict(np.zeros((3, 2)), np.zeros((3, 2))), exact.dynamics.predict(np.zeros((3, 2)), np.zeros((3, 2)))
    )


def test_bad_models_are_the_same_in_the_imagined_environment_and_after_loading(tmp_path):
    model = bad_model(seed=None, output_bias=0.3, output_noise=0.1).learn(20)
    assert np.abs(model._output_bias()).max() > 0
    model.save(tmp_path / "model")
    loaded = MBMPO.load(tmp_path / "model", env=model.get_env())
    np.testing.assert_array_equal(loaded._output_bias(), model._output_bias())
    assert loaded._dynamics_options.output_noise == 0.1
    one, other = (m.imagined_env(n_envs=6, seed=0) for m in (model, loaded))
    exact = ModelVecEnv(
        model.dynamics, model._initial_obs, lambda o, a, n: n[:, 0], n_envs=6, horizon=4, clip_margin=None, seed=0
    )
    np.testing.assert_array_equal(one.reset(), other.reset())
    exact.reset()
    action = np.zeros((6, 2))
    steps = [e.step(action)[0] for e in (one, other, exact)]
    np.testing.assert_array_equal(steps[0], steps[1])
    assert np.abs(steps[0] - steps[2]).max() > 0


def test_bad_models_train_as_others_do():
    models = [bad_model(output_bias=0.3, output_noise=0.1).learn(40) for _ in range(2)]
    assert th.equal(*(model.policy.actor_vector() for model in models))
    assert not th.equal(models[0].policy.actor_vector(), bad_model().learn(40).policy.actor_vector())
    models[0].adapt(model_index=1)


@pytest.mark.parametrize("kwargs", [dict(output_bias=[[1.0, 2.0, 3.0]]), dict(output_bias=-1.0), dict(output_noise=-1.0)])
def test_refused_before_any_real_step(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        bad_model(**kwargs)
