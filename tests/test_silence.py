"""Failures that used to be silent: nothing is learned, data are corrupted, metrics are invisible. And nothing leaks."""

import json
import warnings
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize
from tiny import Drift, Unknown, push, tiny_model, vec_drift

from sb3_mbmpo import MBMPO
from sb3_mbmpo.__main__ import main
from sb3_mbmpo.real import rollouts
from sb3_mbmpo.report.episodes import play_episode

EXPECTED = "Nothing will be learned", "Real episodes last"


def caught(act):
    """Return the messages of the warnings that a function causes."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in found if warning.category is UserWarning]


def faults(act):
    return [message for message in caught(act) if not message.startswith(EXPECTED)]


# ---------------------------------------------------------------- nothing is learned


@pytest.mark.parametrize(
    ("n_envs", "learning_starts", "steps", "numbers"),
    [
        (1, 20, 19, ("19 real steps", "waits for 20", "is 20")),
        (3, 20, 18, ("18 real steps", "waits for 20", "is 20")),
        (1, 20, 20, None),
        (3, 20, 19, None),  # 21 steps
    ],
)
def test_a_training_that_ends_before_the_first_fit_is_warned_of_with_both_numbers(n_envs, learning_starts, steps, numbers):
    model = tiny_model(vec_drift(n_envs), learning_starts=learning_starts, horizon=10)
    messages = caught(lambda: model.learn(steps))
    assert len(messages) == (numbers is not None) == (model._n_fits == 0)
    for number in numbers or ():
        assert number in messages[0]
    assert caught(lambda: model.learn(1)) == [], "already warned, or already fitted"


def test_the_rest_of_the_random_steps_counts():
    model = tiny_model(horizon=10)
    assert len(caught(lambda: model.learn(12))) == 1
    assert caught(lambda: model.learn(8, reset_num_timesteps=False)) == []
    assert model._n_fits == 1


def test_the_command_line_refuses_to_train_nothing(tmp_path):
    with pytest.raises(SystemExit, match=r"All 999 real steps would be random \(`learning_starts`: 1000\)") as ended:
        main(["train", "--total-timesteps", "999", "--save", str(tmp_path / "model.zip")])
    assert "\n" not in str(ended.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("longest", "horizon", "start", "expected"),
    [(8, 7, "initial", 1), (8, 8, "initial", 0), (8, 7, "buffer", 0), (10**6, 10, "initial", 1)],
)
@pytest.mark.parametrize("monitor", [True, False])
def test_episodes_beyond_the_horizon_are_said_once(longest, horizon, start, expected, monitor):
    model = tiny_model(
        vec_drift(monitor=monitor, length=longest, random_start=False),
        horizon=horizon,
        imagined_start=start,
    )
    messages = caught(lambda: model.learn(60))
    assert len(messages) == expected
    for message in messages:
        assert f"end after {horizon} steps (`horizon`)" in message
        assert "imagined_start='buffer'" in message


# ---------------------------------------------------------------- corrupted data


class Reused(VecEnvWrapper):
    """A wrapper that returns the same array for all observations."""

    def __init__(self, venv):
        super().__init__(venv)
        self.obs = np.zeros((venv.num_envs, *venv.observation_space.shape), np.float32)

    def reset(self):
        self.obs[:] = self.venv.reset()
        return self.obs

    def step_wait(self):
        self.obs[:], rewards, dones, infos = self.venv.step_wait()
        return self.obs, rewards, dones, infos


class WithoutTerminalObservation(VecEnvWrapper):
    key = None

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        obs, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            info.pop("terminal_observation", None)
            if self.key:
                info[self.key] = None
        return obs, rewards, dones, infos


class NoneAsTerminalObservation(WithoutTerminalObservation):
    key = "terminal_observation"


class OneArray(Drift):
    """An environment that returns the same array from each step and reset."""

    def reset(self, **kwargs):
        first, info = super().reset(**kwargs)
        if not hasattr(self, "out"):
            self.out = first
        self.out[:] = first
        return self.out, info

    def step(self, action):
        obs, *rest = super().step(action)
        self.out[:] = obs
        return self.out, *rest


def assert_true_dynamics(model, missing=0):
    """Assert that the model learns from nothing but the real movements of the point."""
    data = model._transitions()
    for obs, action, next_obs in zip(data.obs.numpy(), data.action.numpy(), data.next_obs.numpy(), strict=True):
        np.testing.assert_allclose(next_obs, push(obs, action), rtol=1e-5, atol=1e-6)
    assert len(data.obs) == model.num_timesteps - missing


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_reused_array_is_warned_of_once_and_copied(n_envs, normalize):
    env = Reused(vec_drift(n_envs, length=5))
    reference = tiny_model(vec_drift(n_envs, length=5)).learn(60)
    model = tiny_model(VecNormalize(env, norm_obs=False, norm_reward=False) if normalize else env)
    messages = faults(lambda: model.learn(60))
    assert len(messages) == (not normalize), "VecNormalize copies"
    assert all("the same array" in message for message in messages)
    assert_true_dynamics(model)
    for name in ("observations", "next_observations", "actions"):
        np.testing.assert_array_equal(getattr(model.replay_buffer, name), getattr(reference.replay_buffer, name))


def test_fresh_arrays_bring_no_warning():
    for env in (vec_drift(2), VecNormalize(vec_drift(2))):
        assert faults(lambda env=env: tiny_model(env).learn(40)) == []


def test_an_adaptation_copies_what_is_handed_out():
    model = tiny_model(policy_kwargs=dict(net_arch=[8], normalize_observation=False)).learn(20)
    parameters = []
    for env in (vec_drift(2), Reused(vec_drift(2))):
        env.seed(3)
        parameters.append(model.adapt(env, n_episodes=4).actor_vector())
    assert th.equal(*parameters)


def test_an_episode_for_the_report_copies_what_is_handed_out():
    push_it = np.full((1, 2), 0.9, np.float32)
    reference, episode = (play_episode(env, lambda _: push_it, 0) for env in (Drift(), OneArray()))
    np.testing.assert_array_equal(episode.obs, reference.obs)
    assert len(np.unique(episode.obs[:, 0])) == len(episode.obs)


@pytest.mark.parametrize("wrapper", [WithoutTerminalObservation, NoneAsTerminalObservation])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_ends_without_terminal_observation_are_warned_of_once_and_left_out(wrapper, n_envs):
    model = tiny_model(wrapper(vec_drift(n_envs, length=5)))
    messages = faults(lambda: model.learn(60))
    assert len(messages) == 1
    assert "terminal_observation" in messages[0]
    assert_true_dynamics(model)
    assert not model._transitions().terminated.any()


@pytest.mark.parametrize("wrapper", [WithoutTerminalObservation, NoneAsTerminalObservation])
def test_an_adaptation_to_ends_without_terminal_observation_is_warned_of_once(wrapper):
    model = tiny_model().learn(20)
    messages = caught(lambda: model.adapt(wrapper(vec_drift(2)), n_episodes=4))
    assert len(messages) == 1
    assert "without `infos[i]['terminal_observation']`" in messages[0]
    assert caught(lambda: model.adapt(vec_drift(2), n_episodes=4)) == []


def test_one_step_episodes_without_terminal_observation_leave_nothing_to_learn_from():
    model = tiny_model(WithoutTerminalObservation(vec_drift(length=1)))
    assert len(faults(lambda: model.learn(30))) == 1
    assert_true_dynamics(model, missing=30)
    assert model._n_fits == 0


def test_an_end_that_reset_overwrites_is_warned_of_once_and_left_out():
    model = tiny_model(vec_drift(2, OneArray, length=5))
    messages = faults(lambda: model.learn(60))
    assert len(messages) == 1
    assert "`reset` writes into the array" in messages[0]
    assert_true_dynamics(model)


class Bandit(gym.Env):
    """An environment with episodes of one step; the observation is one of a few contexts, or always the same."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gym.spaces.Box(0, 1, (2,), np.float32)

    def __init__(self, contexts):
        self.contexts = np.float32(contexts)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.choice(self.contexts), {}

    def step(self, action):
        return self.np_random.choice(self.contexts), 0.0, True, False, {}


