from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.wrappers import TimeLimit
from sb3_contrib import TRPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from sb3_mbmpo import DynamicsEnsemble, ModelVecEnv
from sb3_mbmpo.common.distributions import DiagGaussian
from sb3_mbmpo.dynamics import Transitions
from sb3_mbmpo.imagination.model_env import ModelEnv
from sb3_mbmpo.imagination.rollouts import imagine, task_groups

OBS_DIM, N_MODELS = 3, 3
BOX_ACTIONS = spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))


def box(dtype=np.float32, size=OBS_DIM):
    return spaces.Box(-100, 100, (size,), dtype)


def distance_reward(obs, action, next_obs):
    return -next_obs.square().sum(1) - 0.1 * action.reshape(len(obs), -1).float().square().sum(1)


def linear_ensemble(n_models=N_MODELS, observation_space=None, action_space=BOX_ACTIONS, **kwargs):
    """Make an ensemble whose member ``m`` adds ``m + 1`` to every number of the observation, whatever the action."""
    ensemble = DynamicsEnsemble(observation_space or box(), action_space, n_models, net_arch=(), **kwargs)
    with th.no_grad():
        ensemble.weights[0].zero_()
        ensemble.biases[0].zero_()
        ensemble.biases[0][..., : ensemble.observation_dim] = th.arange(1.0, n_models + 1).view(-1, 1, 1)
    return ensemble


def fit(ensemble, seed=0):
    rng = np.random.default_rng(seed)
    ensemble.action_space.seed(seed)
    action = np.stack([ensemble.action_space.sample() for _ in range(200)])
    obs, next_obs = (th.as_tensor(rng.normal(size=(200, ensemble.observation_dim))) for _ in range(2))
    reward, terminated = th.as_tensor(rng.normal(size=200)), th.as_tensor(rng.random(200) < 0.1)
    action = ensemble.codec.from_numpy(action, ensemble.device)
    generator = th.Generator().manual_seed(seed)
    ensemble.fit(
        Transitions(obs, action, next_obs, reward, terminated), max_epochs=2, max_gradient_steps=50, generator=generator
    )
    return ensemble


def fitted_ensemble(n_models=N_MODELS, action_space=BOX_ACTIONS, **kwargs):
    return fit(DynamicsEnsemble(box(), action_space, n_models, net_arch=(16,), seed=0, **kwargs))


def starts(rows=20, seed=1):
    return np.random.default_rng(seed).normal(size=(rows, OBS_DIM)).astype(np.float32)


def random_actions(env, steps, seed=2):
    env.action_space.seed(seed)
    return np.array([[env.action_space.sample() for _ in range(env.num_envs)] for _ in range(steps)])


def play(env, actions):
    """Return the first observations, and (obs, rewards, dones, infos) of each step."""
    return env.reset(), [env.step(action) for action in actions]


def assert_same(left, right):
    np.testing.assert_array_equal(left[0], right[0])
    for one, other in zip(left[1], right[1], strict=True):
        for a, b in zip(one[:3], other[:3], strict=True):
            np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- SB3's contract


class CountingEnv(gym.Env):
    """The first member of ``linear_ensemble`` as a real environment, whose reward is the action."""

    def __init__(self, dtype, end):
        self.observation_space, self.action_space, self.end = box(dtype), BOX_ACTIONS, end

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = np.ones(OBS_DIM, self.observation_space.dtype)
        return self.obs.copy(), {}

    def step(self, action):
        self.obs += 1
        return self.obs.copy(), float(action[0]), bool(self.obs[0] >= self.end), False, {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("horizon", "end"), [(4, np.inf), (100, 5), (4, 5), (3, 5), (1, np.inf)])
def test_behaves_as_dummy_vec_env(horizon, end, dtype):
    real = DummyVecEnv([lambda: TimeLimit(CountingEnv(dtype, end), horizon)] * 2)
    env = ModelVecEnv(
        linear_ensemble(1, box(dtype)),
        np.ones((1, OBS_DIM)),
        lambda obs, action, next_obs: action[:, 0],
        lambda next_obs: next_obs[:, 0] >= end,
        n_envs=2,
        horizon=horizon,
    )
    assert env.observation_space == real.observation_space
    assert env.action_space == real.action_space
    first, first_real = env.reset(), real.reset()
    np.testing.assert_array_equal(first, first_real)
    assert first.dtype == first_real.dtype
    for action in random_actions(env, 12):
        *arrays, infos = env.step(action)
        *real_arrays, real_infos = real.step(action)
        for array, real_array in zip(arrays, real_arrays, strict=True):
            np.testing.assert_array_equal(array, real_array)
            assert array.dtype == real_array.dtype
        for info, real_info in zip(infos, real_infos, strict=True):
            assert info["TimeLimit.truncated"] is real_info["TimeLimit.truncated"]
            assert ("terminal_observation" in info) == ("terminal_observation" in real_info)
            if "terminal_observation" in info:
                np.testing.assert_array_equal(info["terminal_observation"], real_info["terminal_observation"])
                assert info["terminal_observation"].dtype == real_info["terminal_observation"].dtype


def test_episodes_end_one_by_one():
    begins = np.array([[0.0], [1], [2], [3]])
    env = ModelVecEnv(
        linear_ensemble(1, box(size=1)), begins, lambda o, a, n: n[:, 0], lambda n: n[:, 0] >= 5, n_envs=8, horizon=4, seed=0
    )
    expected, age = env.reset(), np.zeros(8)
    assert len(np.unique(expected)) > 1, "otherwise all would end together"
    for action in random_actions(env, 30):
        obs, rewards, dones, infos = env.step(action)
        expected, age = expected + 1, age + 1
        np.testing.assert_array_equal(rewards, expected[:, 0])  # of the last state, although another episode begins
        np.testing.assert_array_equal(dones, (expected[:, 0] >= 5) | (age == 4))
        for i in np.flatnonzero(dones):
            np.testing.assert_array_equal(infos[i]["terminal_observation"], expected[i])
            assert infos[i]["TimeLimit.truncated"] == (expected[i, 0] < 5)
            assert obs[i] in begins
            expected[i], age[i] = obs[i], 0
        np.testing.assert_array_equal(obs, expected)


def test_what_it_returned_stays_as_it_was():
    env = ModelVecEnv(linear_ensemble(1), starts(), distance_reward, n_envs=2)
    obs = env.reset()
    kept = obs.copy()
    next_obs, rewards, *_ = env.step(random_actions(env, 1)[0])
    np.testing.assert_array_equal(obs, kept)
    next_obs += 1000
    rewards += 1000
    obs, rewards, *_ = env.step(random_actions(env, 1)[0])
    np.testing.assert_allclose(obs, kept + 2, rtol=1e-6)
    assert (rewards < 1000).all()


def test_start_obs_stay_the_callers():
    start_obs = np.zeros((1, OBS_DIM), dtype=np.float32)
    env = ModelVecEnv(linear_ensemble(1), start_obs, distance_reward, n_envs=2, horizon=1)
    start_obs += 1
    first, steps = play(env, random_actions(env, 3))
    assert (start_obs == 1).all()
    assert all((obs == 0).all() for obs in (first, *(obs for obs, *_ in steps)))


def test_box_actions_are_clipped_to_their_bounds():
    env = ModelVecEnv(linear_ensemble(), starts(), lambda obs, action, next_obs: action.sum(1), n_envs=2)
    env.reset()
    _, rewards, *_ = env.step(np.array([[9.0, 9], [-9, -9]]))
    np.testing.assert_array_equal(rewards, [2 + 1, -2 + 0])


@pytest.mark.parametrize(
    ("action_space", "shape"),
    [(spaces.Discrete(3), (4,)), (spaces.MultiDiscrete([3, 2]), (4, 2)), (spaces.MultiBinary(2), (4, 2))],
)
def test_reward_function_gets_choices(action_space, shape):
    def reward_fn(obs, action, next_obs):
        assert action.shape == shape
        assert action.dtype == th.long
        return action.reshape(4, -1).sum(1).float()

    env = ModelVecEnv(linear_ensemble(action_space=action_space), starts(), reward_fn, n_envs=4)
    env.reset()
    action = random_actions(env, 1)[0]
    _, rewards, *_ = env.step(action)
    np.testing.assert_array_equal(rewards, action.reshape(4, -1).sum(1))