@pytest.mark.parametrize("contexts", [[[1, 0]], [[1, 0], [0, 1]]])
def test_ends_that_are_the_next_start_by_nature_bring_no_warning(contexts):
    model = tiny_model(DummyVecEnv([lambda: Bandit(contexts)]))
    assert faults(lambda: model.learn(60)) == []
    assert model._transitions().terminated.sum() >= 59


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize("log_interval", [1, 2, None])
def test_callbacks_see_the_figures_of_the_last_training(log_interval, tmp_path):
    seen = []

    class Look(BaseCallback):
        def _on_step(self):
            metrics = self.logger.name_to_value
            seen.append([metrics.get(key) for key in ("train/kl_divergence", "train/n_updates", "dynamics/val_loss")])
            return True

        def _on_training_end(self):
            self._on_step()

    model = tiny_model(n_meta_steps=2)
    model.set_logger(configure(str(tmp_path), ["json"]))
    model.learn(80, callback=Look(), log_interval=log_interval)
    model.logger.close()
    assert seen[:20] == [[None] * 3] * 20
    assert [updates for _, updates, _ in seen[20::20]] == [2, 4, 6, 8]
    for row in seen[20:]:
        assert None not in row
    assert len({tuple(row) for row in seen[20:]}) == 4
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [line["train/n_updates"] for line in lines] == {1: [2, 4, 6, 8], 2: [4, 8], None: []}[log_interval]