def test_learned_reward_and_termination():
    ensemble = linear_ensemble(2, learned_reward=True, learned_termination=True)
    with th.no_grad():
        ensemble.weights[0][:, 0, -2] = 10  # reward: ten times the first number of obs
        ensemble.weights[0][:, 0, -1], ensemble.biases[0][..., -1] = 1, -1.5  # logit: that number - 1.5
    env = ModelVecEnv(ensemble, np.zeros((1, OBS_DIM)), n_envs=2, model_index=0)
    env.reset()
    results = [env.step(action) for action in random_actions(env, 3)]
    np.testing.assert_array_equal([rewards[0] for _, rewards, *_ in results], [0, 10, 20])
    np.testing.assert_array_equal([dones[0] for *_, dones, _ in results], [False, False, True])
    # Functions take precedence over learned heads
    never = ModelVecEnv(ensemble, starts(), distance_reward, lambda n: th.zeros(len(n), dtype=th.bool), n_envs=2, horizon=50)
    never.reset()
    for action in random_actions(never, 10):
        obs, rewards, dones, _ = never.step(action)
        assert not dones.any()
        np.testing.assert_allclose(rewards, -(obs**2).sum(1) - 0.1 * (action**2).sum(1), rtol=1e-5)


def test_integer_observations_are_rounded_within_bounds():
    space = spaces.Box(0, 255, (1,), np.uint8)
    ensemble = linear_ensemble(1, space)
    with th.no_grad():
        ensemble.biases[0].fill_(-0.4)
    env = ModelVecEnv(ensemble, np.array([[1]]), lambda o, a, n: n[:, 0], n_envs=1, clip_margin=None)
    first, steps = play(env, random_actions(env, 5))
    assert [int(first[0, 0]), *(int(obs[0, 0]) for obs, *_ in steps)] == [1, 1, 0, 0, 0, 0]
    assert first.dtype == steps[0][0].dtype == np.uint8


# ---------------------------------------------------------------- agreement with imagined rollouts


@pytest.mark.parametrize("model_index", range(N_MODELS))
@pytest.mark.parametrize("probabilistic", [False, True])
def test_steps_are_those_of_the_step_function(model_index, probabilistic):
    ensemble = fitted_ensemble(probabilistic=probabilistic)
    env = ModelVecEnv(ensemble, starts(), distance_reward, n_envs=7, model_index=model_index, clip_margin=0.2, seed=5)
    generator = th.Generator().manual_seed(int(np.random.default_rng(5).integers(2**63)))
    step = ensemble.step_fn(0.2, generator=generator, members=[model_index])
    expected = th.as_tensor(env.reset())
    for action in random_actions(env, 10):
        expected = step(expected[None], th.as_tensor(action)[None]).next_obs[0]
        np.testing.assert_array_equal(env.step(action)[0], expected)


@pytest.mark.parametrize("learned", [False, True])
def test_episodes_are_those_of_imagine(learned):
    ensemble = fitted_ensemble(n_models=1, learned_reward=learned, learned_termination=learned)
    if learned:
        with th.no_grad():
            ensemble.weights[-1][..., -1] *= 100  # a logit that is sometimes positive
    reward_fn = None if learned else distance_reward
    termination_fn = None if learned else (lambda next_obs: next_obs[:, 0] > 0.5)
    env = ModelVecEnv(ensemble, starts(), reward_fn, termination_fn, n_envs=30, horizon=12, clip_margin=0.1, seed=0)
    functions = dict(reward_fn=reward_fn, termination_fn=termination_fn)
    model_env = ModelEnv.of(ensemble, **functions, clip_margin=0.1)

    def act(policy_input):
        return DiagGaussian(th.sin(policy_input[..., :2]), th.full((1, 1, 2), -1.0))

    obs = env.reset()
    options = dict(to_policy_input=lambda obs: obs, horizon=12, generators=[th.Generator().manual_seed(0)])
    imagined = imagine(task_groups([model_env], 1), [act], th.as_tensor(obs)[None], **options)
    alive = np.ones(30, dtype=bool)
    n_terminated = 0
    for t in range(imagined.alive.shape[1]):
        np.testing.assert_array_equal(imagined.alive[0, t], alive)
        np.testing.assert_array_equal(imagined.policy_input[0, t][alive], obs[alive])
        action = ensemble.codec.to_numpy(ensemble.codec.to_env(imagined.actions[0, t]))
        obs, rewards, dones, infos = env.step(action)
        np.testing.assert_array_equal(imagined.rewards[0, t][alive], rewards[alive])
        terminated = dones & ~np.array([info["TimeLimit.truncated"] for info in infos])
        np.testing.assert_array_equal(imagined.terminated[0, t][alive], terminated[alive])
        n_terminated += (terminated & alive).sum()
        alive = alive & ~dones
    assert 0 < n_terminated < 30, "both kinds of ends must occur"


def test_each_environment_follows_its_own_member():
    ensemble = fitted_ensemble()
    env = ModelVecEnv(ensemble, starts(), distance_reward, n_envs=20, horizon=4, clip_margin=None, seed=0)
    obs = env.reset()
    for action in random_actions(env, 12):
        expected = ensemble.predict(obs, action)
        obs, _, dones, infos = env.step(action)
        for i, info in enumerate(infos):
            next_obs = info["terminal_observation"] if dones[i] else obs[i]
            # Not bit for bit: a matrix product with other rows may sum in another order
            np.testing.assert_allclose(next_obs, expected[info["model_index"], i], rtol=1e-5, atol=1e-5)


def test_a_random_member_for_the_length_of_an_episode():
    env = ModelVecEnv(linear_ensemble(), np.zeros((1, OBS_DIM)), distance_reward, n_envs=10, horizon=5, seed=0)
    env.reset()
    members = []
    for t, action in enumerate(random_actions(env, 50)):
        expected_members = [info["model_index"] for info in env.reset_infos]
        obs, _, dones, infos = env.step(action)
        assert [info["model_index"] for info in infos] == expected_members
        step_in_episode = t % 5 + 1
        assert dones.all() == (step_in_episode == 5)
        for i, info in enumerate(infos):
            state = info["terminal_observation"] if dones[i] else obs[i]
            np.testing.assert_array_equal(state, step_in_episode * (info["model_index"] + 1))
        if dones.all():
            members.append(expected_members)
    # 100 episodes: a member is left out, or an environment keeps its own, with a probability below 1e-3
    counts = np.bincount(np.ravel(members), minlength=N_MODELS)
    assert counts.min() > 10
    assert all(len(set(of_one_env)) > 1 for of_one_env in zip(*members, strict=True))


def test_a_chosen_member_is_the_only_one():
    env = ModelVecEnv(linear_ensemble(), np.zeros((1, OBS_DIM)), distance_reward, n_envs=10, horizon=2, model_index=1)
    env.reset()
    for action in random_actions(env, 6):
        *_, infos = env.step(action)
        assert {info["model_index"] for info in infos + env.reset_infos} == {1}


def test_a_random_member_for_each_step():
    env = ModelVecEnv(
        linear_ensemble(), np.zeros((1, OBS_DIM)), distance_reward, n_envs=10, horizon=5, seed=0, resample_model="step"
    )
    state, members = env.reset(), []
    assert {info["model_index"] for info in env.reset_infos} <= set(range(N_MODELS))
    first = [info["model_index"] for info in env.reset_infos]
    for t, action in enumerate(random_actions(env, 50)):
        obs, _, _, infos = env.step(action)
        of_step = np.array([info["model_index"] for info in infos])
        if t % 5 == 0:
            assert of_step.tolist() == first
        reached = np.stack([info.get("terminal_observation", row) for info, row in zip(infos, obs, strict=True)])
        np.testing.assert_array_equal(reached, state + of_step[:, None] + 1)
        members.append(of_step)
        first = [info["model_index"] for info in env.reset_infos]
        state = obs
    # 500 draws: each member's share is 1/3 +- 0.02, and so is the share of steps that keep the member
    counts = np.bincount(np.ravel(members), minlength=N_MODELS)
    assert (np.abs(counts / 500 - 1 / N_MODELS) < 0.1).all()
    kept = np.mean([one == other for one, other in pairwise(members)])
    assert abs(kept - 1 / N_MODELS) < 0.1


@pytest.mark.parametrize("probabilistic", [False, True])
def test_a_later_fit_changes_nothing(probabilistic):
    ensemble = fitted_ensemble(probabilistic=probabilistic)
    env, untouched = (ModelVecEnv(ensemble, starts(), distance_reward, n_envs=4, horizon=5, seed=0) for _ in range(2))
    actions = random_actions(env, 10)
    expected = play(untouched, actions)
    fit(ensemble, seed=9)
    with th.no_grad():
        for tensor in (*ensemble.parameters(), *ensemble.buffers()):
            tensor.add_(1)
    assert_same(play(env, actions), expected)