def test_what_an_evaluation_logs_does_not_repeat_the_training(tmp_path):
    model = tiny_model()
    model.set_logger(configure(str(tmp_path), ["csv", "json"]))
    model.learn(60, callback=EvalCallback(vec_drift(), eval_freq=10, n_eval_episodes=1, verbose=0))
    model.logger.close()
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert Counter("eval/mean_reward" in line for line in lines) == {True: 6, False: 3}
    assert Counter("train/n_updates" in line for line in lines) == {True: 3, False: 6}


def test_a_loaded_model_does_not_call_a_reward_learned_that_it_knew(tmp_path, capsys):
    for env, expected in ((Drift(), "a function that comes with the environment"), (Unknown(), "learned")):
        tiny_model(env, verbose=1).save(tmp_path / "model")
        assert expected == "learned" or "reward: env.reward; termination: env.done;" in capsys.readouterr().out
        MBMPO.load(tmp_path / "model")
        assert f"reward: {expected}; termination: {expected};" in capsys.readouterr().out


# ---------------------------------------------------------------- time and memory


@pytest.mark.parametrize(
    ("n_envs", "n_steps", "learning_starts", "total", "sizes"),
    [
        (7, 60, 200, 500, [203, 63, 63, 63, 63, 49]),
        (7, 14, 20, 100, [21, 14, 14, 14, 14, 14, 14]),
        (3, 10, 10, 40, [12, 12, 12, 6]),
        (1, 30, 20, 100, [20, 30, 30, 20]),
        (4, 2, 4, 9, [4, 4, 4]),
    ],
)
def test_no_iteration_is_for_a_rest_that_rounding_left(n_envs, n_steps, learning_starts, total, sizes, monkeypatch):
    model = tiny_model(vec_drift(n_envs), n_steps=n_steps, learning_starts=learning_starts)
    steps = []

    def train():
        steps.append(model.num_timesteps)
        model._n_fits += 1

    monkeypatch.setattr(model, "train", train)
    model.learn(total)
    assert np.diff([0, *steps]).tolist() == sizes
    assert total <= model.num_timesteps < total + n_envs


def test_starts_are_not_copied_at_every_step(monkeypatch):
    monkeypatch.setattr(rollouts, "MAX_INITIAL_OBS", 25)
    copies = []
    model = tiny_model(vec_drift(length=1))
    join = model._join_new_starts
    monkeypatch.setattr(model, "_join_new_starts", lambda: (copies.append(len(model._new_starts)), join()))
    seen = []

    def look(local_variables, _):
        seen.append(model._raw_last_obs()[0].copy())
        return True

    model.learn(60, callback=look)
    assert max(copies) == 20
    assert len(copies) <= 9, "once per rollout, once for imagination, once to log their value"
    np.testing.assert_array_equal(model._initial_obs, np.array(seen[-25:]))


def test_starts_that_a_file_holds_in_the_middle_of_a_rollout_are_imagined_from(tmp_path):
    model = tiny_model(vec_drift(length=1))
    model.learn(10, callback=lambda *_: model.num_timesteps != 6 or model.save(tmp_path / "model") is None)
    loaded = MBMPO.load(tmp_path / "model", env=vec_drift())
    np.testing.assert_array_equal(loaded._start_pool().numpy(), model._initial_obs[:5])