def test_imagined_observations_stay_near_the_data():
    ensemble = fitted_ensemble()
    low = (ensemble.observation_low - 0.1 * ensemble.observation_std).numpy()
    high = (ensemble.observation_high + 0.1 * ensemble.observation_std).numpy()
    with th.no_grad():
        ensemble.biases[-1].fill_(5)
    env = ModelVecEnv(ensemble, starts(), distance_reward, n_envs=4)
    _, steps = play(env, random_actions(env, 10))
    assert all(((low <= obs) & (obs <= high)).all() for obs, *_ in steps)
    np.testing.assert_array_equal(steps[-1][0], np.tile(high, (4, 1)))


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("probabilistic", [False, True])
def test_same_seed_same_numbers(probabilistic):
    ensemble = fitted_ensemble(probabilistic=probabilistic)

    def rollouts(seed, later_seed=None):
        env = ModelVecEnv(ensemble, starts(), distance_reward, n_envs=6, horizon=5, seed=seed)
        if later_seed is not None:
            env.seed(later_seed)
        return play(env, random_actions(env, 12))

    assert_same(rollouts(3), rollouts(3))
    assert_same(rollouts(4, 3), rollouts(None, 3))
    for other in (rollouts(4), rollouts(None), rollouts(3, 4)):
        assert not np.array_equal(rollouts(3)[0], other[0])


def test_noise_is_sampled():
    ensemble = fitted_ensemble(probabilistic=True)
    env = ModelVecEnv(ensemble, starts(1), distance_reward, n_envs=6, model_index=0, seed=0)
    obs, steps = play(env, np.zeros((1, 6, 2), dtype=np.float32))
    assert len(np.unique(obs, axis=0)) == 1
    assert len(np.unique(steps[0][0], axis=0)) == 6


def test_a_seed_is_for_one_reset_and_leaves_global_generators_alone():
    env = ModelVecEnv(linear_ensemble(), starts(), distance_reward, n_envs=6, seed=0)
    assert env.seed(7) == [7, 8, 9, 10, 11, 12]
    first, second = env.reset(), env.reset()
    assert not np.array_equal(first, second)
    env.seed(7)
    np.random.seed(1)  # noqa: NPY002 - the global state is what must not matter
    th.manual_seed(1)
    np.testing.assert_array_equal(env.reset(), first)
    np.testing.assert_array_equal(env.reset(), second)


# ---------------------------------------------------------------- attributes


def test_attributes_are_shared():
    env = ModelVecEnv(linear_ensemble(), starts(), distance_reward, n_envs=3, horizon=9)
    assert env.render_mode is None
    assert env.get_attr("render_mode") == [None] * 3
    assert env.get_attr("horizon") == [9, 9, 9]
    assert env.get_attr("horizon", indices=1) == [9]
    assert env.get_attr("horizon", indices=[0, 2]) == [9, 9]
    assert env.has_attr("horizon")
    assert not env.has_attr("spec")
    env.set_attr("horizon", 1)
    assert env.get_attr("horizon") == [1, 1, 1]
    env.reset()
    assert env.step(random_actions(env, 1)[0])[2].all()
    with pytest.raises(ValueError, match="share their attributes"):
        env.set_attr("horizon", 2, indices=[0, 1])
    with pytest.raises(AttributeError):
        env.get_attr("nothing")
    assert env.env_method("has_attr", "horizon", indices=[0, 1]) == [True, True]
    with pytest.raises(AttributeError):
        env.env_method("nothing")
    assert env.env_is_wrapped(Monitor) == [False] * 3
    assert env.env_is_wrapped(Monitor, indices=0) == [False]
    assert env.unwrapped is env
    env.close()


# ---------------------------------------------------------------- training in it

ALGORITHMS = {
    PPO: {"n_steps": 16, "batch_size": 32, "n_epochs": 1},
    A2C: {"n_steps": 16},
    TRPO: {"n_steps": 16, "batch_size": 32, "n_critic_updates": 1},
    SAC: {"learning_starts": 16, "batch_size": 16, "buffer_size": 200},
    TD3: {"learning_starts": 16, "batch_size": 16, "buffer_size": 200},
    DQN: {"learning_starts": 16, "batch_size": 16, "buffer_size": 200},
}
PAIRS = [(algorithm, BOX_ACTIONS) for algorithm in (PPO, A2C, SAC, TD3, TRPO)]
PAIRS += [(algorithm, spaces.Discrete(3)) for algorithm in (PPO, A2C, DQN)]


def tiny(algorithm, env):
    # SB3 writes into policy_kwargs: a new dictionary each time
    kwargs = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu", **ALGORITHMS[algorithm]}
    return algorithm("MlpPolicy", env, **kwargs)


@pytest.mark.parametrize(("algorithm", "action_space"), PAIRS, ids=lambda value: getattr(value, "__name__", str(value)[:8]))
def test_algorithms_train_in_it(algorithm, action_space):
    ensemble = fitted_ensemble(action_space=action_space, learned_reward=True, probabilistic=True)

    def train():
        env = VecMonitor(ModelVecEnv(ensemble, starts(), termination_fn=lambda n: n[:, 0] > 2, n_envs=4, horizon=8))
        return tiny(algorithm, env).learn(128)

    model = train()
    assert model.num_timesteps == 128
    lengths = [episode["l"] for episode in model.ep_info_buffer]
    assert len(lengths) >= 128 // 8 - 4
    assert max(lengths) == 8
    # SB3 hands its seed to the environment: all of the training repeats
    for parameter, again in zip(model.policy.parameters(), train().policy.parameters(), strict=True):
        assert th.equal(parameter, again)


def test_from_a_saved_file(tmp_path):
    ensemble = fitted_ensemble(learned_reward=True, probabilistic=True)
    ensemble.save(tmp_path / "ensemble")
    envs = [
        ModelVecEnv(e, starts(), n_envs=4, horizon=5, seed=0) for e in (ensemble, DynamicsEnsemble.load(tmp_path / "ensemble"))
    ]
    assert_same(*(play(env, random_actions(envs[0], 12)) for env in envs))


def test_wrappers_and_evaluation_work():
    env = VecMonitor(ModelVecEnv(linear_ensemble(), starts(), lambda o, a, n: th.ones(len(n)), n_envs=4, horizon=8))
    model = tiny(PPO, VecNormalize(env)).learn(64)
    returns, lengths = evaluate_policy(model.policy, env, n_eval_episodes=6, return_episode_rewards=True)
    assert returns == [8] * 6
    assert lengths == [8] * 6


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_envs": 0}, "`n_envs` must be an integer of at least 1, not 0"),
        ({"n_envs": 1.5}, "`n_envs`"),
        ({"horizon": 0}, "`horizon` must be an integer of at least 1, not 0"),
        ({"model_index": -1}, "`model_index`"),
        ({"model_index": N_MODELS}, f"`model_index` must be an integer of at least 0 and at most {N_MODELS - 1}"),
        ({"clip_margin": -0.1}, "`clip_margin`"),
        ({"resample_model": "rollout"}, "`resample_model` must be one of"),
        ({"clip_margin": np.nan}, "`clip_margin`"),
        ({"start_obs": np.zeros((0, OBS_DIM))}, r"`start_obs` must have shape \(S, 3\)"),
        ({"start_obs": np.zeros((5, OBS_DIM + 1))}, "`start_obs` must have shape"),
        ({"start_obs": np.zeros(OBS_DIM)}, "`start_obs` must have shape"),
        ({"start_obs": np.full((5, OBS_DIM), np.nan)}, "NaN or infinite"),
        ({"start_obs": np.full((5, OBS_DIM), np.inf)}, "NaN or infinite"),
        ({"reward_fn": None}, "pass `reward_fn`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModelVecEnv(linear_ensemble(), **{"start_obs": starts(), "reward_fn": distance_reward, **arguments})


@pytest.mark.parametrize("actions", [np.zeros((1, 2)), np.zeros((3, 1)), np.zeros(2), np.zeros((4, 2))])
def test_actions_of_another_shape(actions):
    env = ModelVecEnv(linear_ensemble(), starts(), distance_reward, n_envs=3)
    env.reset()
    with pytest.raises(ValueError, match=r"`actions` must have shape \(3, 2\)"):
        env.step(actions)


def test_functions_that_return_another_shape_or_type():
    env = ModelVecEnv(linear_ensemble(), starts(), lambda o, a, n: n, n_envs=3)
    env.reset()
    with pytest.raises(ValueError, match="reward_fn must return a floating tensor"):
        env.step(np.zeros((3, 2)))
    env = ModelVecEnv(linear_ensemble(), starts(), distance_reward, lambda n: n[:, 0], n_envs=3)
    env.reset()
    with pytest.raises(ValueError, match=r"termination_fn must return a torch\.bool tensor"):
        env.step(np.zeros((3, 2)))


def test_step_before_reset():
    env = ModelVecEnv(linear_ensemble(), starts(), distance_reward, n_envs=3)
    with pytest.raises(ResetNeeded, match="Call `reset`"):
        env.step(np.zeros((3, 2)))
